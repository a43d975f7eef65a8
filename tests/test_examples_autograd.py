"""The torch example: derivatives that gradcheck accepts, and a loss that falls."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

EXAMPLE = "torch_autograd"


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_accepts_the_derivative(example, is_causal):
    assert example.check(is_causal)


def test_gradients_are_those_of_scaled_dot_product_attention(example):
    torch.manual_seed(1)
    ours = [torch.randn(2, 40, 8, requires_grad=True) for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    grad = torch.randn(2, 40, 8)
    example.attend(*ours, is_causal=True).backward(grad)
    attend = torch.nn.functional.scaled_dot_product_attention
    attend(*theirs, is_causal=True).backward(grad)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_lowers_the_loss(example, capsys):
    assert example.main() == 0
    assert "finite differences: True" in capsys.readouterr().out
