"""Points returned by number, points within a radius, and points in 16 bits."""

import numpy as np
import pytest

from sketching import Adaptive, Exact, Filter, MahalanobisIndex, MahalanobisMetric, load
from tests.sketching.mahalanobis_oracle import assert_within, distances

D = 9
MODES = {
    "exact": Exact(),
    "half": Exact(half_width=True),
    "filter": Filter(size=3),
    "adaptive": Adaptive(rows=64, sketches=9, sampled=9),
}
EVERY = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def filled(mode, dtype=np.float64, n=300):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((n, D)) / np.arange(1, D + 1) + 4).astype(dtype)
    factor = rng.standard_normal((7, D))
    index = MahalanobisIndex(MahalanobisMetric(factor), mode=mode, eps=0.3, rng=1)
    index.insert(x)
    return index, x


def rounding(mode, x, dtype):
    """How far a coordinate may be from where it was given."""
    center = x.mean(axis=0, dtype=np.float64)
    largest = np.abs(x - center).max(axis=1, keepdims=True)
    if mode == MODES["half"]:
        return largest / 65534 + 1e-5
    return 4 * np.finfo(dtype).eps * (4 + largest)


@EVERY
@DTYPES
def test_points_come_back_by_number(mode, dtype):
    index, x = filled(mode, dtype)
    index.delete([0, 17])
    index.update_points([5], x[17:18])
    kept = np.delete(x, [0, 17], axis=0)
    kept[4] = x[17]
    names = np.delete(np.arange(300), [0, 17])
    assert (np.abs(index.points(names) - kept) <= rounding(mode, kept, dtype)).all()
    order = np.argsort(index.numbers)
    np.testing.assert_array_equal(index.points()[order], index.points(names))
    half_or_given = np.float32 if mode == MODES["half"] else dtype
    assert index.points([5, 5]).dtype == half_or_given
    with pytest.raises(ValueError, match="numbers: there is no point 17"):
        index.points([17])
    # a copy: what is done to it stays with it
    index.points()[:] = 0
    assert np.abs(index.points()).max() > 1


def test_the_factor_is_read_and_not_written():
    index, _ = filled(Exact())
    before = index.factor.copy()
    with pytest.raises(ValueError, match="read-only"):
        index.factor[0, 0] = 1
    a, b = np.ones(7), np.ones(D)
    index.update_metric(a, b)
    np.testing.assert_array_equal(index.factor, before + np.outer(a, b))


@EVERY
@DTYPES
def test_all_points_within_a_radius(mode, dtype):
    index, x = filled(mode, dtype)
    index.delete([3, 50])
    index.update_metric(np.ones(7), np.arange(D) / D)
    queries = x[[3, 100, 7]] + dtype(0.01)
    kept = index.points()
    truth = distances(index.factor, queries, kept)
    radius = float(np.median(truth))
    found = index.radius_neighbors(queries, radius)
    tolerance = float(Exact().guarantee(index._engine.request()).error)
    for values, numbers, row in zip(*found, truth, strict=True):
        near = row <= radius
        # a point on the rim may fall on either side
        differ = set(numbers) ^ set(index.numbers[near])
        true = dict(zip(index.numbers.tolist(), row, strict=True))
        assert all(abs(true[i] - radius) <= tolerance * radius for i in differ)
        assert (np.diff(values) >= 0).all()
        want = np.array([true[i] for i in numbers.tolist()])
        np.testing.assert_allclose(values, want, rtol=tolerance, atol=1e-6)
    assert found.examined.shape == (3,)
    assert found.certificate.norm == "relative"


@EVERY
def test_a_radius_may_be_zero_or_hold_everything(mode):
    index, x = filled(mode)
    at = index.points([12])
    # with half_width points come back rounded to single precision
    radius = 1e-5 if mode == MODES["half"] else 0
    found, numbers = index.radius_neighbors(at, radius)
    assert numbers[0].tolist() == [12]
    assert found[0][0] <= radius
    assert len(index.radius_neighbors(x[:2], 1e9)[1][1]) == 300
    with pytest.raises(ValueError, match="radius: "):
        index.radius_neighbors(x, -1)


def test_a_filter_computes_few_distances_within_a_radius():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 50)) / np.arange(1, 51) ** 1.5
    metric = MahalanobisMetric(np.eye(50))
    index = MahalanobisIndex(metric, mode=Filter(size=10), rng=0)
    index.insert(x)
    found = index.radius_neighbors(x[:5], 0.5)
    assert found.examined.max() < 1500
    assert all(i in row for i, row in enumerate(found[1]))


def half(x, factor):
    index = MahalanobisIndex(MahalanobisMetric(factor), mode=Exact(half_width=True))
    index.insert(x)
    return index


@DTYPES
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_half_width_is_exact_for_the_points_that_are_kept(size, dtype, rng):
    x = (size * (rng.standard_normal((500, D)) + 3)).astype(dtype)
    x[1] = x[0]
    x[1, 0] *= 1.001
    factor = rng.standard_normal((6, D)) / size
    index = half(x, factor)
    q = x[:5].astype(np.float32)
    answer = index.query(q)
    assert answer.value.dtype == np.float32
    # relative to the centre, as points are stored: no rounding of the centre itself
    engine = index._engine
    kept, asked = engine.points.take(slice(None)), engine.points.centred(q)
    assert_within(answer.certificate, answer.value, distances(factor, asked, kept))
    assert "of the rounded points" in answer.certificate.source


@DTYPES
def test_half_width_is_off_by_no_more_than_it_says(dtype, rng):
    x = (rng.standard_normal((400, D)) * np.geomspace(1, 30, 400)[:, None]).astype(
        dtype
    )
    factor = rng.standard_normal((D, D))
    index = half(x, factor)
    largest = np.abs(x - x.mean(axis=0)).max(axis=1)
    moved = np.abs(index.points() - x).max(axis=1)
    single = 4 * np.finfo(np.float32).eps * (largest + 10)
    assert (moved <= largest / 65534 + single).all()
    # and not much less: the width is used
    assert moved.max() > largest.max() / 65534 / 4
    q = rng.standard_normal((3, D)).astype(dtype)
    truth, got = distances(factor, q, x), index.query(q).value
    slack = np.linalg.norm(factor, 2) * np.sqrt(D) * (largest / 65534 + single)
    tolerance = float(index.guarantee().error)
    assert (np.abs(got - truth) <= tolerance * truth + slack).all()


def test_half_width_takes_half_the_memory(rng):
    x = rng.standard_normal((2000, 200)).astype(np.float32)
    metric = MahalanobisMetric(np.eye(1, 200))
    sizes = []
    for mode in (Exact(half_width=True), Exact()):
        index = MahalanobisIndex(metric, mode=mode)
        index.insert(x)
        sizes.append(index.nbytes)
    assert sizes[0] < 0.6 * sizes[1]


def test_half_width_after_every_verb_is_saved_to_the_last_bit(tmp_path, rng):
    x = rng.standard_normal((60, D))
    index = half(x, rng.standard_normal((D, D)))
    index.insert(x[:5] + 1)
    index.delete([2, 61])
    index.update_points([4], x[2:3])
    index.update_metric(rng.standard_normal((3, D)), rng.standard_normal((3, D)))
    index.redraw(0)
    index.save(tmp_path / "index.npz")
    other = load(tmp_path / "index.npz")
    np.testing.assert_array_equal(index.query(x).value, other.query(x).value)
    np.testing.assert_array_equal(index.points(), other.points())
    truth = distances(index.factor, x, index.points())
    np.testing.assert_allclose(index.query(x).value, truth, rtol=2e-3, atol=1e-5)


def test_updates_of_learners_count_as_others_do(rng):
    # their second product is a multiple of the first
    x = rng.standard_normal((200, D))
    factor = rng.standard_normal((D, D))
    index = MahalanobisIndex(MahalanobisMetric(factor), mode=Exact())
    index.insert(x)
    for turn in range(20):
        z = rng.standard_normal(D)
        u = index.factor @ z
        b = index.factor.T @ u
        a = -0.3 * u if turn % 3 else 0.1 * np.linalg.norm(u) * rng.standard_normal(D)
        index.update_metric(a, b / (b @ b))
        if turn % 5 == 0:
            index.insert(x[:3])
    answer = index.query(x[:9])
    truth = distances(index.factor, x[:9], index.points())
    np.testing.assert_allclose(answer.value, truth, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "ask",
    [
        lambda index: index.kneighbors(np.zeros((1, 4)), 0),
        lambda index: index.kneighbors(np.zeros((1, 4)), 8),
        lambda index: index.radius_neighbors(np.zeros((1, 4)), -1),
        lambda index: index.sample(np.zeros(4), 0),
        lambda index: index.sample(np.zeros(4), 1, power=3),
        lambda index: index.query_pairs([0], [9]),
        lambda index: index.query_pairs([0, 1], [2]),
        lambda index: index.query(np.zeros((1, 3))),
    ],
    ids=["k = 0", "k = 8", "radius", "size", "power", "number", "pairs", "width"],
)
def test_arguments_are_checked_before_updates_reach_the_points(ask):
    index = MahalanobisIndex(MahalanobisMetric(np.eye(4)), rng=0)
    index.insert(np.random.default_rng(0).standard_normal((7, 4)))
    index.update_metric(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match=r"expected|there is no point"):
        ask(index)
    assert index._engine.state.pending
