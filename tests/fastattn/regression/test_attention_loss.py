"""The derivative of the loss of one attention layer, by its query-key matrix."""

import numpy as np
import pytest

import fastattn
from fastattn import Exact, Polynomial, attention, loss_gradient
from tests import oracles


def layer(n=9, m=10, d=3, e=4, c=5, p=2):
    rng = np.random.default_rng(0)
    shapes = (n, d), (m, e), (m, c), (d, e), (c, p), (n, p)
    return [rng.standard_normal(x) for x in shapes]


def test_loss_gradient_is_that_of_the_paper():
    a1, a2, a3, x, y, target = inputs = layer()
    got = loss_gradient(*inputs, scale=1 / 3)
    f = oracles.attention(a1 @ x, a2, np.eye(10), scale=1 / 3)[0]
    q = (f @ a3 @ y - target) @ (a3 @ y).T
    r = np.sum(f * q, axis=1, keepdims=True)
    np.testing.assert_allclose(got, a1.T @ (f * q - r * f) @ a2 / 3, atol=1e-12)


def test_loss_gradient_is_that_of_finite_differences():
    a1, a2, a3, x, y, target = inputs = layer()
    got = loss_gradient(*inputs)

    def loss(x):
        return np.sum((attention(a1 @ x, a2, a3 @ y) - target) ** 2) / 2

    for entry in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[entry] = 1e-6
        slope = (loss(x + step) - loss(x - step)) / 2e-6
        assert got[entry] == pytest.approx(slope, abs=1e-6)


def test_loss_gradient_of_a_low_rank_is_near_the_exact_one():
    rng = np.random.default_rng(0)
    a1, a2, a3 = rng.standard_normal((3, 1500, 3))
    x, y = 0.4 * rng.standard_normal((2, 3, 3))
    target = rng.standard_normal((1500, 3))
    method = Polynomial(rank=84, basis="hermite")
    got = loss_gradient(a1, a2, a3, x, y, target, method=method, rng=0)
    exact = loss_gradient(a1, a2, a3, x, y, target, method=Exact())
    assert oracles.frobenius_error(got, exact) <= 3e-2


def test_loss_gradient_names_what_does_not_fit():
    inputs = layer()
    for place, message in (
        (3, "a1 has 3 columns and x has 2"),
        (4, "a3 has 5 columns"),
    ):
        broken = list(inputs)
        broken[place] = broken[place][:2]
        with pytest.raises(ValueError, match=message):
            loss_gradient(*broken)
    with pytest.raises(ValueError, match=r"target: expected shape \(9, 2\)"):
        loss_gradient(*inputs[:5], inputs[5][:4])
    assert fastattn.loss_gradient is loss_gradient
