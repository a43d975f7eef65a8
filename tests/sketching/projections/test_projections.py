"""Projections: lengths, adjoints, array libraries, and the fast transform."""

import numpy as np
import pytest
from scipy.linalg import hadamard as hadamard_matrix

from sketching import GaussianProjection, HadamardProjection, SparseProjection
from sketching._ops.hadamard import hadamard
from sketching._ops.scatter import scatter_columns
from tests.chance import assert_fails_rarely

DRAWS = {
    "gaussian": GaussianProjection.draw,
    "achlioptas": SparseProjection.draw,
    "count sketch": lambda d, **k: SparseProjection.draw(d, nonzeros=1, **k),
    "osnap": lambda d, **k: SparseProjection.draw(d, nonzeros=4, **k),
    "hadamard": HadamardProjection.draw,
}
EVERY = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@EVERY
def test_adjoint_is_the_transpose(xp, draw, rng):
    x, y = xp.asarrays(rng.standard_normal((3, 37)), rng.standard_normal((3, 24)))
    projection = draw(37, size=24, rng=1)
    forward, back = projection.apply(x), projection.adjoint(y)
    assert isinstance(back, xp.array_type)
    assert tuple(forward.shape) == (3, 24)
    left, right = (np.asarray(z).sum(axis=1) for z in (forward * y, x * back))
    np.testing.assert_allclose(left, right, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batches_and_dtypes_are_kept(draw, dtype, rng):
    x = rng.standard_normal((2, 3, 20)).astype(dtype)
    projection = draw(20, size=16, rng=1)
    got = projection.apply(x)
    assert got.dtype == dtype
    assert projection.adjoint(got).dtype == dtype
    np.testing.assert_allclose(got[1, 2], projection.apply(x[1, 2:])[0], rtol=1e-5)


@EVERY
def test_squares_of_lengths_are_right_on_average_with_the_variance_of_gaussians(draw):
    x, size, trials = np.random.default_rng(1).standard_normal((1, 64)), 32, 3000
    x /= np.linalg.norm(x)
    streams = np.random.default_rng(0).spawn(trials)
    squares = [(draw(64, size=size, rng=s).apply(x) ** 2).sum() for s in streams]
    # five deviations of the mean, and of the variance of about chi-squared numbers
    assert abs(np.mean(squares) - 1) < 5 * np.sqrt(2 / size / trials)
    assert np.var(squares) < 2 / size * (1 + 5 * np.sqrt((2 + 12 / size) / trials))


@EVERY
def test_size_keeps_every_length(draw):
    n, eps, delta = 40, 0.3, 0.1
    kind = SparseProjection if draw is DRAWS["achlioptas"] else GaussianProjection
    size = kind.size_for(n, eps=eps, delta=delta)
    x = np.random.default_rng(2).standard_normal((n, 512))
    truth = np.linalg.norm(x, axis=1)

    def keeps(rng):
        got = np.linalg.norm(draw(512, size=size, rng=rng).apply(x), axis=1)
        return bool(np.all(np.abs(got / truth - 1) <= eps))

    assert_fails_rarely(keeps, failure=delta)


def test_gaussian_size_is_least():
    from scipy.stats import chi2

    size = GaussianProjection.size_for(50_000, eps=0.1)
    failure = [chi2.cdf(m * 0.81, m) + chi2.sf(m * 1.21, m) for m in (size - 1, size)]
    assert failure[1] <= 0.01 / 50_000 < failure[0]


@pytest.mark.parametrize("nonzeros", [1, 3, 24])
def test_a_column_of_a_sparse_projection_has_distinct_places_and_length_one(nonzeros):
    matrix = SparseProjection.draw(50, size=24, nonzeros=nonzeros, rng=0).apply(
        np.eye(50)
    )
    np.testing.assert_array_equal((matrix != 0).sum(axis=1), nonzeros)
    np.testing.assert_allclose((matrix**2).sum(axis=1), 1)


def test_density_of_a_sparse_projection():
    matrix = SparseProjection.draw(400, size=100, density=0.2, rng=0).apply(np.eye(400))
    # five deviations of the share of 40000 entries
    assert abs((matrix != 0).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 40_000)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 2, 4, 8, 64, 512])
@pytest.mark.parametrize("place", [None, "cpu"])
def test_hadamard_is_the_matrix(place, d, dtype, rng):
    x = rng.standard_normal((5, d)).astype(dtype)
    got = hadamard.kernel(place)(x)
    assert got.dtype == dtype
    slack = 16 * np.finfo(dtype).eps * np.abs(x).sum()
    np.testing.assert_allclose(got, x @ hadamard_matrix(d), atol=slack, rtol=0)


def test_hadamard_leaves_its_argument_alone(rng):
    x = rng.standard_normal((3, 8))
    kept = x.copy()
    hadamard(x)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("place", [None, "cpu"])
def test_scatter_adds_where_places_coincide(place):
    x, places = np.array([[1.0, 10.0]]), np.array([[0, 0], [2, 0]])
    weights = np.array([[1.0, 2.0], [1.0, -1.0]])
    got = scatter_columns.kernel(place)(x, places, weights, size=3)
    np.testing.assert_array_equal(got, [[3.0 - 10.0, 0.0, 10.0]])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: HadamardProjection.draw(5, size=9), "size: expected at most 8"),
        (lambda: SparseProjection.draw(5, size=3, nonzeros=4), "at most 3, got 4"),
        (lambda: SparseProjection.draw(5, size=3, density=1.5), "density"),
        (lambda: GaussianProjection.draw(5, size=0), "size: .*>= 1"),
        (lambda: GaussianProjection.size_for(5, eps=1.0), "eps: .*below 1"),
        (lambda: SparseProjection.size_for(5, eps=0.1, delta=0.0), "delta: .*above 0"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
