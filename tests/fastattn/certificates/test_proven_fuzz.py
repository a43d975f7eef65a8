"""Proven certificates attacked with numbers of extreme size, within one array too."""

import numpy as np
import pytest
from array_api_strict import asarray as strict

import fastattn
from benches import proven_fuzz, rational
from fastattn import Exact, Polynomial, RefusalError, StrassenAttention, approximate
from fastattn.certificates.rounding import frobenius, half_range, largest_norm
from fastattn.prepared.proven import RowBounds

PROVEN = {"guarantee": "proven", "rng": 0}


@pytest.mark.parametrize("part", range(8))
def test_no_proven_answer_is_beyond_its_certificate(part):
    tally = proven_fuzz.Tally()
    for seed in range(60 * part, 60 * (part + 1)):
        proven_fuzz.judge(proven_fuzz.draw(seed), tally, seed)
    assert tally.proven > 20
    assert tally.beyond == tally.logarithms_beyond == []


def test_study_counts_what_is_proven():
    rows = proven_fuzz.proven_fuzz(quick=True, count=20)
    assert sum(row["proven answers"] for row in rows) == 20
    assert sum(row["beyond"] + row["log-sum-exps beyond"] for row in rows) == 0


def test_oracle_is_softmax_where_float64_is_enough(rng):
    query, key, value = rng.standard_normal((3, 4, 5))
    seen = rng.random((4, 4)) < 0.7
    seen[0] = False
    out, normalizer = rational.attention(query, key, value, 0.3, seen)
    weights = np.where(seen, np.exp(0.3 * query @ key.T), 0)
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(normalizer.astype(float), np.log(total), rtol=1e-13)
    total = np.where(total == 0, 1, total)[:, None]
    np.testing.assert_allclose(out.astype(float), weights @ value / total, rtol=1e-13)


@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e30), ("float64", 1e200)])
@pytest.mark.parametrize("make", [np.asarray, strict])
@pytest.mark.parametrize("guarantee", ["proven", "sampled"])
@pytest.mark.parametrize("p", [2, 8])
@pytest.mark.parametrize("m", [1, 2, 100])
def test_equal_values_are_their_mean_whatever_the_logits(
    m, p, guarantee, make, dtype, large
):
    # every logit is beyond the dtype: weights were made of infinities
    query, key = (make(np.full((n, 4), large, dtype)) for n in (3, m))
    value = make(np.ones((m, p), dtype))
    answer = approximate(query, key, value, guarantee=guarantee, rng=0)
    error = np.abs(np.asarray(answer.value) - 1).max()
    assert error <= answer.certificate.error < 1e-4


@pytest.mark.parametrize("sign", [1, -1])
def test_row_of_one_visible_key_is_its_value_whatever_the_logit(sign):
    query = np.full((3, 4), sign * 1e200)
    key, value = np.full((5, 4), 1e200), np.arange(10.0).reshape(5, 2)
    mask = np.arange(5) == 3
    answer = approximate(query, key, value, key_mask=mask, **PROVEN)
    np.testing.assert_allclose(answer.value, [[6.0, 7.0]] * 3, rtol=1e-14)
    assert answer.certificate.error < 1e-13


@pytest.mark.parametrize("method", [None, Exact()])
@pytest.mark.parametrize("p", [1, 8])
@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e25), ("float64", 1e200)])
def test_terms_of_a_logit_that_overflow_and_cancel(rng, dtype, large, p, method):
    # in one row logits are 0 and -1; their terms of 1e50 added up to -infinity, and no
    # sample of rows has to meet it
    query = rng.standard_normal((4000, 3)).astype(dtype)
    query[:, :2] = 0
    query[1234] = large, large, 1
    key = np.array([[-large, large, 0], [-large, large, -1]], dtype)
    value = np.array([[0.0] * p, [1.0] * p], dtype)
    with pytest.raises(RefusalError, match="logits or sums overflow"):
        approximate(query, key, value, scale=1.0, method=method, rng=0)


def test_log_sum_exp_below_the_dtype_is_not_that_of_a_row_without_keys():
    query, key = np.full((2, 1), -1e30, np.float32), np.full((3, 1), 1e30, np.float32)
    value = np.ones((3, 1), np.float32)
    for method in (Exact(), Polynomial()):
        answer = approximate(query, key, value, method=method, **PROVEN)
        assert np.all(answer.log_normalizer == np.finfo(np.float32).min)
        merged = fastattn.merge_answers([answer, answer])
        assert np.abs(merged.value - 1).max() <= merged.certificate.error < 1e-5


def judged(query, key, value, *, scale=1.0, **options):
    """The error of an answer, from exact logits, and its certificate."""
    seen = np.ones((len(query), len(key)), bool)
    if options.get("is_causal"):
        seen &= np.arange(len(key)) <= np.arange(len(query))[:, None]
    truth, _ = rational.attention(query, key, value, scale, seen)
    answer = approximate(query, key, value, scale=scale, **options)
    error = np.abs(answer.value.astype(np.longdouble) - truth).max()
    return error, answer.certificate.error


def proven_or_refused(*arrays, **options):
    """Assert that a certificate holds, where there is one."""
    try:
        error, certified = judged(*arrays, method=Polynomial(), **PROVEN, **options)
    except RefusalError:
        return False
    assert error <= certified
    return True


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_monomials_of_small_keys_times_small_values_do_not_underflow(rng, dtype):
    # squares of coordinates of 1e-13 times values of 1e-23 were lost in float32
    power = 13 if dtype == np.float32 else 100
    query, key = (
        (rng.uniform(-1, 1, (9, 1)) * 10.0**x).astype(dtype) for x in (power, -power)
    )
    value = (rng.uniform(-1, 1, (9, 2)) * 10.0 ** (-2 * power)).astype(dtype)
    assert proven_or_refused(query, key, value, tol=1e-2)
    assert proven_or_refused(query, key, value, tol=0.1, is_causal=True)


def test_keys_that_overflow_once_centred_are_no_less_refused():
    query = np.full((5, 2), 5.5e-39, np.float32)
    key = np.array([[1, 1], [1, -1], [-0.1, 1], [-1, -1]], np.float32) * 3.4e38
    value = np.arange(8, dtype=np.float32).reshape(4, 2)
    proven_or_refused(query, key, value, tol=0.5)


def test_tilt_whose_square_underflows_still_counts():
    query = np.full((9, 1), 6.5e-210)
    key = np.linspace(-5e211, 4e211, 9)[:, None]
    value = np.linspace(0, 1, 9)[:, None]
    for is_causal in (False, True):
        proven_or_refused(query, key, value, tol=1e-2, is_causal=is_causal)
    assert frobenius(np.full(4, 1e-200)) == pytest.approx(2e-200)


def test_lengths_whose_powers_overflow_are_refused_not_raised():
    query, key = np.full((2, 3), 4.7e-285), np.full((3, 3), -1.1e300)
    assert not proven_or_refused(query, key * [[1], [1.5], [2]], np.eye(3), scale=1e-13)


def test_coordinates_too_far_apart_to_be_balanced_are_refused():
    query = np.diag([1e157, 1e-8, 1e216, 1e-32])
    key = np.full((5, 4), 1e138) * np.arange(1, 6)[:, None]
    assert not proven_or_refused(query, key, np.eye(5))


def test_queries_as_large_as_their_dtype_can_be_prepared_for():
    query = np.array([[1.0, 2.0], [65504.0, 1.0]], np.float16)
    key, value = np.zeros((3, 2), np.float16), np.eye(3, dtype=np.float16)
    prepared = fastattn.prepare(
        key, value, queries=query, method=Polynomial(), **PROVEN
    )
    answer = prepared.query(query)
    assert np.abs(answer.value.astype(float) - 1 / 3).max() <= answer.certificate.error


def test_answer_that_underflows_to_zero_has_no_relative_bound():
    # the mean is 2e-46, which float32 does not have
    query, key = np.zeros((4, 1), np.float32), np.zeros((7, 1), np.float32)
    value = np.zeros((7, 1), np.float32)
    value[0] = np.finfo(np.float32).smallest_subnormal
    with pytest.raises(RefusalError, match="the output underflows"):
        approximate(query, key, value, method=Exact())


def test_zeros_times_products_that_overflow_are_not_certified():
    query = np.full((1, 2), 1e173)
    keys = np.full((3, 2), 1e295), np.full((1, 2), 1e10)
    values = np.ones((3, 2)), np.zeros((1, 2))
    for method in (StrassenAttention(), Exact(), None):
        with pytest.raises(RefusalError, match=r"the range of float64|bounded by inf"):
            approximate(query, keys, values, method=method, **PROVEN)


def test_values_too_far_apart_to_be_balanced_are_not_lost():
    query, keys = np.ones((1, 1)), tuple(np.ones((2, 1)) for _ in range(3))
    sizes = 1e306, 1e-308, 1e-183
    values = tuple(np.full((2, 1), size) for size in sizes)
    with pytest.raises(RefusalError, match="too much in size to be balanced"):
        approximate(query, keys, values, **PROVEN)


def test_half_a_denormal_range_is_not_none():
    least = np.finfo(np.float64).smallest_subnormal
    low, high = np.array([0.0, 1.0]), np.array([least, 1.0])
    np.testing.assert_array_equal(half_range(low, high), [least, 0.0])


def test_lengths_that_are_unknown_are_beyond_every_bound():
    rows, far = np.ones((3000, 2)), np.array([[np.inf, 0.0], [0.0, 0.0]])
    bounds = RowBounds.of(rows, np.zeros(2), np.eye(2))
    rows = rows.copy()
    rows[2500] = 0.0
    with np.errstate(invalid="ignore"):
        # an infinite factor times zero is NaN, in the second block of rows
        assert largest_norm(rows, np.zeros(2), far) == np.inf
    with pytest.raises(RefusalError, match=r"query: rows are .* times as large"):
        bounds.check("query", rows * 2)
