"""Tensor attention attacked: extreme entries, heavy tails, sums that cancel."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from fastattn import (
    Exact,
    PathAttention,
    Polynomial,
    RefusalError,
    StrassenAttention,
    TensorWindow,
    approximate,
)
from fastattn.methods.polynomial.expansions import relative_minimax
from fastattn.tensor.degree_search import sampled_expansion
from fastattn.tensor.polynomial import shifted
from fastattn.tensor.problem import TensorHead
from fastattn.tensor.sampled import certify_few_rows, certify_tuples
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.laws import DTYPES

METHODS = [Exact(), Polynomial(), None]
GUARANTEES = ["proven", "sampled"]


def problem(lengths=(7, 6, 5), n=4, d=3, p=2, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    query, *keys = (rng.uniform(-1, 1, (m, d)).astype(dtype) for m in (n, *lengths))
    values = tuple(rng.uniform(0, 1, (m, p)).astype(dtype) for m in lengths)
    return query, tuple(keys), values


def times(arrays, factors):
    """Multiply arrays by powers of two, which rounds nothing."""
    return tuple(
        x * np.ldexp(x.dtype.type(1), power)
        for x, power in zip(arrays, factors, strict=True)
    )


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("dtype", "power"), [(np.float32, 80), (np.float64, 700)])
def test_products_that_leave_the_range_on_the_way_are_right(
    dtype, power, method, guarantee
):
    # query and first keys underflow together, the answer is that of the plain inputs
    inputs = query, keys, values = problem(dtype=dtype)
    (query,) = times((query,), (-power,))
    keys = times(keys, (-power, power, power))
    values = times(values, (-power, -power // 4, power + power // 4))
    answer = approximate(query, keys, values, method=method, guarantee=guarantee, rng=0)
    truth, normalizer = oracles.tensor_attention(*inputs)
    error = oracles.error_in(answer.certificate.norm, answer.value, truth)
    assert error <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, normalizer, atol=5e-2)


@pytest.mark.parametrize("power", [-600, 600])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_values_of_any_size_are_served(method, power):
    inputs = query, keys, values = problem((20, 30), n=40)
    scaled = times(values, (power, 0))
    answer = approximate(query, keys, scaled, method=method, rng=0)
    truth, _ = oracles.tensor_attention(*inputs)
    (value,) = times((answer.value,), (-power,))
    assert oracles.frobenius_error(value, truth) <= answer.certificate.error <= 1e-2


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_zeros_are_averaged_to_zeros(method, guarantee):
    query, keys, values = problem((20, 30), n=10)
    zeros = (values[0] * 0, values[1])
    answer = approximate(query, keys, zeros, method=method, guarantee=guarantee, rng=0)
    np.testing.assert_array_equal(answer.value, 0)


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize(
    "method",
    [*METHODS, TensorWindow((2, 2)), StrassenAttention(), PathAttention()],
    ids=str,
)
def test_products_too_large_for_the_dtype_are_refused(method, guarantee):
    query, keys, values = problem((5, 5), n=5, dtype=np.float16)
    # each is a float16, their products are not
    loud = tuple(np.full_like(x, 300.0) for x in values)
    with pytest.raises(RefusalError):
        approximate(query, keys, loud, tol=0.1, method=method, guarantee=guarantee)


@pytest.mark.parametrize("method", [StrassenAttention(), PathAttention()], ids=str)
def test_half_precision_is_stored_to_its_own_size(method):
    # values of mean 0: answers far smaller than the products they average
    query, keys, values = problem((60, 60), n=60, dtype=np.float16)
    values = tuple((x - np.float16(0.5)) * 2 for x in values)
    answer = approximate(query, keys, values, tol=1e-2, method=method, rng=0)
    assert answer.certificate.error <= 1e-2
    # relative to the largest product a half is off by more than that
    norm = np.linalg.norm(answer.value.astype(np.float64)) / answer.value.size**0.5
    assert np.finfo(np.float16).eps / 2 / norm > 1e-2


@pytest.mark.parametrize("center", [0.5, -3.0, 40.0])
def test_shifted_coefficients_are_rounded_once(center):
    coefficients, _ = relative_minimax(10, 2.0)
    got = shifted(coefficients, center)
    assert len(got) == len(coefficients)
    # at a point of the interval, in exact arithmetic
    x = Fraction(1.25)
    want = sum(Fraction(float(c)) * x**i for i, c in enumerate(coefficients))
    at = x + Fraction(center)
    terms = [Fraction(float(c)) * at**i for i, c in enumerate(got)]
    slack = sum(map(abs, terms)) * Fraction(2) ** -53
    assert abs(sum(terms) - want) <= slack


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancelling_sums_are_certified_or_refused(dtype):
    # logits around 12: monomials cancel to a small part of their size
    rng = np.random.default_rng(0)
    query = np.ones((40, 3), dtype)
    keys = tuple((1 + 0.02 * rng.uniform(0, 1, (40, 3))).astype(dtype) for _ in "ab")
    values = tuple(rng.uniform(-1, 1, (40, 2)).astype(dtype) for _ in "ab")
    inputs = query, keys, values
    answer = approximate(*inputs, scale=4.0, tol=1e-4, method=Polynomial(), rng=0)
    truth, _ = oracles.tensor_attention(*inputs, scale=4.0)
    error = oracles.frobenius_error(answer.value, truth)
    assert error <= answer.certificate.error <= 1e-4


def heavy(rng, kind):
    """Entries far from bounded, or one tuple that outweighs many."""
    m, d = 150, int(rng.integers(2, 5))
    if kind == "cubed":
        query, *keys = 0.05 * rng.standard_normal((3, m, d)) ** 3
        values = tuple(rng.standard_normal((2, m, 2)) ** 3)
    elif kind == "student":
        query, *keys = 0.07 * rng.standard_t(2, (3, m, d))
        values = tuple(rng.standard_t(2, (2, m, 2)))
    else:
        query, *keys = rng.uniform(0, 1, (3, m, d))
        values = tuple(rng.uniform(0, 1, (2, m, 2)))
        for key, value in zip(keys, values, strict=True):
            key[3], value[3] = 2.2, 30.0
    return query, tuple(keys), values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("cubed", Polynomial(degree=2)),
        ("student", Polynomial(degree=4, rank=30)),
        ("outlier", Polynomial()),
    ],
    ids=str,
)
def test_sampled_promises_are_kept_under_heavy_tails(kind, method):
    def kept(rng):
        inputs = heavy(rng, kind)
        try:
            answer = approximate(*inputs, tol=3e-2, method=method, rng=rng)
        except RefusalError:
            return None
        truth, _ = oracles.tensor_attention(*inputs)
        error = oracles.frobenius_error(answer.value, truth)
        return 0 <= error <= answer.certificate.error <= 3e-2

    assert_fails_rarely(kept, failure=0.05, trials=24, answers=20)


def test_weights_that_may_not_add_up_certify_nothing():
    # weights half as large again as exp, and a log-sum-exp that is too low: corrected,
    # the mean weight is negative, which once made a certificate of -1
    query, keys, values = problem((60, 50), n=20)
    head = TensorHead(query, keys, values, 0.25)
    rng = np.random.default_rng(0)
    expansion = sampled_expansion(head, Polynomial(degree=3), 1e-2, rng)
    value, normalizer, _ = expansion.answer(head)
    wrong = replace(expansion, coefficients=1.5 * expansion.coefficients)
    found = certify_tuples(head, wrong, value, normalizer - 2.0, rng)
    assert found.upper == np.inf


def test_sampled_rows_that_underflow_are_no_truth():
    # products of values below the least float64: exact rows are zero as well
    rng = np.random.default_rng(0)
    query, *keys = rng.standard_normal((3, 5, 4))
    values = 1e-188 * rng.random((5, 2)), 1e-161 * rng.random((5, 2))
    with pytest.raises(RefusalError, match="the answer underflows"):
        approximate(query, tuple(keys), values, tol=0.1, method=Exact(), rng=0)


@pytest.mark.parametrize("certify", ["tuples", "rows"])
def test_outputs_that_underflow_are_certified_as_rounded(certify):
    # sampled tuples and rows are in float64, where these outputs do not underflow
    query, keys, _ = problem((7, 6), n=20, dtype=np.float32)
    values = (1e-22 * np.random.default_rng(1).uniform(1, 2, (2, 7, 2))).astype("f4")
    values = values[0], values[1][:6]
    head = TensorHead(query, keys, values, 1.0)
    rng = np.random.default_rng(0)
    expansion = sampled_expansion(head, Polynomial(degree=3), 1e-2, rng)
    value, normalizer = head.finish(*head.attend(np.float64))
    if certify == "tuples":
        found = certify_tuples(head, expansion, value, normalizer, rng)
    else:
        found = certify_few_rows(head, expansion, value, 16, 1e-2, rng)
    exact = oracles.tensor_attention(query, keys, values, scale=1.0)[0]
    error = np.linalg.norm(value - exact) / np.linalg.norm(exact)
    assert 0.01 < error <= found.upper
