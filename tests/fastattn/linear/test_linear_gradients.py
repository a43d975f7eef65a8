"""Derivatives of linear attention: finite differences, torch, and what they owe."""

import numpy as np
import pytest

from fastattn import (
    EluPlusOne,
    Identity,
    RandomFeatures,
    RefusalError,
    Taylor,
    linear_attention,
    linear_attention_vjp,
)
from tests.derivatives import unbroadcast
from tests.fastattn.linear.test_linear import KINDS_OF_ROWS, MAPS, problem


def grad_of(inputs, seed=9):
    query, _, value = inputs
    shape = (*query.shape[:-1], value.shape[-1])
    grad = np.random.default_rng(seed).standard_normal(shape)
    return grad.astype(query.dtype)


def assert_gradients(inputs, grad, gradients, options, rtol=1e-5):
    """Compare with central differences along one random direction for each input."""
    rng, h = np.random.default_rng(11), 1e-6
    for number, gradient in enumerate(gradients):
        step = rng.standard_normal(inputs[number].shape)

        def loss(sign, number=number, step=step):
            moved = list(inputs)
            moved[number] = inputs[number] + sign * h * step
            return np.sum(grad * linear_attention(*moved, **options))

        want = (loss(1) - loss(-1)) / 2 / h
        assert gradient.shape == inputs[number].shape
        assert np.sum(gradient * step) == pytest.approx(want, rel=rtol, abs=1e-6)


@pytest.mark.parametrize("options", KINDS_OF_ROWS, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradients_are_finite_differences(feature_map, options):
    inputs = problem(n=30, m=23)
    mask = np.random.default_rng(1).random(23) < 0.7
    options = {"feature_map": feature_map, "key_mask": mask, **options}
    grad = grad_of(inputs)
    gradients = linear_attention_vjp(*inputs, grad, **options)
    assert_gradients(inputs, grad, gradients, options, rtol=1e-4)
    np.testing.assert_array_equal(gradients[1][~mask], 0)
    np.testing.assert_array_equal(gradients[2][~mask], 0)


@pytest.mark.parametrize("options", KINDS_OF_ROWS[:3], ids=str)
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (65, 65), (300, 70), (70, 300), (2100, 9)]
)
@pytest.mark.parametrize("feature_map", [EluPlusOne(), RandomFeatures(8)], ids=str)
def test_gradients_are_finite_differences_around_blocks(feature_map, n, m, options):
    inputs = problem(n=n, m=m)
    options = {"feature_map": feature_map, **options}
    grad = grad_of(inputs)
    gradients = linear_attention_vjp(*inputs, grad, **options)
    assert_gradients(inputs, grad, gradients, options, rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_broadcast_heads_add_up(is_causal):
    query, _, _ = problem(lead=(2, 3), n=11)
    _, key, value = problem(lead=(2, 1), m=13)
    whole = [np.broadcast_to(x, (2, 3, *x.shape[-2:])) for x in (query, key, value)]
    grad = grad_of(whole)
    options = {"feature_map": EluPlusOne(), "is_causal": is_causal}
    got = linear_attention_vjp(query, key, value, grad, **options)
    want = linear_attention_vjp(*whole, grad, **options)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, unbroadcast(y, x.shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", KINDS_OF_ROWS[:3], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_library_and_dtype_follow_the_inputs(xp, feature_map, options):
    plain = problem(n=20, m=17, dtype=np.float32)
    grad = grad_of(plain)
    *inputs, out = xp.asarrays(*plain, grad)
    options = {"feature_map": feature_map, **options}
    got = linear_attention_vjp(*inputs, out, **options)
    wide = [x.astype(float) for x in (*plain, grad)]
    want = linear_attention_vjp(*wide, **options)
    for x, y in zip(got, want, strict=True):
        assert isinstance(x, xp.array_type)
        assert xp.dtype_name(x) == "float32"
        np.testing.assert_allclose(np.asarray(x), y, atol=2e-3 * np.abs(y).max())


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_those_of_torch(is_causal):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    inputs = problem(n=90, m=90)
    grad = grad_of(inputs)
    query, key, value = (torch.from_numpy(x).requires_grad_() for x in inputs)
    left, right = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    weights = left @ right.T
    weights = weights.tril() if is_causal else weights
    out = weights @ value / weights.sum(dim=1, keepdim=True)
    want = torch.autograd.grad(out, (query, key, value), torch.from_numpy(grad))
    got = linear_attention_vjp(
        *inputs, grad, feature_map=EluPlusOne(), is_causal=is_causal
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", KINDS_OF_ROWS, ids=str)
def test_without_keys_gradients_are_zero(options):
    inputs = problem(n=5, m=6)
    options = {"feature_map": Taylor(), "key_mask": np.zeros(6, bool), **options}
    for x, gradient in zip(
        inputs, linear_attention_vjp(*inputs, grad_of(inputs), **options), strict=True
    ):
        np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_misuse_is_named():
    inputs = problem(n=5, m=6)
    grad = grad_of(inputs)
    with pytest.raises(ValueError, match="grad_output: expected shape"):
        linear_attention_vjp(*inputs, grad[1:], feature_map=Identity())
    with pytest.raises(TypeError, match="feature_map: expected a feature map"):
        linear_attention_vjp(*inputs, grad, feature_map=None)


def test_gradients_that_overflow_are_refused():
    query, key, value = problem(n=5, m=6, dtype=np.float32)
    grad = grad_of((query, key, value))
    with pytest.raises(RefusalError, match="overflows float32"):
        linear_attention_vjp(
            1e15 * query, 1e15 * key, value, grad, feature_map=Taylor()
        )


def test_weights_that_vanish_are_refused():
    query, key, value = problem(n=5, m=6, dtype=np.float32)
    query[1], key[:] = 50, -50
    grad = grad_of((query, key, value))
    feature_map = RandomFeatures(64)
    with pytest.raises(RefusalError, match="all weights of 1 rows vanish in float32"):
        linear_attention_vjp(query, key, value, grad, feature_map=feature_map)
