"""Exact derivatives in tiles: the laws of the op, and its fallback for overflows."""

import numpy as np
import pytest

from fastattn._ops.cpu import gradient_tiles
from fastattn._ops.cpu.tiles import has_tiles
from fastattn._ops.gradient import attend_vjp
from tests.derivatives import problem, slack_of, softmax_vjp
from tests.fastattn.gradients import test_gradients as laws

needs_tiles = pytest.mark.skipif(
    not has_tiles(), reason="the processor has no AVX-512 F and DQ"
)


class TestAttendVjpInTiles(laws.TestAttendVjp):
    widths = 32, 64


class TestAttendVjpVisibleInTiles(laws.TestAttendVjpVisible):
    widths = 64, 32


class TestAttendVjpOfSomeKeysInTiles(laws.TestAttendVjpOfSomeKeys):
    widths = 32, 32


class TestAttendVjpBesideInTiles(laws.TestAttendVjpBeside):
    widths = 32, 32


@pytest.mark.parametrize("m", [100, 203, 1500])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_in_tiles_are_those_of_the_definition(m, spread, is_causal):
    inputs = problem(m + 5, m, 32, 32, dtype=np.float32, spread=spread)
    laws.assert_right(inputs, is_causal=is_causal)


@needs_tiles
def test_weights_that_overflow_are_left_to_blas(monkeypatch):
    query, key, value, grad = problem(200, 200, 32, 32, dtype=np.float32)
    # weights are not relative to the one key that outweighs all
    key[101] = 300 * query[5] / np.linalg.norm(query[5])
    options = {"scale": 1.0, "prefix_lengths": None}
    got = attend_vjp(query, key, value, grad, **options)
    monkeypatch.setattr(gradient_tiles, "serves", lambda *_: False)
    want = attend_vjp(query, key, value, grad, **options)
    truth = softmax_vjp(query, key, value, grad, scale=1.0)
    slack = slack_of(query, key, value, grad, scale=1.0)
    for one, other, right in zip(got, want, truth, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=slack)
        np.testing.assert_allclose(one, right, rtol=0, atol=slack)


@needs_tiles
def test_other_arrays_are_left_to_blas():
    query, key, value, grad = np.ones((4, 10, 32), np.float32)
    serves = gradient_tiles.serves
    assert serves(query, key, value, grad)
    assert not serves(*(x.astype(float) for x in (query, key, value, grad)))
    assert not serves(query, key.astype(np.float16), value, grad)
    assert not serves(query[:, :31], key[:, :31], value, grad)
    assert not serves(query, key, value[:, :8], grad[:, :8])
    assert not serves(query, key[:0], value[:0], grad)
