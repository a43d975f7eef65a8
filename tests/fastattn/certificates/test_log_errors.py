"""What is promised of log-sum-exps holds for every row, and merging counts it."""

from dataclasses import replace

import numpy as np
import pytest

from fastattn import Exact, Polynomial, approximate, merge_answers
from tests import oracles
from tests.laws import DTYPES

METHODS = [Exact(), Polynomial()]


def problem(dtype=np.float64, n=200, m=300, d=4, size=1.0):
    rng = np.random.default_rng(0)
    query, key, value = (rng.uniform(-1, 1, (x, d)) for x in (n, m, m))
    return [x.astype(dtype) for x in (size * query, key, value)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exps_are_within_their_bounds(xp, dtype, method, is_causal):
    inputs = problem(dtype)
    options = {"tol": 1e-2, "method": method, "guarantee": "proven"}
    answer = approximate(*map(xp.asarray, inputs), is_causal=is_causal, **options)
    _, truth = oracles.attention(*inputs, is_causal=is_causal, dtype=np.longdouble)
    known = np.asarray(answer.log_normalizer_error)
    assert known.shape == (200,)
    assert np.all(np.abs(np.asarray(answer.log_normalizer) - truth) <= known)
    assert known.max() < (1e-3 if method == Exact() else 2e-2)


def test_bounds_follow_each_row():
    query, key, value = problem(np.float32)
    query[7] *= 1e3
    known = approximate(query, key, value, method=Exact()).log_normalizer_error
    assert known[7] > 10 * np.median(known)


def test_batch_has_a_bound_for_each_row_of_each_head():
    inputs = [np.stack([x, x]) for x in problem()]
    mask = np.ones((2, 300), bool)
    mask[1] = False
    answer = approximate(*inputs, key_mask=mask, guarantee="proven")
    assert answer.log_normalizer_error.shape == (2, 200)
    # minus infinity, of rows that see no key, is exact
    np.testing.assert_array_equal(answer.log_normalizer_error[1], 0)


def test_log_sum_exp_beyond_the_dtype_has_no_bound():
    query, key = np.full((2, 1), -1e30, np.float32), np.full((3, 1), 1e30, np.float32)
    value = np.ones((3, 1), np.float32)
    answer = approximate(query, key, value, method=Exact(), guarantee="proven")
    np.testing.assert_array_equal(answer.log_normalizer_error, np.inf)


def test_nothing_is_promised_where_rows_are_sampled():
    rng = np.random.default_rng(0)
    inputs = 0.4 * rng.standard_normal((3, 2048, 16))
    method = Polynomial(rank=60, basis="hermite")
    answer = approximate(*inputs, tol=0.3, method=method, rng=0)
    assert answer.certificate.failure > 0
    assert answer.log_normalizer_error is None
    assert "not certified" in " ".join(approximate.__doc__.split())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_merged_bound_counts_the_error_of_each_row(method):
    query, key, value = problem(size=0.5)
    options = {"tol": 1e-2, "method": method, "guarantee": "proven"}
    halves = slice(0, 120), slice(120, None)
    parts = [approximate(query, key[x], value[x], **options) for x in halves]
    merged = merge_answers(parts)
    truth, normalizer = oracles.attention(query, key, value)
    assert oracles.largest_error(merged.value, truth) <= merged.certificate.error < 0.05
    off = np.abs(merged.log_normalizer - normalizer)
    assert np.all(off <= merged.log_normalizer_error)
    # the worst that the bounds allow: one part's weights too large, the other's small
    moved = [
        replace(x, log_normalizer=x.log_normalizer + sign * x.log_normalizer_error)
        for x, sign in zip(parts, (1, -1), strict=True)
    ]
    wrong = merge_answers(moved)
    assert oracles.largest_error(wrong.value, truth) <= wrong.certificate.error


def test_one_row_whose_weights_are_unknown_costs_its_own_range_only():
    query, key, value = problem()
    parts = [
        approximate(query, key[x], value[x], method=Exact(), guarantee="proven")
        for x in (slice(0, 120), slice(120, None))
    ]
    known = parts[0].log_normalizer_error.copy()
    known[5] = np.inf
    merged = merge_answers([replace(parts[0], log_normalizer_error=known), parts[1]])
    distance = np.abs(parts[0].value - parts[1].value)[5].max()
    assert distance <= merged.certificate.error < distance + 1e-9
    assert np.flatnonzero(np.isinf(merged.log_normalizer_error)).tolist() == [5]
