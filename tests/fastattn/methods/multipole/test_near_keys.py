"""Near keys by int8/bfloat16 matmuls: against the definition, and their fallback."""

import numpy as np
import pytest

import fastattn.methods.multipole.method
from fastattn import Multipole, approximate, load_sample
from fastattn._ops.cpu import multipole as kernel
from fastattn._ops.cpu.near_keys import add_near
from fastattn._ops.cpu.packing import PackedKeys
from fastattn._ops.cpu.tiles import multiplies_bytes
from tests import oracles
from tests.fastattn.methods.multipole.test_multipole import TestMultipoleOp as _Op
from tests.pairwise import pairwise

needs_eight_bits = pytest.mark.skipif(
    not multiplies_bytes(), reason="the processor has no AVX-512 BF16 and VNNI"
)
both = pytest.mark.parametrize("integers", [False, True])
# half a unit in the last place of bfloat16, and half a step of int8
ROUNDING, HALF = 2.0**-9, 0.5 / 127


def problem(n, m, d, p, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    mean, key = rng.standard_normal(d) * spread, rng.standard_normal((m, d))
    query = mean + 0.3 * rng.standard_normal((n, d))
    arrays = query, mean, key, rng.standard_normal((m, p))
    return [x.astype(np.float32) for x in arrays]


def nothing_yet(n, p):
    return np.full(n, -np.inf, np.float32), np.zeros(n), np.zeros((n, p), np.float32)


def added(query, mean, key, value, near, integers, before=None):
    """The partial sums that ``add_near`` adds to: zeros unless ``before`` is given."""
    state = before or nothing_yet(len(query), value.shape[1])
    packed = PackedKeys(key, integers)
    near = near.astype(np.int32)
    assert add_near(near, query, mean, key, packed, value, *state)
    return state


def slack(query, mean, key, integers):
    """How far weights may be off: logits by their factors' rounding, and by itself."""
    step, key = np.abs(query - mean), np.abs(key - key.mean(axis=0))
    if integers:
        column = key.max(axis=0)
        row = np.max(step * column, axis=1)[:, None] / np.where(column > 0, column, 1)
        logit = HALF * (row @ key.T + step @ np.broadcast_to(column, key.shape).T)
    else:
        logit = 2 * ROUNDING * step @ key.T
    # weights and values are truncated or rounded to bfloat16
    return 2 * np.expm1(1.1 * logit.max() + 4 * ROUNDING)


@needs_eight_bits
@pairwise(
    "n, m, widths, integers",
    [1, 31, 32, 33, 100],
    [1, 2, 7, 8, 9, 127, 129, 1100],
    [(1, 1), (5, 3), (64, 64), (33, 9)],
    [False, True],
)
def test_near_keys_are_summed_as_defined(n, m, widths, integers):
    d, p = widths
    query, mean, key, value = inputs = problem(n, m, d, p, seed=n + m)
    near = np.random.default_rng(m).permutation(m)[: max(1, m - m // 5)]
    near.sort()
    peak, total, out = added(*inputs, near, integers)
    want, norm = oracles.softmax_mean(
        query.astype(float) @ key[near].astype(float).T, value[near]
    )
    off = slack(query, mean, key, integers)
    largest = np.abs(value).max()
    np.testing.assert_allclose(out / total[:, None], want, rtol=0, atol=off * largest)
    np.testing.assert_allclose(peak + np.log(total), norm, rtol=1e-4, atol=off)


@needs_eight_bits
@both
def test_what_was_summed_before_stays(integers):
    query, mean, key, value = problem(50, 300, 8, 5)
    first, second = np.arange(0, 300, 2), np.arange(1, 300, 2)
    state = added(query, mean, key, value, first, integers)
    before = [x.copy() for x in state]
    added(query, mean, key, value, first[:0], integers, state)
    for one, other in zip(state, before, strict=True):
        np.testing.assert_array_equal(one, other)
    _, total, out = added(query, mean, key, value, second, integers, state)
    whole = added(query, mean, key, value, np.arange(300), integers)
    want = whole[2] / whole[1][:, None]
    # the same factors: only weights are rounded in another way
    off = 4 * ROUNDING * np.abs(value).max()
    np.testing.assert_allclose(out / total[:, None], want, rtol=0, atol=off)


@needs_eight_bits
@both
def test_logits_far_from_each_other_stay_in_range_or_change_nothing(integers):
    query, mean, key, value = problem(40, 600, 4, 3, spread=60.0)
    state = nothing_yet(40, 3)
    packed = PackedKeys(key, integers)
    near = np.arange(600, dtype=np.int32)
    if add_near(near, query, mean, key, packed, value, *state):
        assert all(np.isfinite(x).all() for x in state)
        want, _ = oracles.softmax_mean(query.astype(float) @ key.T, value)
        off = slack(query, mean, key, integers) * np.abs(value).max()
        np.testing.assert_allclose(state[2] / state[1][:, None], want, atol=off)
        return
    for one, other in zip(state, nothing_yet(40, 3), strict=True):
        np.testing.assert_array_equal(one, other)


@needs_eight_bits
@both
def test_sums_that_overflow_are_left_to_float32(integers):
    query, mean, key, value = problem(40, 600, 4, 3)
    # not among the keys that the weights are relative to
    key[1] = 200 * mean / np.linalg.norm(mean)
    state = nothing_yet(40, 3)
    near = np.arange(600, dtype=np.int32)
    with np.errstate(over="ignore"):
        packed = PackedKeys(key, integers)
        assert not add_near(near, query, mean, key, packed, value, *state)
    for one, other in zip(state, nothing_yet(40, 3), strict=True):
        np.testing.assert_array_equal(one, other)


class TestLowPrecisionMultipoleOp(_Op):
    """The laws of the op, for float64 as before and for float32 to 8 bits."""

    low_precision = "bfloat16"

    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "low_precision": self.low_precision}

    def slack(self, arrays, options):
        fine = super().slack(arrays, options)
        if arrays[0].dtype != np.float32:
            return fine
        query, key, value = arrays[0], arrays[4], arrays[5]
        # no more than from the rows that are furthest from any mean
        size = np.abs(query).max() + np.abs(arrays[1]).max()
        step = np.full((1, query.shape[1]), size)
        off = slack(step, 0 * step, key, self.low_precision == "int8")
        return fine + off * max(1.0, np.abs(value).max())


class TestIntegerMultipoleOp(TestLowPrecisionMultipoleOp):
    low_precision = "int8"


def test_processors_without_eight_bits_compute_in_float32(monkeypatch):
    arrays, options = _Op().inputs(np.random.default_rng(0), np.float32, 200, 150)
    fine = _Op.op(*arrays, **options)
    monkeypatch.setattr(kernel, "multiplies_bytes", lambda: False)
    for one, other in zip(
        _Op.op(*arrays, **options, low_precision="int8"), fine, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tol", [0.05, 0.01])
@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_eight_bits)])
def test_a_real_head_is_served_with_and_without(fast, tol, monkeypatch):
    monkeypatch.setattr(
        fastattn.methods.multipole.method, "multiplies_quantized", lambda _: fast
    )
    query, key, value = (x[0] for x in load_sample("minilm-sharp"))
    exact, _ = oracles.attention(query, key, value)
    answer = approximate(query, key, value, tol=tol, method=Multipole(), rng=0)
    error = np.linalg.norm(answer.value - exact) / np.linalg.norm(exact)
    assert error <= answer.certificate.error <= tol


@needs_eight_bits
def test_small_tolerances_are_left_to_float32():
    query, key, value = (x[0] for x in load_sample("minilm-sharp"))
    exact, _ = oracles.attention(query, key, value)
    answer = approximate(query, key, value, tol=1e-4, method=Multipole(), rng=0)
    error = np.linalg.norm(answer.value - exact) / np.linalg.norm(exact)
    # far below the rounding of int8/bfloat16 matmuls
    assert error <= 1e-4 < ROUNDING / 4
