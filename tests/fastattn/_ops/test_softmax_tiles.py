"""Exact attention in tiles: within its proven bound, and its fallback for overflows."""

import numpy as np
import pytest

from fastattn import Exact, approximate
from fastattn._ops.cpu import softmax as kernel
from fastattn._ops.cpu.softmax_tiles import KEYS, attend_tiles, serves
from fastattn._ops.cpu.tiles import has_tiles
from fastattn._ops.softmax import attend
from tests import oracles
from tests.laws import MethodLaws, OpLaws, roundoff
from tests.pairwise import pairwise

needs_tiles = pytest.mark.skipif(
    not has_tiles(), reason="the processor has no AVX-512 F and DQ"
)


class TestAttendInTiles(OpLaws):
    op = attend
    widths = 5, 8

    def inputs(self, rng, dtype, n, m):
        d, p = self.widths
        arrays = (rng.standard_normal((2, *s)) for s in ((n, d), (m, d), (m, p)))
        return [x.astype(dtype) for x in arrays], {"scale": 0.4, "prefix_lengths": None}

    def slack(self, arrays, options):
        return roundoff(*arrays, scale=options["scale"])


class TestAttendVisibleInTiles(TestAttendInTiles):
    widths = 1, 16

    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "prefix_lengths": rng.integers(0, m + 1, n)}


class TestAttendWithoutValuesInTiles(TestAttendInTiles):
    widths = 64, 0

    def slack(self, arrays, options):
        query, key, _ = arrays
        return roundoff(query, key, key, scale=options["scale"])


class TestExactInTiles(MethodLaws):
    options = {"method": Exact(), "guarantee": "proven"}  # noqa: RUF012
    scale_of_inputs = 3.0

    def problem(self, n=40, m=50, d=4, p=8, seed=0, dtype=np.float32, lead=()):
        return super().problem(n, m, d, p, seed, dtype, lead)

    def test_constant_values_come_back(self):
        query, key, value = self.problem()
        answer = self.answer(query, key, np.full_like(value, 0.7))
        assert abs(answer.value - 0.7).max() <= answer.certificate.error


@pairwise(
    ("m", "spread", "is_causal"),
    [KEYS, KEYS + 1, 4 * KEYS + 7],
    [0.1, 2.0, 8.0],
    [False, True],
)
def test_rounding_is_within_the_proven_bound(m, spread, is_causal):
    rng = np.random.default_rng(m)
    query, key = (spread * rng.standard_normal((m, 16)) for _ in range(2))
    inputs = [x.astype(np.float32) for x in (query, key, rng.standard_normal((m, 8)))]
    answer = approximate(
        *inputs, tol=0.9, method=Exact(), guarantee="proven", is_causal=is_causal
    )
    truth, norm = oracles.attention(*inputs, is_causal=is_causal, dtype=np.longdouble)
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, norm, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_logits_that_grow_or_fall_along_the_keys_are_right(order, is_causal):
    key = np.linspace(-300, 300, 3000, dtype=np.float32)[::order, None]
    query = np.resize(np.array([1.0, -1.0, 0.01], np.float32), 3000)[:, None]
    value = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    answer = approximate(
        query, key, value, scale=1.0, method=Exact(), is_causal=is_causal
    )
    truth, norm = oracles.attention(query, key, value, scale=1.0, is_causal=is_causal)
    np.testing.assert_allclose(answer.value, truth, atol=2e-3)
    np.testing.assert_allclose(answer.log_normalizer, norm, rtol=1e-5)


@needs_tiles
def test_sums_that_overflow_are_left_to_blas(monkeypatch):
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 200, 8)).astype(np.float32)
    # weights are not relative to the one key that outweighs all
    key[101] = 300 * query[5] / np.linalg.norm(query[5])
    out, norm = np.empty((200, 8), np.float32), np.empty(200, np.float32)
    assert serves(query, key, value)
    assert not attend_tiles(query, key, value, 1.0, None, out, norm)
    got, log_sum = attend(
        query[None], key[None], value[None], scale=1.0, prefix_lengths=None
    )
    monkeypatch.setattr(kernel, "serves", lambda *_: False)
    want, same = attend(
        query[None], key[None], value[None], scale=1.0, prefix_lengths=None
    )
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(log_sum, same)
    truth, _ = oracles.attention(query, key, value, scale=1.0)
    np.testing.assert_allclose(got[0], truth, atol=1e-3)


@needs_tiles
def test_other_arrays_are_left_to_blas():
    query, key, value = np.ones((3, 10, 16), np.float32)
    assert serves(query, key, value)
    assert not serves(query, key.astype(np.float16), value)
    assert not serves(query.astype(float), key.astype(float), value.astype(float))
    assert not serves(query, key, value[:, :7])
    assert not serves(query, key[:, ::2], value)
