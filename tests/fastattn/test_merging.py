"""Merged answers are the answers over all keys, and their bounds hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import (
    Exact,
    Polynomial,
    approximate,
    merge_answers,
)
from tests import oracles
from tests.laws import DTYPES, roundoff

PROVEN = {"method": Exact(), "guarantee": "proven", "tol": 1e-1}


def problem(n=30, m=60, d=4, p=3, seed=0, dtype=np.float64, spread=1.0, lead=()):
    rng = np.random.default_rng(seed)
    shapes = (*lead, n, d), (*lead, m, d), (*lead, m, p)
    query, key, value = (rng.standard_normal(x) for x in shapes)
    return [x.astype(dtype) for x in (spread * query, spread * key, value)]


def split(query, key, value, cuts, **options):
    """Answers over consecutive blocks of keys."""
    pieces = np.split(np.arange(key.shape[-2]), cuts)
    return [
        approximate(query, key[..., x, :], value[..., x, :], rng=0, **options)
        for x in pieces
    ]


def assert_close(one, other, inputs):
    slack = 4 * roundoff(*inputs)
    np.testing.assert_allclose(one.value, other.value, rtol=0, atol=slack)
    size = 1 + np.abs(other.log_normalizer[np.isfinite(other.log_normalizer)]).max()
    np.testing.assert_allclose(
        one.log_normalizer, other.log_normalizer, rtol=0, atol=slack * size
    )


@given(
    cuts=st.lists(st.integers(1, 59), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
)
def test_merge_of_splits_is_the_whole(cuts, seed, dtype, spread):
    inputs = problem(seed=seed, dtype=dtype, spread=spread)
    merged = merge_answers(split(*inputs, sorted(cuts), **PROVEN))
    assert_close(merged, approximate(*inputs, **PROVEN), inputs)
    truth, normalizer = oracles.attention(*inputs)
    assert oracles.largest_error(merged.value, truth) <= merged.certificate.error
    np.testing.assert_array_less(
        np.abs(merged.log_normalizer - normalizer), merged.plan.log_error
    )


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [2, 1, 0]])
def test_order_does_not_matter(order):
    inputs = problem()
    parts = split(*inputs, [10, 45], **PROVEN)
    one, other = merge_answers(parts), merge_answers([parts[i] for i in order])
    assert_close(one, other, inputs)
    np.testing.assert_allclose(one.certificate.error, other.certificate.error)


def test_merging_is_associative_and_keeps_its_bounds():
    inputs = problem()
    first, *rest = split(*inputs, [10, 30, 45], **PROVEN)
    streamed = first
    for part in rest:
        streamed = merge_answers([streamed, part])
    at_once = merge_answers([first, *rest])
    assert_close(streamed, at_once, inputs)
    truth, _ = oracles.attention(*inputs)
    assert oracles.largest_error(streamed.value, truth) <= streamed.certificate.error
    assert streamed.certificate.error <= 4 * at_once.certificate.error


def test_one_answer_is_itself():
    (part,) = split(*problem(), [], **PROVEN)
    merged = merge_answers([part])
    np.testing.assert_array_equal(merged.value, part.value)
    assert merged.certificate.error == pytest.approx(part.certificate.error, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_of_exact_parts_stay_near_rounding(dtype):
    inputs = problem(n=200, dtype=dtype)
    parts = split(*inputs, [20], **PROVEN)
    own = max(x.certificate.error for x in parts)
    assert merge_answers(parts).certificate.error <= 10 * own


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_relative_bounds_of_exact_parts_merge(lead):
    inputs = problem(lead=lead)
    parts = split(*inputs, [20])
    merged = merge_answers(parts)
    assert merged.certificate.norm == "relative-frobenius"
    assert np.shape(merged.certificate.error) == lead
    truth, _ = oracles.attention(*inputs)
    got = oracles.frobenius_error(merged.value, truth)
    assert np.all(got <= merged.certificate.error)
    assert np.all(merged.certificate.error < 1e-11)
    np.testing.assert_array_equal(merged.certificate.failure, 0)


def test_mixed_norms_are_stated_relatively():
    inputs = problem()
    parts = split(*inputs, [20], **PROVEN)[:1] + split(*inputs, [20])[1:]
    merged = merge_answers(parts)
    assert merged.certificate.norm == "relative-frobenius"
    truth, _ = oracles.attention(*inputs)
    error = oracles.frobenius_error(merged.value, truth)
    assert error <= merged.certificate.error < 1e-11


@pytest.mark.parametrize("wrong", [-3.0, 2.0, 30.0])
def test_bound_holds_whatever_the_weights_of_approximate_parts(wrong):
    # as if the errors of its weights were unknown
    inputs = problem(spread=0.5)
    options = {"method": Polynomial(), "guarantee": "proven", "tol": 1e-3}
    first, second = split(*inputs, [20], **options)
    logarithm = second.log_normalizer + wrong
    second = replace(second, log_normalizer=logarithm, log_normalizer_error=None)
    merged = merge_answers([first, second])
    truth, _ = oracles.attention(*inputs)
    assert oracles.largest_error(merged.value, truth) <= merged.certificate.error
    assert merged.plan.log_error == np.inf
    assert "not known" in merged.certificate.source


def test_failures_add_up():
    inputs = problem(n=1100, m=1200, spread=0.7)
    options = {"method": Polynomial(rank=60, basis="hermite"), "tol": 0.3}
    parts = split(*inputs, [500], **options)
    merged = merge_answers(parts)
    assert merged.certificate.failure == sum(x.certificate.failure for x in parts) > 0
    truth, _ = oracles.attention(*inputs)
    error = oracles.frobenius_error(merged.value, truth)
    assert error <= merged.certificate.error
    # the error is small, though its bound is the distance between the parts
    assert error < 1e-2 < merged.certificate.error


def test_parts_that_a_row_does_not_see_have_no_say():
    query, key, value = problem()
    seen = np.zeros((3, 60), bool)
    seen[0, :20], seen[1, 20:] = True, True
    whole = seen.any(axis=0) & (np.arange(60) != 7)
    parts = [approximate(query, key, value, key_mask=x & whole, **PROVEN) for x in seen]
    merged = merge_answers(parts)
    truth, normalizer = oracles.attention(query, key, value, key_mask=whole)
    assert oracles.largest_error(merged.value, truth) <= merged.certificate.error
    np.testing.assert_allclose(merged.log_normalizer, normalizer, rtol=1e-12)
    # the part without keys costs nothing
    two = merge_answers(parts[:2])
    assert merged.certificate.error == pytest.approx(two.certificate.error, rel=1e-2)


def test_rows_without_any_key_stay_empty():
    query, key, value = problem()
    none = np.zeros(60, bool)
    parts = [approximate(query, key, value, key_mask=none, **PROVEN) for _ in range(2)]
    merged = merge_answers(parts)
    np.testing.assert_array_equal(merged.value, 0)
    np.testing.assert_array_equal(merged.log_normalizer, -np.inf)
    assert merged.certificate.error < 1e-300


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_of_any_size_merge(shift):
    query, key, value = problem()
    key = np.concatenate([key, np.ones((60, 1))], axis=1)
    query = np.concatenate([query, np.full((30, 1), shift)], axis=1)
    merged = merge_answers(split(query, key, value, [25], **PROVEN))
    truth, normalizer = oracles.attention(query, key, value)
    assert oracles.largest_error(merged.value, truth) <= merged.certificate.error
    np.testing.assert_allclose(merged.log_normalizer, normalizer, rtol=1e-13)


def test_a_single_row_says_nothing_of_the_weights():
    inputs = problem(n=1)
    parts = split(*inputs, [20], **PROVEN)
    untold = [replace(x, log_normalizer_error=None) for x in parts]
    truth, _ = oracles.attention(*inputs)
    for answers, least in ((untold, np.inf), (parts, 0.0)):
        merged = merge_answers(answers)
        assert oracles.largest_error(merged.value, truth) <= merged.certificate.error
        assert merged.plan.log_error >= least
    # with log_normalizer_error of the parts, one row has the same bound as many
    assert merged.certificate.error < 1e-12


def test_library_and_dtype_follow_the_answers(xp):
    for dtype in DTYPES:
        inputs = problem(dtype=dtype)
        parts = [
            approximate(
                *xp.asarrays(inputs[0], *(x[rows] for x in inputs[1:])), **PROVEN
            )
            for rows in (slice(0, 20), slice(20, 60))
        ]
        merged = merge_answers(parts)
        for x in (merged.value, merged.log_normalizer):
            assert isinstance(x, xp.array_type)
            assert xp.dtype_name(x) == np.dtype(dtype).name
        truth, _ = oracles.attention(*inputs)
        error = oracles.largest_error(np.asarray(merged.value), truth)
        assert error <= merged.certificate.error


def test_half_precision_stays_half():
    inputs = problem(dtype=np.float16)
    merged = merge_answers(split(*inputs, [20], **PROVEN))
    assert merged.value.dtype == np.float16
    assert merged.log_normalizer.dtype == np.float32
    truth, _ = oracles.attention(*inputs)
    assert oracles.largest_error(merged.value, truth) <= merged.certificate.error


BAD = {
    "none": (lambda _: [], ValueError, "expected at least one answer, got none"),
    "values": (
        lambda parts: [parts[0], parts[1].value],
        TypeError,
        "expected results of approximate.., got ndarray at 1",
    ),
    "no normalizer": (
        lambda parts: [parts[0], replace(parts[1], log_normalizer=None)],
        ValueError,
        "the answer at 1 has no log_normalizer",
    ),
    "other queries": (
        lambda parts: [parts[0], replace(parts[1], value=parts[1].value[:9])],
        ValueError,
        r"value has shape \(9, 3\) at 1, but \(30, 3\) at 0",
    ),
    "other dtype": (
        lambda parts: [parts[0], replace(parts[1], value=parts[1].value.astype("f4"))],
        TypeError,
        "value is float32 at 1, but float64 at 0",
    ),
    "NaN": (
        lambda parts: [replace(parts[0], log_normalizer=np.full(30, np.nan)), parts[1]],
        ValueError,
        "log_normalizer has NaN or infinities at 0",
    ),
    "plus infinity": (
        lambda parts: [replace(parts[0], log_normalizer=np.full(30, np.inf)), parts[1]],
        ValueError,
        "log_normalizer has NaN or infinities at 0",
    ),
    "another layout": (
        lambda parts: [replace(x, log_normalizer=x.log_normalizer[:5]) for x in parts],
        ValueError,
        r"expected log_normalizer of shape \(30,\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_answers_that_do_not_fit_are_refused(case):
    change, error, message = case
    with pytest.raises(error, match=message):
        merge_answers(change(split(*problem(), [20], **PROVEN)))
