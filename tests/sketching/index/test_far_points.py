"""Points far from each other, and near ones far from the centre: none is lost."""

import numpy as np
import pytest

from sketching import (
    Adaptive,
    Exact,
    Filter,
    MahalanobisIndex,
    MahalanobisMetric,
    MahalanobisNeighbors,
)

# sketches that are never off by what they claim, for as many distances as are tested
CERTAIN = Adaptive(rows=200, sketches=15, sampled=9)
MODES = [Exact(), Filter(size=3), Filter(size=99), None, CERTAIN]
EVERY = pytest.mark.parametrize("mode", MODES, ids=str)


def distances(factor, queries, points):
    """``|U (q - x)|`` in long double, which keeps what double rounds."""
    apart = queries[:, None].astype(np.longdouble) - points[None].astype(np.longdouble)
    image = np.einsum("qnd,kd->qnk", apart, factor.astype(np.longdouble))
    return np.sqrt((image**2).sum(axis=2))


def assert_right(index, queries, points=None):
    """Distances and neighbours keep their certificates."""
    kept = index.points()
    if points is not None:
        np.testing.assert_array_equal(kept, points)
    truth = distances(index.factor, queries, kept)
    answer = index.query(queries)
    slack = 4 * np.finfo(answer.value.dtype).eps
    error = float(answer.certificate.error)
    assert (np.abs(answer.value - truth) <= (error + slack) * truth).all()
    k = min(4, len(kept))
    values, numbers = found = index.kneighbors(queries, k)
    at = {int(number): i for i, number in enumerate(index.numbers)}
    places = np.array([[at[int(i)] for i in row] for row in numbers])
    own = np.take_along_axis(truth, places, axis=1)
    tolerance = float(Exact().guarantee(index._engine.request()).error)
    assert (np.abs(values - own) <= (tolerance + slack) * own).all()
    if not isinstance(index.mode, Adaptive):
        assert found.certificate.error == tolerance
        best = np.sort(truth, axis=1)[:, :k]
        assert (own <= best * (1 + 2 * tolerance)).all()


def index_of(mode, factor, *batches):
    index = MahalanobisIndex(MahalanobisMetric(factor), mode=mode, eps=0.3, rng=0)
    for batch in batches:
        index.insert(batch)
    return index


@EVERY
@pytest.mark.parametrize("apart", [1e3, 65536.0, 5e5])
def test_two_groups_far_apart(mode, apart, rng):
    x = rng.standard_normal((120, 2))
    x[60:] += apart
    x = x.astype(np.float32)
    assert_right(index_of(mode, np.eye(2), x), x[::7], x)


@EVERY
def test_a_sentinel_row(mode, rng):
    x = rng.standard_normal((200, 3))
    x[17] = 1e9
    x = x.astype(np.float32)
    assert_right(index_of(mode, np.eye(3), x), x[:30], x)


@EVERY
@pytest.mark.parametrize("place", [2.0**15, 2.0**20, 1e9])
def test_a_second_batch_far_away(mode, place, rng):
    first = rng.standard_normal((50, 4)).astype(np.float32)
    second = (rng.standard_normal((50, 4)) + place).astype(np.float32)
    both = np.concatenate([first, second])
    assert_right(index_of(mode, np.eye(4), first, second), second[:9], both)
    # the centre of the first points is far from the next ones
    assert_right(index_of(mode, np.eye(4), second, first), both[::9])


@EVERY
def test_redraw_keeps_every_bit(mode, rng):
    x = (rng.standard_normal((80, 3)) + 1e4).astype(np.float32)
    index = index_of(mode, np.eye(3), x)
    index.insert(x[:20] * np.float32(1e-5))
    before = index.points()
    index.redraw(3)
    np.testing.assert_array_equal(index.points(), before)
    assert_right(index, before[::9])


@EVERY
def test_double_precision_beyond_its_digits(mode, rng):
    x = np.concatenate([np.zeros((9, 4)), np.full((9, 4), 1e9)])
    x += 1e-9 * rng.standard_normal(x.shape)
    queries = x + 1e-9 * rng.standard_normal(x.shape)
    assert_right(index_of(mode, np.eye(4), x), queries, x)


@EVERY
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_queries_that_nearly_are_points(mode, dtype, rng):
    x = rng.lognormal(0, 3, (150, 5)).astype(dtype)
    queries = (x[:40] * (1 + 1e-6 * rng.standard_normal((40, 5)))).astype(dtype)
    assert_right(index_of(mode, rng.standard_normal((4, 5)), x), queries, x)


def test_rows_that_do_not_lead_back_have_their_points_beside(rng):
    # a few entries near zero in columns that are far from it
    x = (rng.standard_normal((400, 6)) + 50).astype(np.float32)
    x[::50, 2] = rng.standard_normal(8) * 1e-3
    index = index_of(Exact(), np.eye(6), x)
    points = index._engine.points
    assert points.center.all()
    assert points.beside.size == 8
    near = x[::50] * np.float32(1 + 1e-6)
    assert_right(index, near, x)
    index.delete([50, 3])
    index.update_points([0], x[100:101])
    assert_right(index, near)


def test_neighbours_of_half_width_are_those_of_the_points_given_back(rng):
    for place in (0.0, 3.0, 1e4, 1e6):
        x = (rng.standard_normal((200, 4)) + place).astype(np.float32)
        index = index_of(Exact(half_width=True), np.eye(4), x)
        assert_right(index, index.points()[:9])
        assert_right(index, x[:9])


def test_an_estimator_of_points_with_a_sentinel(rng):
    x = rng.standard_normal((300, 3))
    x[17] = 1e9
    x = x.astype(np.float32)
    found = MahalanobisNeighbors(6, metric=np.eye(3)).fit(x).kneighbors(x)[1]
    truth = np.argsort(distances(np.eye(3), x, x), axis=1, kind="stable")[:, :6]
    same = [set(a) == set(b) for a, b in zip(found, truth, strict=True)]
    assert np.mean(same) > 0.99


def batch(rng, d, dtype, known):
    """Points of one of the kinds that have gone wrong."""
    n, kind = int(rng.integers(1, 25)), rng.integers(7)
    x = rng.standard_normal((n, d)) * 10.0 ** rng.integers(-3, 3)
    if kind == 1:
        x += 10.0 ** rng.integers(0, 7) * rng.standard_normal(d)
    if kind == 2:
        x[rng.integers(n)] = 10.0 ** rng.integers(3, 10) * rng.choice([-1, 1])
    if kind == 3:
        x = np.repeat(x[: max(1, n // 3)], 3, axis=0)
    if kind == 4:
        x = rng.lognormal(0, 3, (n, d))
    if kind == 5:
        x = 1e-3 * x + 10.0 ** rng.integers(0, 10)
    if kind == 6 and len(known):
        near = known[rng.integers(len(known), size=n)].astype(np.float64)
        x = near * (1 + 10.0 ** rng.integers(-8, -2) * rng.standard_normal((n, d)))
    return x.astype(dtype)


def play(seed):
    """Change an index at random; query it after every change."""
    rng = np.random.default_rng(seed)
    k, d = (int(x) for x in rng.integers(1, 12, 2))
    dtype = (np.float32, np.float64)[seed % 2]
    mode = [*MODES, Exact(half_width=True)][seed // 2 % 6]
    index = index_of(mode, rng.standard_normal((k, d)))
    for _ in range(int(rng.integers(3, 9))):
        names, verb = rng.permutation(index.numbers), rng.integers(8)
        known = index.points() if len(index) else np.empty((0, d))
        if verb <= 2 or not len(index):
            index.insert(batch(rng, d, dtype, known))
        elif verb == 3:
            index.delete(names[: len(names) // 3])
        elif verb == 4:
            x = batch(rng, d, dtype, known)[: len(names)]
            index.update_points(names[: len(x)], x)
        elif verb == 5:
            size = 10.0 ** rng.integers(-3, 2)
            left = size * rng.standard_normal((3, k))
            index.update_metric(left, rng.standard_normal((3, d)))
        elif verb == 6:
            index.redraw(seed)
        else:
            a = rng.standard_normal(k)
            index.update_metric(a, -0.999 * a @ index.factor / (a @ a))
        known = index.points()
        near = known[-2:] * (1 + 1e-7 * rng.standard_normal((min(2, len(known)), d)))
        queries = [batch(rng, d, dtype, known)[:3], known[:2], near]
        assert_right(index, np.concatenate(queries).astype(index.points().dtype))


@pytest.mark.parametrize("first", range(0, 60, 12))
def test_any_sequence_of_hard_points_keeps_its_certificates(first):
    for seed in range(first, first + 12):
        play(seed)


@pytest.mark.slow
def test_many_sequences_of_hard_points_keep_their_certificates():
    # some ten thousand queries
    for seed in range(60, 400):
        play(seed)
