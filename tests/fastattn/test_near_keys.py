"""Near keys in products of eight bits: against the definition, and their fallback."""

import numpy as np
import pytest

import fastattn.multipole
from fastattn import Multipole, approximate, load_sample
from fastattn._ops.cpu import multipole as body
from fastattn._ops.cpu.bfloat16 import multiplies_bfloat16, packed_rows
from fastattn._ops.multipole import multipole
from tests import oracles
from tests.fastattn.test_multipole import TestMultipoleOp as _Op

needs_bfloat16 = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="the processor has no AVX-512 BF16"
)
# half a unit in the last of eight bits
ROUNDING = 2.0**-9


def rounded(x):
    """To bfloat16: eight bits, ties up."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def problem(n, m, d, p, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    mean, key = rng.standard_normal(d) * spread, rng.standard_normal((m, d))
    query = mean + 0.3 * rng.standard_normal((n, d))
    arrays = query, mean, key, rng.standard_normal((m, p))
    return [x.astype(np.float32) for x in arrays]


def added(query, mean, key, value, near, before=None):
    """What ``add_near`` makes of ``before``: nothing, unless it is given."""
    from fastattn._ops.cpu.near_keys import add_near

    n, p = len(query), value.shape[1]
    peak, total, out = before or (
        np.full(n, -np.inf, np.float32),
        np.zeros(n),
        np.zeros((n, p), np.float32),
    )
    pairs = packed_rows(key)
    add_near(near.astype(np.int32), query, mean, key, pairs, value, peak, total, out)
    return peak, total, out


def rounded_attention(query, mean, key, value, near):
    """Softmax of near keys whose factors are rounded as the body rounds them."""
    step, key = rounded(query - mean).astype(float), key[near]
    logits = step @ rounded(key).astype(float).T + (key @ mean).astype(float)
    return oracles.softmax_mean(logits, value[near])


@needs_bfloat16
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 511, 512, 513, 1100])
@pytest.mark.parametrize(("d", "p"), [(1, 1), (5, 3), (64, 64), (33, 9)])
def test_near_keys_are_summed_as_defined(n, m, d, p):
    inputs = problem(n, m, d, p, seed=n + m)
    near = np.random.default_rng(m).permutation(m)[: max(1, m - m // 5)]
    near.sort()
    peak, total, out = added(*inputs, near)
    want, norm = rounded_attention(*inputs, near)
    # weights and values are rounded, and logits summed in float32
    largest = np.abs(inputs[3]).max()
    slack = 3 * ROUNDING * largest
    np.testing.assert_allclose(out / total[:, None], want, rtol=0, atol=slack)
    np.testing.assert_allclose(peak + np.log(total), norm, rtol=1e-4, atol=1e-3)


@needs_bfloat16
def test_what_was_summed_before_stays():
    query, mean, key, value = problem(50, 300, 8, 5)
    first, second = np.arange(0, 300, 2), np.arange(1, 300, 2)
    state = added(query, mean, key, value, first)
    _, total, out = added(query, mean, key, value, second, state)
    want, _ = rounded_attention(query, mean, key, value, np.arange(300))
    slack = 3 * ROUNDING * np.abs(value).max()
    np.testing.assert_allclose(out / total[:, None], want, rtol=0, atol=slack)
    before = [x.copy() for x in state]
    added(query, mean, key, value, first[:0], state)
    for one, other in zip(state, before, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_bfloat16
def test_logits_far_from_each_other_stay_in_range():
    query, mean, key, value = problem(40, 600, 4, 3, spread=60.0)
    _, total, out = added(query, mean, key, value, np.arange(600))
    assert np.isfinite(total).all()
    want, _ = rounded_attention(query, mean, key, value, np.arange(600))
    # logits of hundreds are rounded in float32, too
    slack = 6 * ROUNDING * np.abs(value).max()
    np.testing.assert_allclose(out / total[:, None], want, rtol=0, atol=slack)


def test_rows_are_packed_in_pairs():
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    pairs = packed_rows(x)
    assert pairs.shape == (7, 3)
    low, high = (pairs << 16).view(np.float32), (pairs & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(low, rounded(x[:, 0::2]))
    np.testing.assert_array_equal(high[:, :2], rounded(x[:, 1::2]))
    np.testing.assert_array_equal(high[:, 2], 0)


class TestCoarseMultipoleOp(_Op):
    """The laws of the op, for float64 as before and for float32 to eight bits."""

    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "coarse": True}

    def slack(self, arrays, options):
        fine = super().slack(arrays, options)
        if arrays[0].dtype != np.float32:
            return fine
        query, key, value = arrays[0], arrays[4], arrays[5]
        # a logit is off by the rounding of two factors, a weight by as much
        step = (
            np.linalg.norm(query, axis=1).max()
            + np.linalg.norm(arrays[1], axis=1).max()
        )
        logit = 2 * ROUNDING * step * np.linalg.norm(key, axis=1).max()
        return fine + 2 * (logit + 2 * ROUNDING) * max(1.0, np.abs(value).max())


def test_processors_without_pairs_compute_in_float32(monkeypatch):
    arrays, options = _Op().inputs(np.random.default_rng(0), np.float32, 200, 150)
    fine = multipole(*arrays, **options)
    monkeypatch.setattr(body, "multiplies_bfloat16", lambda: False)
    for one, other in zip(
        multipole(*arrays, **options, coarse=True), fine, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_bfloat16)])
def test_a_real_head_is_served_with_and_without(fast, monkeypatch):
    monkeypatch.setattr(fastattn.multipole, "rounds_near", lambda _: fast)
    query, key, value = (x[0] for x in load_sample("minilm-sharp"))
    exact, _ = oracles.attention(query, key, value)
    answer = approximate(query, key, value, tol=0.05, method=Multipole(), rng=0)
    error = np.linalg.norm(answer.value - exact) / np.linalg.norm(exact)
    assert error <= answer.certificate.error <= 0.05


@needs_bfloat16
def test_small_tolerances_are_left_to_float32():
    query, key, value = (x[0] for x in load_sample("minilm-sharp"))
    exact, _ = oracles.attention(query, key, value)
    answer = approximate(query, key, value, tol=1e-4, method=Multipole(), rng=0)
    error = np.linalg.norm(answer.value - exact) / np.linalg.norm(exact)
    # far below what eight bits leave
    assert error <= 1e-4 < ROUNDING / 4
