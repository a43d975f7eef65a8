"""MahalanobisMetric: ways in, updates, and errors that say what was confused."""

import numpy as np
import pytest
from sklearn.covariance import OAS, LedoitWolf

from sketching import MahalanobisMetric


def covariance_of(rng, d, rank=None):
    factor = rng.standard_normal((d, d if rank is None else rank))
    return factor @ factor.T


def test_distance_is_the_root_of_the_quadratic_form(rng):
    a, (x, y) = covariance_of(rng, 6), rng.standard_normal((2, 5, 6))
    want = np.sqrt(np.einsum("ni,ij,nj->n", x - y, a, x - y))
    np.testing.assert_allclose(MahalanobisMetric.from_matrix(a).distances(x, y), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_from_matrix_keeps_the_rank_of_what_was_computed_in_either_precision(
    rng, dtype
):
    a = covariance_of(rng, 9, rank=3).astype(dtype)
    metric = MahalanobisMetric.from_matrix(a)
    assert metric.shape == (3, 9)
    np.testing.assert_allclose(
        metric.matrix, a, atol=4e-5 if dtype is np.float32 else 1e-12
    )


def test_from_covariance_whitens(rng):
    covariance = covariance_of(rng, 5)
    factor = MahalanobisMetric.from_covariance(covariance).factor
    np.testing.assert_allclose(factor @ covariance @ factor.T, np.eye(5), atol=1e-9)


def test_from_data_gives_points_unit_covariance(rng):
    x = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + 7
    white = MahalanobisMetric.from_data(x).whiten(x)
    np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=1e-9)


def test_ridge_is_added_to_the_covariance(rng):
    x = rng.standard_normal((4, 6))
    metric = MahalanobisMetric.from_data(x, ridge=0.5)
    want = np.linalg.inv(np.cov(x.T) + 0.5 * np.eye(6))
    np.testing.assert_allclose(metric.matrix, want)


@pytest.mark.parametrize(
    ("rule", "estimator"), [("ledoit-wolf", LedoitWolf), ("oas", OAS)]
)
def test_shrinkage_is_that_of_scikit_learn(rng, rule, estimator):
    x = rng.standard_normal((12, 8)) * np.arange(1, 9)
    metric = MahalanobisMetric.from_data(x, shrinkage=rule)
    np.testing.assert_allclose(metric.matrix, estimator().fit(x).precision_)


def test_shrinkage_by_a_share(rng):
    x = rng.standard_normal((20, 4))
    covariance = np.cov(x.T)
    mixed = 0.7 * covariance + 0.3 * np.trace(covariance) / 4 * np.eye(4)
    metric = MahalanobisMetric.from_data(x, shrinkage=0.3)
    np.testing.assert_allclose(metric.matrix, np.linalg.inv(mixed))


def test_updates_of_rank_one_of_a_row_and_of_a_batch(rng):
    factor = rng.standard_normal((3, 5))
    left, right = rng.standard_normal((4, 3)), rng.standard_normal((4, 5))
    one_by_one, batch = MahalanobisMetric(factor), MahalanobisMetric(factor)
    for a, b in zip(left, right, strict=True):
        assert one_by_one.update(a, b) is one_by_one
    np.testing.assert_allclose(
        batch.update(left, right).factor, factor + left.T @ right
    )
    np.testing.assert_allclose(one_by_one.factor, batch.factor)
    row = MahalanobisMetric(factor).update(1, right[0]).factor
    np.testing.assert_array_equal(row[1], factor[1] + right[0])
    np.testing.assert_array_equal(row[[0, 2]], factor[[0, 2]])
    np.testing.assert_array_equal(
        MahalanobisMetric(factor).update(-1, right[0]).factor[2], factor[2] + right[0]
    )


def test_the_factor_is_the_metrics_own(rng):
    factor = rng.standard_normal((2, 2))
    kept = factor.copy()
    metric = MahalanobisMetric(factor)
    other = metric.copy().update(0, np.ones(2))
    factor[:] = 0
    np.testing.assert_array_equal(metric.factor, kept)
    assert not np.array_equal(other.factor, kept)
    with pytest.raises(ValueError, match="read-only"):
        metric.factor[0, 0] = 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MahalanobisMetric([[np.nan, 1.0]]), r"factor: .*NaN.*\(0, 0\)"),
        (lambda: MahalanobisMetric(np.ones(3)), r"factor: .*matrix.*\(3,\)"),
        (lambda: MahalanobisMetric(np.ones((0, 3))), "factor: expected a non-empty"),
        (
            lambda: MahalanobisMetric.from_matrix(np.diag([1.0, -0.5])),
            r"semidefinite.*eigenvalue -0\.5",
        ),
        (
            lambda: MahalanobisMetric.from_matrix([[1.0, 2.0], [0.0, 1.0]]),
            "symmetric.*by 2",
        ),
        (lambda: MahalanobisMetric.from_matrix(np.zeros((2, 2))), "not zero"),
        (lambda: MahalanobisMetric.from_matrix(np.ones((2, 3))), "square"),
        (
            lambda: MahalanobisMetric.from_covariance(np.ones((3, 3))),
            "2 of its 3 eigenvalues.*ridge",
        ),
        (lambda: MahalanobisMetric.from_data(np.ones((5, 2))), "ridge"),
        (lambda: MahalanobisMetric.from_data(np.ones((1, 2))), "at least 2 points"),
        (
            lambda: MahalanobisMetric.from_data(np.eye(3), shrinkage=2.0),
            "shrinkage: expected a share of at most 1",
        ),
        (
            lambda: MahalanobisMetric.from_data(np.eye(3), shrinkage="oracle"),
            "shrinkage: .*'oas'",
        ),
        (lambda: MahalanobisMetric(np.eye(2)).update(2, np.ones(2)), "below 2, got 2"),
        (
            lambda: MahalanobisMetric(np.eye(2)).update(np.ones(3), np.ones(2)),
            "a: expected vectors of 2",
        ),
        (
            lambda: MahalanobisMetric(np.eye(2)).update(np.ones((2, 2)), np.ones(2)),
            "b: expected a non-empty matrix",
        ),
        (
            lambda: MahalanobisMetric(np.eye(2)).update(
                np.ones((2, 2)), np.ones((3, 2))
            ),
            "b: expected 2 vectors",
        ),
        (
            lambda: MahalanobisMetric(np.eye(2)).whiten(np.ones((4, 3))),
            r"X: expected shape \(n, 2\)",
        ),
        (
            lambda: MahalanobisMetric(np.eye(2)).distances(np.eye(2), np.ones((3, 2))),
            "Y: expected 2 rows",
        ),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match="factor: expected real numbers"):
        MahalanobisMetric(np.ones((2, 2)) * 1j)
    with pytest.raises(TypeError, match="X: expected real numbers"):
        MahalanobisMetric(np.eye(2)).whiten(np.ones((2, 2)) * 1j)


def columns_in_units(rng):
    """Points with correlated columns whose units differ by eight digits."""
    x = rng.standard_normal((400, 3))
    x[:, 1] += 0.9 * x[:, 0]
    return x, np.array([1.0, 1e8, 1e-4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distances_do_not_depend_on_the_units_of_columns(rng, dtype):
    x, units = columns_in_units(rng)
    covariance = np.cov(x, rowvar=False)
    want = MahalanobisMetric.from_covariance(covariance).distances(x[:9], x[9:18])
    scaled = x * units
    inverse = (np.linalg.inv(covariance) / units / units[:, None]).astype(dtype)
    given = (covariance * units * units[:, None]).astype(dtype)
    for metric in (
        MahalanobisMetric.from_matrix(inverse),
        MahalanobisMetric.from_covariance(given),
        MahalanobisMetric.from_data(scaled),
    ):
        assert metric.shape == (3, 3)
        assert not metric.dropped.size
        got = metric.distances(scaled[:9], scaled[9:18])
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_what_is_dropped_is_said(rng):
    a = covariance_of(rng, 9, rank=3)
    metric = MahalanobisMetric.from_matrix(a)
    assert len(metric.dropped) == 6
    assert np.abs(metric.dropped).max() < 1e-14
    assert "6 eigenvalues dropped" in repr(metric)
    np.testing.assert_array_equal(metric.copy().dropped, metric.dropped)


def test_columns_that_depend_on_each_other_are_singular_in_any_units(rng):
    x, units = columns_in_units(rng)
    x[:, 2] = x[:, 0] - 2 * x[:, 1]
    with pytest.raises(ValueError, match="1 of its 3 eigenvalues are zero"):
        MahalanobisMetric.from_data(x * units)
    with pytest.raises(ValueError, match="no inverse"):
        MahalanobisMetric.from_covariance(np.diag([1.0, 0.0]))


def test_a_negative_eigenvalue_of_small_units_is_found():
    # the largest entry would hide it
    a = np.array([[1e12, 0, 0], [0, 1, 2], [0, 2, 1.0]])
    with pytest.raises(ValueError, match="positive semidefinite"):
        MahalanobisMetric.from_matrix(a)


def test_a_covariance_in_other_units_is_not_taken_for_the_metric(rng):
    # one column decides the norms, the others differ
    x = rng.standard_normal((500, 3)) * [1e6, 1.0, 1.0]
    a = np.cov(x, rowvar=False)
    a[1:, 1:] = [[5.0, 1.0], [1.0, 7.0]]
    a[0, 1:] = a[1:, 0] = 0
    MahalanobisMetric.from_matrix(a).refuse_covariance_of(x)
