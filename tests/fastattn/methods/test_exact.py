"""Exact attention: every law of softmax, any logits, a proven bound on rounding."""

import numpy as np
import pytest

from fastattn import Exact, RefusalError, approximate
from fastattn._ops.softmax import attend
from tests import oracles
from tests.laws import MethodLaws, OpLaws, roundoff


class TestAttend(OpLaws):
    op = attend

    def inputs(self, rng, dtype, n, m):
        query, key, value = (
            rng.standard_normal((2, rows, width)).astype(dtype)
            for rows, width in [(n, 5), (m, 5), (m, 3)]
        )
        return [query, key, value], {"scale": 0.4, "prefix_lengths": None}

    def slack(self, arrays, options):
        return roundoff(*arrays, scale=options["scale"])


class TestAttendVisible(TestAttend):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "prefix_lengths": rng.integers(0, m + 1, n)}


class TestAttendRows(TestAttend):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "rows": int(rng.integers(1, n + 1))}


class TestExactProven(MethodLaws):
    options = {"method": Exact(), "guarantee": "proven"}  # noqa: RUF012


class TestExactBlock(MethodLaws):
    options = {"method": Exact(block=7), "guarantee": "proven"}  # noqa: RUF012


class TestExactSharp(MethodLaws):
    options = {"method": Exact(), "guarantee": "proven"}  # noqa: RUF012
    scale_of_inputs = 6.0


@pytest.mark.parametrize("peak", [80.0, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_are_within_the_rounding_bound(rng, dtype, peak):
    query, key = (
        rng.choice([-1.0, 1.0], (rows, 4)) * peak**0.5 / 2 for rows in (60, 300)
    )
    value = rng.standard_normal((300, 2))
    inputs = [x.astype(dtype) for x in (query, key, value)]
    answer = approximate(
        *inputs, scale=1.0, tol=0.5, method=Exact(), guarantee="proven"
    )
    truth, normalizer = oracles.attention(*inputs, scale=1.0, dtype=np.longdouble)
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, normalizer, rtol=1e-5)
    assert normalizer.max() > 0.9 * peak


@pytest.mark.parametrize("order", [1, -1])
def test_logits_that_grow_or_fall_along_the_keys_are_rescaled_right(order):
    # each block of keys raises the peak, or none after the first does
    key = np.linspace(-300, 300, 3000)[::order, None]
    query = np.array([[1.0], [-1.0], [0.01]])
    value = np.sin(np.arange(3000.0))[:, None]
    answer = approximate(query, key, value, scale=1.0, guarantee="proven")
    truth, normalizer = oracles.attention(
        query, key, value, scale=1.0, dtype=np.longdouble
    )
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, normalizer, rtol=1e-14)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 9), (9, 5), (300, 300), (1030, 70)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_rows_see_what_came_before(rng, n, m, masked):
    query, key, value = (
        rng.standard_normal((rows, width)) for rows, width in [(n, 3), (m, 3), (m, 2)]
    )
    mask = rng.random(m) < 0.6 if masked else None
    answer = approximate(
        query, key, value, is_causal=True, key_mask=mask, guarantee="proven"
    )
    truth, normalizer = oracles.attention(
        query, key, value, is_causal=True, key_mask=mask
    )
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, normalizer, rtol=1e-12)


def test_masks_broadcast_over_the_batch(rng):
    query, key, value = rng.standard_normal((3, 2, 1, 12, 4))
    mask = rng.random((3, 12)) < 0.5
    answer = approximate(query, key, value, key_mask=mask, guarantee="proven")
    truth, _ = oracles.attention(query, key, value, key_mask=mask)
    assert answer.value.shape == (2, 3, 12, 4)
    assert np.all(
        oracles.largest_error(answer.value, truth) <= answer.certificate.error
    )


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_rounding_bound_is_not_vacuous(rng, factor):
    query, key, value = factor * rng.standard_normal((3, 64, 8))
    inputs = [x.astype(np.float32) for x in (query, key, value)]
    answer = approximate(*inputs, tol=1, method=Exact(), guarantee="proven")
    # a logit may be off by (d + 6) u times the product of the largest norms
    u = np.finfo(np.float32).eps / 2
    norms = [np.linalg.norm(x, axis=1).max() for x in inputs[:2]]
    expected = 14 * u * 8**-0.5 * norms[0] * norms[1] * np.abs(inputs[2]).max()
    assert answer.certificate.error <= 10 * expected + 300 * u * np.abs(inputs[2]).max()


def test_float32_input_is_computed_in_float64_where_that_proves_more(rng):
    query, key, value = rng.standard_normal((3, 30, 4)).astype(np.float32)
    answer = approximate(
        query, key, value, tol=1e-7, method=Exact(), guarantee="proven"
    )
    assert "float64" in answer.certificate.source
    assert answer.value.dtype == np.float32


def test_a_tolerance_below_rounding_is_refused(rng):
    query, key, value = rng.standard_normal((3, 30, 4))
    with pytest.raises(RefusalError, match=r"tol=1e-18 cannot be proven: rounding in"):
        approximate(query, key, value, tol=1e-18, method=Exact(), guarantee="proven")


def far_below(tuples=50, dtype="float64"):
    """Only keys whose weights underflow have values: the answer is about 1e-546."""
    query, key, value = (
        np.ones((64, 1)),
        np.full((tuples, 1), -1261.0),
        np.ones((tuples, 1)),
    )
    key[0] = value[0] = 0.0
    return tuple(x.astype(dtype) for x in (query, key, value))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_weights_that_underflow_are_not_certified_away(dtype, guarantee):
    query, key, value = far_below(dtype=dtype)
    options = {"scale": 1.0, "method": Exact(), "rng": 0, "tol": 0.1}
    if guarantee == "sampled":
        # what is computed instead of nothing is off by its own size
        with pytest.raises(RefusalError, match=r"underflows|below what"):
            approximate(query, key, value, **options)
    else:
        # next to the values it is nothing
        answer = approximate(query, key, value, guarantee="proven", **options)
        assert np.abs(answer.value).max() <= answer.certificate.error


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sampled_rows_do_not_hide_weights_that_underflow(dtype):
    # as far down as the dtype holds, the answer is certified; below it is refused
    query, key, value = far_below(dtype=dtype)
    limit = -np.log(np.finfo(dtype).smallest_normal)
    for share, is_refused in ((0.8, False), (1.0, True), (1.2, True)):
        low = np.where(key != 0, -share * limit, 0).astype(dtype)
        call = {"scale": 1.0, "method": Exact(), "rng": 0, "tol": 0.1}
        if is_refused:
            with pytest.raises(RefusalError, match=r"underflows|below what"):
                approximate(query, low, value, **call)
            continue
        answer = approximate(query, low, value, **call)
        weights = 49 * np.exp(low[1, 0].astype(np.longdouble))
        assert answer.value == pytest.approx(np.full((64, 1), float(weights)), rel=0.1)
