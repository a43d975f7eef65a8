"""Any sequence of calls has the result of a rebuilt index, to rounding."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sketching import Adaptive, Exact, Filter, MahalanobisIndex, MahalanobisMetric
from tests.sketching.mahalanobis_oracle import assert_within, distances

D, K = 9, 7
SEEDS = st.integers(0, 2**32 - 1)


class Verbs(RuleBasedStateMachine):
    """An index together with a dictionary of points and a factor."""

    mode, dtype = Exact(), np.float64

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.factor = rng.standard_normal((K, D))
        self.points = {}
        metric = MahalanobisMetric(self.factor)
        self.index = MahalanobisIndex(metric, mode=self.mode, eps=0.25, rng=3)

    def draw(self, seed, n):
        rng = np.random.default_rng(seed)
        return (rng.standard_normal((n, D)) + 3).astype(self.dtype)

    def pick(self, seed, share=0.5):
        names = np.array(sorted(self.points))
        chosen = np.random.default_rng(seed).random(len(names)) < share
        return names[chosen]

    @rule(seed=SEEDS, n=st.integers(0, 12))
    def insert(self, seed, n):
        x = self.draw(seed, n)
        numbers = self.index.insert(x)
        self.points |= dict(zip(numbers.tolist(), x, strict=True))

    @precondition(lambda self: self.points)
    @rule(seed=SEEDS)
    def delete(self, seed):
        chosen = self.pick(seed)
        self.index.delete(chosen)
        for number in chosen.tolist():
            del self.points[number]

    @precondition(lambda self: self.points)
    @rule(seed=SEEDS)
    def update_points(self, seed):
        chosen = self.pick(seed)
        x = self.draw(seed, len(chosen))
        self.index.update_points(chosen, x)
        self.points |= dict(zip(chosen.tolist(), x, strict=True))

    @rule(seed=SEEDS, r=st.integers(1, 5), size=st.sampled_from([0.1, 1.0, 30.0]))
    def update_metric(self, seed, r, size):
        rng = np.random.default_rng(seed)
        a, b = size * rng.standard_normal((r, K)), rng.standard_normal((r, D))
        self.index.update_metric(a, b)
        self.factor = self.factor + a.T @ b

    @rule(row=st.integers(0, K - 1), seed=SEEDS)
    def update_row(self, row, seed):
        b = np.random.default_rng(seed).standard_normal(D)
        self.index.update_metric(row, b)
        self.factor = self.factor.copy()
        self.factor[row] += b

    @rule(seed=SEEDS)
    def undo_most_of_the_metric(self, seed):
        # rounding of what was large would stay behind
        a = np.random.default_rng(seed).standard_normal(K)
        b = -0.999 * a @ self.factor / (a @ a)
        self.index.update_metric(a, b)
        self.factor = self.factor + np.outer(a, b)

    @precondition(lambda self: self.points)
    @rule(seed=SEEDS)
    def merge(self, seed):
        other = MahalanobisIndex(self.index.metric, mode=self.mode, eps=0.25, rng=4)
        x = self.draw(seed, 3)
        other.insert(x)
        before = set(self.index.numbers.tolist())
        self.index.merge(other)
        added = [y for y in self.index.numbers.tolist() if y not in before]
        self.points |= dict(zip(sorted(added), x, strict=True))

    @precondition(lambda self: self.points)
    @rule(seed=SEEDS)
    def redraw(self, seed):
        self.index.redraw(seed)

    @precondition(lambda self: self.points)
    @rule(seed=SEEDS)
    def query(self, seed):
        """Distances are those of a rebuilt index, and true to the certificate."""
        numbers = self.index.numbers
        assert sorted(numbers.tolist()) == sorted(self.points)
        x = np.stack([self.points[i] for i in numbers.tolist()])
        q = np.concatenate([self.draw(seed, 2), x[:1]])
        answer = self.index.query(q)
        truth = distances(self.factor, q, x)
        # rounding of the points at the centre, and of the factor by its updates
        eps, scale = np.finfo(self.dtype).eps, np.linalg.norm(self.index.metric.factor)
        rounding = 1e-11 * (1 + scale)
        slack = 16 * eps * scale * np.abs(x).max() * np.sqrt(D) + rounding
        off = np.abs(answer.value - truth)
        assert (off <= float(answer.certificate.error) * truth + slack).all()
        self.compare_neighbours(q, truth, slack)

    def compare_neighbours(self, q, truth, slack):
        k = min(4, truth.shape[1])
        found, numbers = self.index.kneighbors(q, k)
        want = np.sort(truth, axis=1)[:, :k]
        assert (np.abs(found - want) <= 2e-3 * want + slack).all()
        assert all(len(set(row)) == k for row in numbers.tolist())

    @precondition(lambda self: len(self.points) > 1)
    @rule(seed=SEEDS)
    def pairs(self, seed):
        i, j = np.random.default_rng(seed).choice(sorted(self.points), 2)
        got = self.index.query_pairs([i], [j])[0]
        truth = np.linalg.norm(self.factor @ (self.points[i] - self.points[j]))
        scale = np.linalg.norm(self.index.metric.factor)
        slack = 64 * np.finfo(self.dtype).eps * scale * 10 + 1e-10 * (1 + scale)
        error = 0.25 if isinstance(self.mode, Adaptive) else 2e-3
        assert abs(got - truth) <= error * truth + slack

    @invariant()
    def metric_is_the_factor(self):
        off = np.abs(self.index.metric.factor - self.factor).max()
        assert off <= 1e-12 * (1 + np.abs(self.factor).max())
        assert len(self.index) == len(self.points)


# sketches that are never off by a quarter, for as many distances as the tests see
CERTAIN = Adaptive(rows=160, sketches=9, sampled=9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "mode",
    [Exact(), Filter(size=3), Filter(size=K), CERTAIN, None],
    ids=["exact", "filter", "whole", "adaptive", "picked"],
)
@pytest.mark.parametrize("examples", [20, pytest.param(120, marks=pytest.mark.slow)])
def test_any_sequence_of_verbs_equals_a_rebuild(mode, dtype, examples):
    machine = type("Machine", (Verbs,), {"mode": mode, "dtype": dtype})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples, stateful_step_count=30, deadline=None
    )
    case().runTest()


@pytest.mark.parametrize("mode", [Exact(), Filter(size=3), CERTAIN])
def test_rounding_of_large_updates_does_not_stay(mode):
    # what is added and taken away again leaves single precision's rounding of it
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, D)).astype(np.float32)
    factor = np.diag(0.3 ** np.arange(D))[:K]
    index = MahalanobisIndex(MahalanobisMetric(factor), mode=mode, eps=0.25, rng=0)
    index.insert(x)
    a, b = 3e3 * rng.standard_normal((2, K)), rng.standard_normal((2, D))
    for sign in (1, -1):
        index.update_metric(sign * a, b)
        index.query(x[:1])
    truth = distances(index.metric.factor, x[:20], x)
    answer = index.query(x[:20])
    assert_within(answer.certificate, answer.value, truth)
    found, _ = index.kneighbors(x[:20], 5)
    want = np.sort(truth, axis=1)[:, :5]
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-9)
    # norms were measured anew, so that scans need no help
    assert index._engine.points.stats[1].max() == 0


def test_many_small_updates_of_sketches_stay_within_the_promise():
    # each rounds every sketch to 16 bits once more
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, D))
    index = MahalanobisIndex(
        MahalanobisMetric(np.eye(D)), mode=CERTAIN, eps=0.25, rng=0
    )
    index.insert(x)
    engine, largest = index._engine, 0.0
    for _ in range(400):
        index.update_metric(0.01 * rng.standard_normal(D), rng.standard_normal(D))
        engine.flush()
        share = engine.sketch._off[:100] / engine.points.stats[0]
        largest = max(largest, float(share.max()))
    # they were drawn anew before rounding was a relevant part of the norm
    assert 1e-3 < largest**0.5 < 2.1e-3
    answer = index.query(x[:9])
    assert_within(answer.certificate, answer.value, distances(index.factor, x[:9], x))


@pytest.mark.parametrize("size", [1e-3, 0.1])
@pytest.mark.parametrize("mode", [Exact(), Filter(size=8)])
def test_long_queues_of_updates_equal_a_rebuild(mode, size):
    # products of small ones with the points may be rounded to short integers
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 80)).astype(np.float32)
    metric = MahalanobisMetric(rng.standard_normal((90, 80)))
    index = MahalanobisIndex(metric, mode=mode, rng=0)
    index.insert(x)
    for _ in range(3):
        index.update_metric(size * rng.standard_normal((30, 90)), x[:30])
        answer = index.query(x[:9])
        truth = distances(index.factor, x[:9], x)
        assert_within(answer.certificate, answer.value, truth)
        found, _ = index.kneighbors(x[:9], 5)
        want = np.sort(truth, axis=1)[:, :5]
        np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-9)
        points = index._engine.points
        images = points.rows.astype(np.float64) @ index.factor.T
        h, off, _ = points.stats
        error = np.abs(h - np.einsum("nk,nk->n", images, images))
        assert (error <= off + 1e-9 * h).all()
        assert (off <= 64 * points.rounding.unit * h).all()
