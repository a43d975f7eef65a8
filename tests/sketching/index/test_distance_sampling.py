"""Points are drawn in exact proportion to their distance, whatever estimates say."""

import numpy as np
import pytest
from scipy.stats import chi2

from sketching import Adaptive, Exact, Filter, MahalanobisIndex, MahalanobisMetric
from sketching.index.rejection_sampling import sample_exact

MODES = {
    "exact": Exact(),
    "filter": Filter(size=2),
    "adaptive": Adaptive(rows=150, sketches=20, sampled=5),
    # too few sketches to claim eps: the distances are computed
    "unclaimed": Adaptive(rows=2, sketches=2, sampled=1),
}


def assert_drawn_from(numbers, weights, size):
    """Pearson's test at a false alarm of one in a billion."""
    expected = size * weights / weights.sum()
    seen = np.bincount(numbers, minlength=len(weights))
    is_possible = expected > 0
    assert seen[~is_possible].sum() == 0
    off = (seen - expected)[is_possible] ** 2 / expected[is_possible]
    assert off.sum() < chi2.isf(1e-9, is_possible.sum() - 1)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_points_are_drawn_by_distance(mode, power):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 8)) * np.geomspace(0.1, 10, 12)[:, None]
    index = MahalanobisIndex(MahalanobisMetric(np.eye(8)), mode=mode, eps=0.3, rng=1)
    index.insert(x)
    index.delete([3])
    numbers = np.concatenate([index.sample(x[5], 2000, power=power) for _ in range(5)])
    weights = np.linalg.norm(x - x[5], axis=1) ** power
    weights[3] = 0
    assert_drawn_from(numbers, weights, 10_000)


@pytest.mark.parametrize("power", [1, 2])
def test_estimates_that_break_their_promise_are_replaced(power, rng):
    exact = np.array([0.0, 1.0, 2.0, 5.0])
    wrong = np.array([1.0, 1.0, 0.1, 9.0])
    got = sample_exact(wrong, 0.1, lambda slots: exact[slots], 20_000, power, rng)
    assert got.shape == (20_000,)
    assert_drawn_from(got, exact**power, 20_000)


def test_points_that_are_all_at_the_query_are_refused():
    index = MahalanobisIndex(MahalanobisMetric(np.eye(2)), mode=Exact())
    index.insert(np.ones((4, 2)))
    with pytest.raises(ValueError, match="q: every point is at distance 0"):
        index.sample(np.ones(2), 1)
