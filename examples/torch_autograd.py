"""Train through fastattn: attention and its derivative as one torch.autograd.Function.

``attend`` is called like scaled_dot_product_attention, on tensors of the CPU that
require gradients, and works inside any model. NumPy views share the tensors' memory, so
that nothing is copied and the compiled kernels run. Below, ``torch.autograd.gradcheck``
compares the derivative with finite differences, and a few steps of gradient descent
learn queries that reproduce the output of others.

    pip install 'fastattn[bench]'
    python examples/torch_autograd.py
"""

import sys
from typing import Any

import torch
from torch.autograd import gradcheck
from torch.autograd.function import once_differentiable

import fastattn

SEED = 0


class Attention(torch.autograd.Function):
    """Softmax attention to a tolerance, with its vector-Jacobian product."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attend; save the inputs of the backward pass."""
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        arrays = (x.detach().numpy() for x in (query, key, value))
        return torch.from_numpy(fastattn.attention(*arrays, **options))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of query, key and value."""
        tensors = (*ctx.saved_tensors, grad_output)
        arrays = (x.detach().numpy() for x in tensors)
        gradients = fastattn.attention_vjp(*arrays, **ctx.options)
        return (*(torch.from_numpy(x) for x in gradients), None)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Call :func:`fastattn.attention`, with its options, on tensors."""
    return Attention.apply(query, key, value, options)


def check(is_causal: bool = False) -> bool:
    """Compare the derivative with finite differences in float64."""
    torch.manual_seed(SEED)
    shapes = [(2, 1, 5, 3), (1, 2, 6, 3), (2, 6, 4)]
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]
    return gradcheck(lambda *x: attend(*x, is_causal=is_causal), tensors)


def train(steps: int = 60, rate: float = 60.0) -> list[float]:
    """Learn queries from an output; returns the loss before each step."""
    torch.manual_seed(SEED)
    wanted, key, value = torch.randn(3, 32, 8).unbind()
    with torch.no_grad():
        target = attend(wanted, key, value)
    query = torch.zeros_like(wanted, requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = torch.mean((attend(query, key, value) - target) ** 2)
        (slope,) = torch.autograd.grad(loss, query)
        with torch.no_grad():
            query -= rate * slope
        losses.append(loss.item())
    return losses


def main() -> int:
    """Check the derivative, then train; returns 0 if both went well."""
    right = check() and check(is_causal=True)
    losses = train()
    sys.stdout.write(
        f"derivative agrees with finite differences: {right}\n"
        f"loss {losses[0]:.2e} before, {losses[-1]:.2e} after {len(losses)} steps\n"
    )
    return 0 if right and losses[-1] < losses[0] / 4 else 1


if __name__ == "__main__":
    sys.exit(main())
