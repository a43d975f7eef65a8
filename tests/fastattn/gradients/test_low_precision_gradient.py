"""Derivatives in products of rounded numbers: checked, and left where they miss."""

import numpy as np
import pytest

from fastattn import Exact, attention_vjp
from fastattn._ops.cpu.tiles import multiplies_bytes
from fastattn._ops.gradient import attend_vjp
from fastattn.costs.policy import POLICY
from tests.derivatives import problem, softmax_vjp

# each number is off by up to 2 ** -9 of itself; here errors were up to 0.005
ROUNDING = 0.01

needs_pairs = pytest.mark.skipif(
    not multiplies_bytes(), reason="the processor has no AVX-512 BF16 and VNNI"
)


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    # as if the check cost nothing
    monkeypatch.setitem(vars(POLICY.gradients), "few_rounded_logits", 0)


def errors(found, truth):
    return [
        np.linalg.norm(x - y) / np.linalg.norm(y)
        for x, y in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize(("n", "m"), [(40, 300), (301, 203), (1100, 1030)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_low_precision_derivatives_are_off_by_rounding(n, m, is_causal):
    inputs = problem(n, m, 32, 64, dtype=np.float32)
    prefix_lengths = np.arange(n).clip(max=m) if is_causal else None
    options = {"scale": 0.2, "prefix_lengths": prefix_lengths}
    known = {}

    def beside(rows, normalizer, delta):
        known[rows.start] = normalizer, delta
        return normalizer, delta

    found = attend_vjp(*inputs, low_precision=True, beside=beside, **options)
    assert max(errors(found, attend_vjp.reference(*inputs, **options))) <= ROUNDING
    # threads ask in no fixed order
    parts = (known[start] for start in sorted(known))
    normalizer, delta = map(np.concatenate, zip(*parts, strict=True))
    logits = 0.2 * inputs[0].astype(float) @ inputs[1].T
    if is_causal:
        logits[np.arange(m) >= prefix_lengths[:, None]] = -np.inf
        logits, normalizer, delta = logits[1:], normalizer[1:], delta[1:]
    truth = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(normalizer, truth, atol=ROUNDING)
    weights = np.exp(logits - truth[:, None])
    wanted = np.sum(inputs[3][-len(weights) :] * (weights @ inputs[2]), axis=1)
    assert np.linalg.norm(delta - wanted) <= ROUNDING * np.linalg.norm(wanted)


@needs_pairs
@pytest.mark.parametrize("is_causal", [False, True])
def test_rounded_products_are_taken_within_the_tolerance(is_causal):
    inputs = problem(2100, 2100, 32, 32, dtype=np.float32, spread=1.5)
    options = {"is_causal": is_causal, "rng": 0}
    found = attention_vjp(*inputs, tol=0.01, **options)
    exact = attention_vjp(*inputs, method=Exact(), **options)
    assert max(errors(found, softmax_vjp(*inputs, is_causal=is_causal))) <= 0.03
    assert not np.array_equal(found[0], exact[0])


@needs_pairs
def test_rounding_that_shows_is_not_taken():
    # logits of up to a hundred, of which a part in 2 ** 9 is much
    query, key, value, grad = problem(1600, 1600, 32, 32, dtype=np.float32, spread=2)
    options = {"scale": 1.0, "rng": 0}
    found = attention_vjp(query, key, value, grad, tol=0.01, **options)
    exact = attention_vjp(query, key, value, grad, method=Exact(), **options)
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("options", [{"tol": 0.005}, {"guarantee": "proven"}])
def test_nothing_is_rounded_where_that_is_not_allowed(options):
    inputs = problem(1600, 1600, 32, 32, dtype=np.float32, spread=2)
    found = attention_vjp(*inputs, rng=0, **options)
    for x, y in zip(found, attention_vjp(*inputs, method=Exact()), strict=True):
        np.testing.assert_array_equal(x, y)


def test_numbers_that_overflow_are_refined_or_refused_as_before():
    query, key, value, grad = problem(1600, 1600, 32, 32, dtype=np.float32)
    inputs = 1e20 * query, 1e20 * key, value, grad
    for x, y in zip(
        attention_vjp(*inputs, rng=0),
        attention_vjp(*inputs, method=Exact()),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
