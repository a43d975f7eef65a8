"""Low-rank products in bfloat16: their values and their errors."""

from dataclasses import replace

import numpy as np
import pytest

from fastattn import Polynomial, attention_vjp
from fastattn._ops.cpu import products
from fastattn._ops.cpu.products import Readout, Sums
from fastattn._ops.cpu.tiles import whole_tiles
from fastattn._ops.quantized import rounded
from fastattn.gradients import lowrank as lowrank_gradient
from fastattn.gradients.lowrank import lowrank_vjp
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.problem.head import Head
from tests import oracles
from tests.derivatives import problem, softmax_vjp
from tests.fastattn.gradients.test_lowrank_gradients import TestKeyVjp as _KeyVjp
from tests.fastattn.gradients.test_lowrank_gradients import TestQueryVjp as _QueryVjp
from tests.fastattn.methods.lowrank.test_lowrank import TestKeySums as _KeySums
from tests.fastattn.methods.multipole.test_near_keys import ROUNDING, needs_eight_bits


def matrices(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(x).astype(np.float32) for x in shapes]


@needs_eight_bits
@pytest.mark.parametrize("n", [32, 33, 128])
@pytest.mark.parametrize(("size", "p"), [(8, 4), (13, 7), (200, 64), (1, 1)])
def test_weights_go_to_rows_and_back(size, p, n):
    weights, rows = matrices((size, p), (n, p))
    out = np.full((whole_tiles(size), n), np.nan, np.float32)
    Readout(weights, rounded=True).multiply(rows, out)
    # rows that do not fill a group of lanes are not rounded
    factors = (weights, rows) if n % 32 else (rounded(weights), rounded(rows))
    want = factors[0].astype(np.float64) @ factors[1].astype(np.float64).T
    np.testing.assert_allclose(out[:size], want, rtol=1e-5, atol=1e-5)
    (features,) = matrices((size, n))
    back = np.empty((n, p), np.float32)
    Readout(weights, rounded=True).read(features, back)
    other = features if n % 32 else rounded(features)
    want = other.astype(np.float64).T @ factors[0].astype(np.float64)
    np.testing.assert_allclose(back, want, rtol=1e-4, atol=1e-4)


@needs_eight_bits
@pytest.mark.parametrize("counts", [(1,), (32, 7), (128, 128, 5)])
@pytest.mark.parametrize(("size", "p"), [(8, 4), (13, 33), (200, 64), (1, 1)])
def test_sums_over_rows_go_on(size, p, counts):
    sums, want = Sums(size, p, max(counts), True, np.float32), np.zeros((size, p))
    for n in counts:
        features, rows = matrices((size, n), (n, p))
        sums.add(features, rows)
        want += rounded(features).astype(np.float64) @ rounded(rows)
    np.testing.assert_allclose(sums.total(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suite", [_KeySums, _KeyVjp, _QueryVjp])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_processors_without_pairs_do_not_round(suite, dtype, monkeypatch):
    arrays, options = suite().inputs(np.random.default_rng(0), dtype, 200, 150)
    op = suite.op.kernel("cpu")
    fine = op(*arrays, **options)
    if dtype == np.float32:
        monkeypatch.setattr(products, "multiplies_bytes", lambda: False)
    for one, other in zip(
        op(*arrays, **options, low_precision=True), fine, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@needs_eight_bits
@pytest.mark.parametrize(
    ("suite", "same"), [(_KeySums, [1, 2]), (_KeyVjp, []), (_QueryVjp, [2])]
)
def test_sums_of_weights_are_not_rounded(suite, same):
    arrays, options = suite().inputs(np.random.default_rng(0), np.float32, 256, 256)
    op = suite.op.kernel("cpu")
    fine, found = op(*arrays, **options), op(*arrays, **options, low_precision=True)
    for i, (one, other) in enumerate(zip(found, fine, strict=True)):
        assert np.array_equal(one, other) == (i in same)
        used = np.isfinite(other)
        far = np.linalg.norm(np.subtract(one[used], other[used], dtype=float))
        assert far <= 4 * ROUNDING * np.linalg.norm(other[used])
    if suite is _KeySums:
        np.testing.assert_array_equal(found[0][:, -1], fine[0][:, -1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_low_precision_derivatives_err_little_more(is_causal):
    *inputs, grad = problem(n=3000, m=3000, d=4, p=5, spread=0.6, dtype=np.float32)
    prefix_lengths = np.arange(3000) + 1 if is_causal else None
    head = Head(*inputs, 0.5, prefix_lengths)
    truth = softmax_vjp(*inputs, grad, is_causal=is_causal)
    rng = np.random.default_rng(0)
    sample = PlanningSample.of(head.unmasked(), rng)
    empty = LowRank.plan(sample, rank=35, landmarks=0, rng=rng)
    worst = []
    for low_precision in (False, True):
        gradients, seen = lowrank_vjp(
            head, grad, replace(empty, low_precision=low_precision), rng
        )
        errors = [
            oracles.frobenius_error(x, y) for x, y in zip(gradients, truth, strict=True)
        ]
        worst.append(max(errors))
        assert seen >= 0.8 * worst[-1]
    assert worst[1] <= 1.02 * worst[0] + 2 * ROUNDING


def test_only_tolerances_with_room_take_low_precision(monkeypatch):
    inputs = problem(n=4500, m=4400, d=4, p=5, spread=0.6, dtype=np.float32)
    seen = []

    def look(head, grad, empty, *args):
        seen.append(empty.low_precision)
        return lowrank_vjp(head, grad, empty, *args)

    monkeypatch.setattr(lowrank_gradient, "lowrank_vjp", look)
    for tol in (3e-2, 4e-3):
        seen.clear()
        attention_vjp(*inputs, tol=tol, rng=0)
        assert seen
        assert all(x == (tol > 1e-2) for x in seen)


def test_a_low_rank_that_is_asked_for_is_in_full_precision(monkeypatch):
    *inputs, grad = problem(n=1500, m=1400, d=4, p=5, spread=0.6, dtype=np.float32)
    method = Polynomial(rank=126, basis="hermite")
    fine = attention_vjp(*inputs, grad, method=method, tol=3e-2, rng=0)
    monkeypatch.setattr(products, "multiplies_bytes", lambda: False)
    again = attention_vjp(*inputs, grad, method=method, tol=3e-2, rng=0)
    for one, other in zip(fine, again, strict=True):
        np.testing.assert_array_equal(one, other)
