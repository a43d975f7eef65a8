"""MahalanobisIndex: answers of every mode, difficult data, and errors."""

import numpy as np
import pytest

from sketching import Adaptive, Exact, Filter, MahalanobisIndex, MahalanobisMetric
from tests.sketching.mahalanobis_oracle import assert_within, distances

# enough sketches for k = 12 at eps = 0.3, and far fewer failures than one in a test
ADAPTIVE = Adaptive(rows=64, sketches=12, sampled=9)
MODES = {
    "exact": Exact(),
    "filter": Filter(size=4),
    "whole": Filter(size=99),
    "adaptive": ADAPTIVE,
}
EVERY = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def problem(rng, n=300, d=12, k=12, dtype=np.float64):
    """Points and a factor with decaying spectra."""
    x = rng.standard_normal((n, d)) / np.arange(1, d + 1) @ rng.standard_normal((d, d))
    return x.astype(dtype), rng.standard_normal((k, d))


def filled(factor, x, mode, **options):
    index = MahalanobisIndex(
        MahalanobisMetric(factor), mode=mode, eps=0.3, rng=1, **options
    )
    index.insert(x)
    return index


@EVERY
@DTYPES
@pytest.mark.parametrize("k", [12, 5, 20])
def test_query_keeps_its_certificate(mode, dtype, k, rng):
    x, factor = problem(rng, dtype=dtype, k=k)
    q = np.concatenate([x[:5], 3 * rng.standard_normal((20, 12)).astype(dtype)])
    index = filled(factor, x, mode)
    answer = index.query(q)
    assert answer.value.dtype == dtype
    assert answer.plan == mode
    assert_within(answer.certificate, answer.value, distances(factor, q, x))


@EVERY
@DTYPES
def test_kneighbors_are_the_nearest(mode, dtype, rng):
    x, factor = problem(rng, n=500, dtype=dtype)
    q = rng.standard_normal((7, 12)).astype(dtype)
    index = filled(factor, x, mode)
    found, numbers = neighbors = index.kneighbors(q, 9)
    truth = distances(factor, q, x)
    np.testing.assert_array_equal(numbers, np.argsort(truth, axis=1)[:, :9])
    want = np.sort(truth, axis=1)[:, :9]
    np.testing.assert_allclose(found, want, rtol=2e-3 if dtype == np.float32 else 1e-7)
    assert neighbors.examined.shape == (7,)


@EVERY
def test_kneighbors_of_all_points(mode, rng):
    x, factor = problem(rng, n=40)
    found, numbers = filled(factor, x, mode).kneighbors(x[:2], 40)
    np.testing.assert_array_equal(np.sort(numbers), [np.arange(40)] * 2)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-12)


@EVERY
@DTYPES
def test_pairs(mode, dtype, rng):
    x, factor = problem(rng, dtype=dtype)
    index = filled(factor, x, mode)
    got = index.query_pairs([3, 7, 3], [5, 7, 250])
    truth = np.diagonal(distances(factor, x[[3, 7, 3]], x[[5, 7, 250]]))
    assert_within(index.guarantee(), got, truth)
    assert got[1] == 0


@EVERY
@DTYPES
def test_a_small_distance_far_from_the_origin(mode, dtype, rng):
    # the norm form alone answers 0 here
    x, factor = problem(rng, dtype=dtype)
    x += 10
    x[1] = x[0]
    x[1, 0] += dtype(1e-3)
    index = filled(factor, x, mode)
    truth = distances(factor, x[:1], x)
    got = index.query(x[:1]).value
    assert got[0, 0] == 0
    np.testing.assert_allclose(got[0, 1], truth[0, 1], rtol=2e-3)
    assert_within(index.guarantee(), got, truth)


@EVERY
@DTYPES
def test_duplicates_are_at_distance_zero(mode, dtype, rng):
    x, factor = problem(rng, n=30, dtype=dtype)
    x = np.repeat(x + 100, 10, axis=0)
    index = filled(factor, x, mode)
    got = index.query(x[:1]).value
    np.testing.assert_array_equal(got[0, :10], 0)
    found, numbers = index.kneighbors(x[:1], 10)
    np.testing.assert_array_equal(found, 0)
    assert set(numbers[0]) == set(range(10))


@EVERY
def test_all_points_the_same(mode):
    x = np.full((20, 12), 1e8)
    index = filled(np.eye(12), x, mode)
    np.testing.assert_array_equal(index.query(x[:1]).value, 0)
    assert index.kneighbors(x[:1] + 3, 2)[0][0, 0] == pytest.approx(6 * np.sqrt(3))


@DTYPES
def test_a_point_far_beyond_the_others_keeps_their_certificate(dtype, rng):
    x, factor = problem(rng, dtype=dtype)
    x[0] = 1e6
    for mode in MODES.values():
        index = filled(factor, x, mode)
        answer = index.query(x[:3])
        # what centring rounds off is relative to the offset from the mean
        truth = distances(factor, x[:3], x)
        off = np.abs(answer.value - truth)
        rounding = 1e4 * np.finfo(dtype).eps * 64
        assert (off <= float(answer.certificate.error) * truth + rounding).all()


def test_the_filter_looks_at_few_points_where_the_spectrum_decays(rng):
    x = rng.standard_normal((4000, 60)) / np.arange(1, 61) ** 1.5
    index = filled(np.eye(60), x, Filter(size=12))
    found = index.kneighbors(x[:20], 5)
    assert found.examined.max() < 0.05 * len(x)
    assert found.certificate.failure < 1e-12
    np.testing.assert_array_equal(
        found[1], np.argsort(distances(np.eye(60), x[:20], x), axis=1)[:, :5]
    )


def test_adaptive_neighbours_that_estimates_settle(rng):
    x = rng.standard_normal((600, 30)) * np.geomspace(1, 1e-3, 600)[:, None]
    mode = Adaptive(rows=200, sketches=20, sampled=9)
    found = filled(np.eye(30), x, mode).kneighbors(np.zeros((1, 30)), 5)
    assert found.examined[0] < 150
    want = np.argsort(np.linalg.norm(x, axis=1))[:5]
    np.testing.assert_array_equal(found[1][0], want)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        # a metric of low rank: the mapped points are shorter than the points
        (lambda rng: (problem(rng, d=60, k=6), 0.1), Filter),
        # few numbers hold what there is
        (
            lambda rng: (
                (rng.standard_normal((900, 600)) / np.arange(1, 601) ** 2, np.eye(600)),
                0.1,
            ),
            Filter,
        ),
        # a flat spectrum leaves the scan
        (lambda rng: ((rng.standard_normal((300, 200)), np.eye(200)), 0.1), Exact),
        # nor does a loose eps justify sketches that are safe in every direction
        (lambda rng: ((rng.standard_normal((20, 900)), np.eye(900)), 0.6), Exact),
    ],
)
def test_the_mode_is_picked_by_what_it_reads(make, kind, rng):
    (x, factor), eps = make(rng)
    index = MahalanobisIndex(MahalanobisMetric(factor), eps=eps, rng=0)
    assert index.mode is None
    index.insert(x)
    assert isinstance(index.mode, kind)
    assert kind.__name__ in str(index.choice)
    answer = index.query(x[:3])
    assert_within(answer.certificate, answer.value, distances(factor, x[:3], x))
    assert answer.certificate.error <= eps


@pytest.mark.parametrize("mode", [None, Filter(size=8)])
def test_points_that_come_one_by_one_are_served_as_well_as_all_at_once(mode, rng):
    x = rng.standard_normal((700, 60)) / np.arange(1, 61) ** 2
    metric = MahalanobisMetric(np.eye(60))
    once, slowly = (MahalanobisIndex(metric, mode=mode, rng=0) for _ in range(2))
    once.insert(x)
    for start in range(len(x)):
        slowly.insert(x[start : start + 1])
    assert type(slowly.mode) is type(once.mode)
    found, want = (index.kneighbors(x[:30], 5) for index in (slowly, once))
    np.testing.assert_array_equal(found[1], want[1])
    assert found.examined.mean() < 1.5 * want.examined.mean() + 1


def test_points_are_named_by_numbers_that_stay(rng):
    x, factor = problem(rng, n=10)
    index = filled(factor, x, Exact())
    assert index.delete([2, 9]) is index
    np.testing.assert_array_equal(np.sort(index.numbers), [0, 1, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(index.insert(x[:2]), [10, 11])
    index.update_points([3], x[2:3])
    columns = {int(number): i for i, number in enumerate(index.numbers)}
    got = index.query(x[:1]).value[0]
    assert got[columns[10]] == 0
    assert got[columns[3]] == pytest.approx(distances(factor, x[:1], x[2:3])[0, 0])
    assert len(index) == 10


def test_nothing_inserted_and_everything_deleted(rng):
    x, factor = problem(rng, n=4)
    index = filled(factor, x, Exact())
    assert index.insert(x[:0]).shape == (0,)
    index.delete([])
    index.delete(index.numbers)
    assert len(index) == 0
    with pytest.raises(ValueError, match="empty: insert"):
        index.query(x)
    np.testing.assert_array_equal(index.insert(x), [4, 5, 6, 7])
    assert index.query(x[:1]).value[0, 0] == 0


def test_covariance_in_place_of_its_inverse_is_found_out(rng):
    x = rng.standard_normal((50, 4)) * [1, 2, 3, 4]
    covariance = np.cov(x.T)
    wrong = MahalanobisMetric.from_matrix(covariance)
    with pytest.raises(ValueError, match=r"covariance of the points.*from_covariance"):
        MahalanobisIndex(wrong).insert(x)
    for metric in (
        MahalanobisMetric.from_covariance(covariance),
        MahalanobisMetric(wrong.factor),
        MahalanobisMetric.from_matrix(np.linalg.inv(covariance)),
    ):
        assert len(MahalanobisIndex(metric).insert(x)) == 50
    white = MahalanobisMetric.from_data(x).whiten(x)
    # here covariance and inverse are the same
    MahalanobisIndex(MahalanobisMetric.from_matrix(np.cov(white.T))).insert(white)


def index_of_two():
    return filled(np.eye(12), np.eye(2, 12), Exact())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MahalanobisIndex(np.eye(2)), TypeError, "metric: .*from_matrix"),
        (
            lambda: MahalanobisIndex(MahalanobisMetric(np.eye(2)), mode="exact"),
            TypeError,
            "mode: expected Exact",
        ),
        (
            lambda: MahalanobisIndex(MahalanobisMetric(np.eye(2)), eps=1.5),
            ValueError,
            "eps: expected a number below 1",
        ),
        (lambda: Adaptive(sampled=4), ValueError, "sampled: expected an odd number"),
        (lambda: Adaptive(rows=0), ValueError, "rows: "),
        (lambda: Filter(size=0), ValueError, "size: "),
        (
            lambda: index_of_two().insert(np.ones((2, 3))),
            ValueError,
            r"X: expected shape \(n, 12\)",
        ),
        (
            lambda: index_of_two().insert(np.full((1, 12), np.inf)),
            ValueError,
            "X: expected finite numbers",
        ),
        (
            lambda: index_of_two().query(np.full((1, 12), np.nan)),
            ValueError,
            "Q: expected finite numbers",
        ),
        (lambda: index_of_two().query(np.ones(12)), ValueError, "Q: expected shape"),
        (lambda: index_of_two().query(np.ones((0, 12))), ValueError, "Q: .*at least"),
        (
            lambda: index_of_two().insert(np.full((1, 12), 1e160)),
            ValueError,
            "X: squared distances may overflow float64",
        ),
        (
            lambda: filled(np.eye(2), np.full((2, 2), [[1e30], [1]], "f4"), Exact()),
            ValueError,
            "X: squared distances may overflow float32",
        ),
        (
            lambda: index_of_two().query(np.full((1, 12), 1e300)),
            ValueError,
            "Q: squared distances may overflow",
        ),
        (
            lambda: index_of_two().update_metric(0, np.full(12, 1e200)),
            ValueError,
            "a, b: squared distances may overflow",
        ),
        (lambda: index_of_two().delete([2]), ValueError, "there is no point 2"),
        (lambda: index_of_two().delete([-1]), ValueError, "there is no point -1"),
        (lambda: index_of_two().delete([0, 0]), ValueError, "each point once"),
        (lambda: index_of_two().delete([0.5]), TypeError, "numbers: .*integers"),
        (
            lambda: index_of_two().update_points([0], np.ones((2, 12))),
            ValueError,
            "X: expected 1 rows, got 2",
        ),
        (
            lambda: index_of_two().update_metric(np.ones(3), np.ones(12)),
            ValueError,
            "a: expected vectors of 12",
        ),
        (
            lambda: index_of_two().update_metric(0, np.full(12, np.nan)),
            ValueError,
            "b: expected finite",
        ),
        (lambda: index_of_two().query_pairs([0], [0, 1]), ValueError, "j: expected 1"),
        (lambda: index_of_two().kneighbors(np.ones((1, 12)), 3), ValueError, "k: .*2"),
        (lambda: index_of_two().sample(np.ones(12), 0), ValueError, "size: "),
        (lambda: index_of_two().sample(np.ones(12), 1, power=3), ValueError, "power: "),
        (lambda: index_of_two().merge(3), TypeError, "other: "),
        (
            lambda: index_of_two().merge(filled(2 * np.eye(12), np.eye(12), Exact())),
            ValueError,
            "other: .*same metric",
        ),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@EVERY
def test_nbytes_counts_what_is_kept(mode, rng):
    x, factor = problem(rng)
    small, large = (filled(factor, y, mode).nbytes for y in (x[:100], x))
    assert large - small >= 200 * 12 * 8


def test_inputs_are_left_alone(rng):
    x, factor = problem(rng)
    kept, metric = x.copy(), MahalanobisMetric(factor)
    index = MahalanobisIndex(metric, mode=Exact())
    index.insert(x)
    index.update_metric(0, np.ones(12))
    index.query(x[:2])
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(metric.factor, factor)
    assert not np.array_equal(index.metric.factor, factor)
