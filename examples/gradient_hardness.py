"""Gradients are as hard as attention: orthogonal vectors from derivatives alone.

The loss of one attention layer is ``L(X) = |softmax(A1 X A2^T) A3|^2 / 2``. Along
``X = lambda I`` twice the loss is ``f(lambda)``, the squared norm of the output. At
lambda = 0 all softmax weights are equal, so ``f(0)`` is known; its derivative is twice
the trace of the gradient. A sum of derivatives gives ``f(1) - f(0)``, hence ``f(1)``,
and on the inputs of a reduction ``f(1)`` decides whether two of the vectors are
orthogonal. A fast algorithm for such gradients would decide orthogonal vectors fast
(arXiv 2402.04497).

    python examples/gradient_hardness.py
"""

import math
import sys

import numpy as np

import fastattn
from lowerbounds import (
    AttentionInstance,
    VectorInstance,
    least_dimension,
    orthogonal_vectors,
    reduce_to_attention,
)

N = 16
STEPS = 128
# the squared norm is near 1 with a solution and near 0 without one
THRESHOLD = 0.5


def inputs_of(instance: VectorInstance) -> AttentionInstance:
    """Inputs of attention for which the squared norm of the output decides.

    Doubling the exponent of the reduction makes the outputs of instances without a
    solution so small that the sum of their squares over all rows is small, too.
    """
    made = reduce_to_attention(instance)
    return made.scaled(math.sqrt(2))


def squared_norm(made: AttentionInstance, factor: float) -> float:
    """f: the squared norm of the output at ``factor`` times the identity."""
    output = fastattn.attention(
        *made.arguments, scale=factor * made.scale, method=fastattn.Exact()
    )
    return float((output**2).sum())


def slope(made: AttentionInstance, factor: float) -> float:
    """The derivative of f, from the gradient of the loss."""
    query, key, value = made.arguments
    gradient = fastattn.loss_gradient(
        query,
        key,
        value,
        factor * np.eye(query.shape[1]),
        np.eye(1),
        np.zeros((len(query), 1)),
        scale=made.scale,
        method=fastattn.Exact(),
        rng=0,
    )
    return 2 * float(np.trace(gradient))


def rise(made: AttentionInstance, steps: int) -> float:
    """f(1) - f(0) as the integral of the derivative, by the midpoint rule."""
    return sum(slope(made, (i + 0.5) / steps) for i in range(steps)) / steps


def decide(instance: VectorInstance, steps: int = STEPS) -> bool:
    """Decide whether there are orthogonal vectors, from gradients alone."""
    made = inputs_of(instance)
    start = len(made.query) * float(made.value.mean()) ** 2
    return start + rise(made, steps) > THRESHOLD


def errors_of(pair: list[VectorInstance], steps: int) -> list[float]:
    """Errors of the midpoint rule: sums of derivatives against f(1) - f(0)."""
    errors = []
    for instance in pair:
        made = inputs_of(instance)
        truth = squared_norm(made, 1.0) - squared_norm(made, 0.0)
        errors.append(abs(rise(made, steps) - truth))
    return errors


def main() -> int:
    """Show the error of the sums, then decide; return 0 if all decisions are right."""
    d = least_dimension(N, expected=1e-3)
    instances = [
        orthogonal_vectors(N, d, planted=seed % 2 == 0, rng=seed) for seed in range(10)
    ]
    lines = [
        f"error of f(1) - f(0) by a sum of derivatives, n = {N}, d = {d}",
        "  steps  with a solution  without",
    ]
    for steps in (STEPS // 4, STEPS, 2 * STEPS):
        planted, empty = errors_of(instances[:2], steps)
        lines.append(f"{steps:7d}  {planted:15.2e}  {empty:7.2e}")
    right = sum(decide(x) is x.has_solution for x in instances)
    lines.append(f"decided right from {STEPS} gradients: {right} of {len(instances)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if right == len(instances) else 1


if __name__ == "__main__":
    sys.exit(main())
