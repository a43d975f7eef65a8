"""Polynomials of exp are optimal and their bounds hold; sets of monomials are exact."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import chebyshev as cheb
from scipy.optimize import linprog

from fastattn._ops.monomials import means, moments, monomials
from fastattn.methods.polynomial.expansions import (
    LARGEST_BOUND,
    LARGEST_DEGREE,
    by_energy,
    least_degree,
    rank_of,
    relative_minimax,
    taylor,
    total_degree,
    whole_interval_error,
)
from tests import oracles

BOUNDS = (1e-3, 0.5, 1.0, 2.0, 4.0, 8.0)


def linear_program(degree, bound, count=1500):
    """Least largest relative error on a Chebyshev grid, by linear programming."""
    t = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    basis = cheb.chebvander(t, degree) * np.exp(-bound * t)[:, None]
    one = np.ones((count, 1))
    above, below = np.hstack([basis, -one]), np.hstack([-basis, -one])
    cost = np.zeros(degree + 2)
    cost[-1] = 1
    limits = [(None, None)] * (degree + 1) + [(0, None)]
    answer = linprog(
        cost,
        A_ub=np.vstack([above, below]),
        b_ub=np.concatenate([one[:, 0], -one[:, 0]]),
        bounds=limits,
        method="highs",
    )
    return answer.fun


@pytest.mark.parametrize(
    ("degree", "bound"),
    [(1, 0.5), (2, 0.5), (1, 1.0), (3, 1.0), (2, 2.0), (5, 2.0), (4, 4.0), (9, 8.0)],
)
def test_minimax_is_what_linear_programming_finds(degree, bound):
    # errors here are well above the program's own tolerance, 1e-7
    _, error = relative_minimax(degree, bound)
    assert error == pytest.approx(linear_program(degree, bound), rel=0.01)


@pytest.mark.parametrize(
    ("bound", "degree", "error"),
    [(0.5, 1, 6.2e-2), (1, 2, 4.0e-2), (1, 6, 3.0e-6), (2, 8, 5.0e-6), (4, 8, 2.0e-3)],
)
def test_known_errors(bound, degree, error):
    assert relative_minimax(degree, float(bound))[1] == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("bound", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("degree", [1, 3, 6])
def test_minimax_equioscillates(degree, bound):
    coefficients, claimed = relative_minimax(degree, bound)
    x = bound * np.cos(np.linspace(0, np.pi, 40001))
    error = oracles.relative_error_of_exp(coefficients, x)
    runs = np.split(error, np.flatnonzero(np.diff(np.sign(error)) != 0) + 1)
    peaks = np.array([np.abs(run).max() for run in runs], dtype=float)
    assert len(peaks) == degree + 2
    assert peaks.min() > 0.98 * claimed


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("degree", [0, 1, 2, 5, 8, 12, 18, 24])
def test_minimax_error_holds_on_the_whole_interval(degree, bound):
    coefficients, claimed = relative_minimax(degree, bound)
    rng = np.random.default_rng(degree)
    x = bound * np.concatenate(
        [np.cos(np.linspace(0, np.pi, 20001)), rng.uniform(-1, 1, 20000)]
    )
    largest = np.abs(oracles.relative_error_of_exp(coefficients, x)).max()
    assert largest <= claimed


@pytest.mark.parametrize(("degree", "bound"), [(6, 1.0), (12, 4.0), (24, 8.0)])
def test_minimax_error_holds_in_fifty_digits(degree, bound):
    coefficients, claimed = relative_minimax(degree, bound)
    with mpmath.workdps(50):
        powers = [mpmath.mpf(float(c)) for c in coefficients]
        largest = max(
            abs(
                mpmath.fdot(powers, [x**g for g in range(len(powers))]) * mpmath.exp(-x)
                - 1
            )
            for x in (bound * mpmath.cos(mpmath.pi * i / 600) for i in range(601))
        )
    assert largest <= claimed


@given(
    degree=st.integers(0, 24),
    bound=st.floats(1e-3, LARGEST_BOUND),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_interval_error_bounds_any_polynomial(degree, bound, seed):
    # rough coefficients whose extrema fall between the sampled points
    rng = np.random.default_rng(seed)
    coefficients = rng.standard_normal(degree + 1)
    claimed = whole_interval_error(coefficients, bound)
    t = np.cos(np.linspace(0, np.pi, 50001))
    error = cheb.chebval(t, coefficients) * np.exp(-bound * t) - 1
    assert np.abs(error).max() <= claimed * (1 + 1e-12)


@pytest.mark.parametrize("degree", [8, 24])
@pytest.mark.parametrize("bound", [1e-3, 8.0])
def test_whole_interval_error_holds_where_the_grid_is_worst(degree, bound):
    # one Chebyshev polynomial of high degree, its peak moved to mid-cell by its phase
    count = 32 * (degree + 64)
    cell = np.pi / count
    for place in np.linspace(0.1, 3.0, 7):
        phase = (np.round(place / cell) + 1.0) * cell
        k = np.arange(degree + 1)
        coefficients = np.cos(k * phase) / (degree + 1) * 1e3
        claimed = whole_interval_error(coefficients, bound)
        t = np.cos(phase + np.linspace(-2, 2, 2001) * cell)
        error = cheb.chebval(t, coefficients) * np.exp(-bound * t) - 1
        assert np.abs(error).max() <= claimed * (1 + 1e-12)


@pytest.mark.parametrize("bound", [*BOUNDS, 6.375, 7.0, 7.875])
def test_error_falls_with_the_degree_to_what_float64_holds(bound):
    errors = [relative_minimax(g, bound)[1] for g in range(LARGEST_DEGREE + 1)]
    # terms reach exp(bound) and are judged relative to exp(-bound)
    floor = max(np.finfo(float).eps * math.exp(2 * bound) * LARGEST_DEGREE, 1e-13)
    for lower, higher in itertools.pairwise(errors):
        assert higher < max(lower, 10 * floor)


@pytest.mark.parametrize("degree", [2, 5, 9])
def test_error_grows_with_the_bound(degree):
    errors = [relative_minimax(degree, bound)[1] for bound in np.linspace(0.1, 8, 30)]
    assert np.all(np.diff(errors) > 0)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("error", [0.5, 1e-2, 1e-5])
def test_least_degree_is_least(bound, error):
    degree = least_degree(bound, error)
    if degree is None:
        assert relative_minimax(LARGEST_DEGREE, bound)[1] > error
    else:
        assert relative_minimax(degree, bound)[1] <= error
        assert degree == 0 or relative_minimax(degree - 1, bound)[1] > error


def test_no_degree_serves_bounds_beyond_the_largest():
    assert least_degree(LARGEST_BOUND * 1.001, 0.5) is None


def alphas(index, d):
    """The multi-indices that a recipe stands for."""
    rows = [(0,) * d]
    for parent, coordinate in zip(index.parent[1:], index.coordinate[1:], strict=True):
        alpha = list(rows[parent])
        alpha[coordinate] += 1
        rows.append(tuple(alpha))
    return rows


sets = st.tuples(
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(1, 150),
    st.integers(0, 2**32 - 1),
)


def energy_set(d, degree, rank, seed):
    scales = np.sort(np.random.default_rng(seed).exponential(size=d))[::-1]
    return by_energy(scales, taylor(degree), rank)


@given(sets)
def test_by_energy_has_distinct_members_with_parents_first(problem):
    d, degree, rank, _ = problem
    index = energy_set(*problem)
    rows = alphas(index, d)
    assert len(index) == min(rank, rank_of(d, degree))
    assert len(set(rows)) == len(rows)
    assert np.all(index.parent[1:] < np.arange(1, len(index)))
    assert [sum(a) for a in rows] == index.degree.tolist()
    np.testing.assert_allclose(
        index.multiplicity, [oracles.multinomial(a) for a in rows]
    )


@given(sets)
def test_every_prefix_is_closed_under_parents(problem):
    index = energy_set(*problem)
    for rank in range(1, len(index) + 1):
        prefix = index.prefix(rank)
        assert len(prefix) == rank
        assert np.all(prefix.parent < rank)


@given(sets)
def test_a_longer_set_starts_with_the_shorter(problem):
    d, degree, rank, seed = problem
    short, long = energy_set(*problem), energy_set(d, degree, 2 * rank, seed)
    # equal energies may be ordered either way: compare as sets of multi-indices
    missing = set(alphas(short, d)) - set(alphas(long, d))
    assert not missing


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_total_degree_is_every_multi_index(d, degree):
    index = total_degree(d, degree)
    rows = alphas(index, d)
    assert len(rows) == rank_of(d, degree) == math.comb(d + degree, degree)
    assert set(rows) == oracles.exponents(d, degree)
    assert np.all(np.diff(index.degree) >= 0)


@given(d=st.integers(1, 5), degree=st.integers(0, 6), seed=st.integers(0, 2**32 - 1))
def test_polynomial_of_a_product_is_a_sum_of_products(d, degree, seed):
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(-1, 1, (2, 7, d))
    coefficients = rng.standard_normal(degree + 1)
    index = total_degree(d, degree)
    left, right = (
        monomials(x, parent=index.parent, coordinate=index.coordinate) for x in (u, v)
    )
    got = (left * index.weights(coefficients)) @ right.T
    want = oracles.polynomial(coefficients, u @ v.T)
    reach = float(d) ** np.arange(degree + 1) @ np.abs(coefficients)
    np.testing.assert_allclose(got, want.astype(float), rtol=0, atol=1e-13 * reach)


@given(sets)
def test_all_of_by_energy_is_the_total_degree_set(problem):
    d, degree, _, seed = problem
    index = energy_set(d, degree, rank_of(d, degree), seed)
    assert set(alphas(index, d)) == oracles.exponents(d, degree)


def test_energy_prefers_the_long_coordinates():
    index = by_energy(np.array([1.0, 1e-3]), taylor(4), 4)
    assert alphas(index, 2) == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize("degree", [0, 1, 10, 24])
def test_taylor_has_reciprocal_factorials(degree):
    want = [1 / math.factorial(g) for g in range(degree + 1)]
    np.testing.assert_array_equal(taylor(degree), want)


@pytest.mark.parametrize(
    ("degree", "bound"), [(22, 6.375), (21, 7.0), (22, 7.125), (20, 7.875), (20, 8.0)]
)
def test_an_exchange_lost_to_rounding_falls_back(degree, bound):
    _, before = relative_minimax(degree - 1, bound)
    coefficients, error = relative_minimax(degree, bound)
    assert error <= before
    assert coefficients.shape == (degree + 1,)
    x = np.linspace(-bound, bound, 5001)
    assert np.abs(oracles.relative_error_of_exp(coefficients, x)).max() <= error


def test_degrees_beyond_the_largest_are_padded():
    most, error = relative_minimax(LARGEST_DEGREE, 2.0)
    coefficients, claimed = relative_minimax(500, 2.0)
    assert claimed == error
    assert coefficients.shape == (501,)
    np.testing.assert_array_equal(coefficients[: LARGEST_DEGREE + 1], most)
    assert not coefficients[LARGEST_DEGREE + 1 :].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e200])
@pytest.mark.parametrize("coefficients", [taylor(300), np.zeros(9), np.eye(9)[4]])
def test_energy_of_coefficients_that_vanish(scale, coefficients):
    index = by_energy(np.array([scale]), coefficients, 200)
    assert len(index) == min(len(coefficients), LARGEST_DEGREE + 1)
    assert index.degree.max() == len(index) - 1


@pytest.mark.filterwarnings("error")
def test_sums_that_overflow_are_flagged_without_warnings():
    index = total_degree(2, 6)
    x = np.random.default_rng(0).standard_normal((600, 2)).astype(np.float32) * 1e8
    zero, one = np.zeros(2, np.float32), np.eye(2, dtype=np.float32)
    op_arguments = {"parent": index.parent, "coordinate": index.coordinate}
    sums = moments(x, x, zero, one, one[0], zero, **op_arguments)
    assert not np.isfinite(sums).all()
    _, total = means(x, zero, one, sums, zero, **op_arguments)
    assert not np.isfinite(total).any()
