"""Gradients over all logits: exact ones, and bfloat16 ones that are checked.

Where the processor multiplies bfloat16 matrices in half the time, and the tolerance is
large enough, matrix products are in bfloat16. The error is then estimated on sampled
rows and keys, as for low-rank gradients.
"""

import numpy as np

from fastattn._ops.gradient import attend_vjp, multiplies_in_low_precision
from fastattn.costs.policy import POLICY
from fastattn.gradients.backward import SLACK, Backward, exact_vjp_work
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError


def low_precision_vjp(
    head: Head, grad: Array, tol: float, rng: np.random.Generator
) -> Gradients | None:
    """Gradients by bfloat16 matrix products, or None if these miss ``3 * tol``."""
    policy = POLICY.gradients
    if not _may_round(head, tol):
        return None
    xp, found = head.xp, {}

    def beside(rows: slice, normalizer: Array, delta: Array) -> tuple[Array, Array]:
        found[rows.start] = normalizer, delta
        return normalizer, delta

    # an overflow gives an infinite error estimate
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        gradients: Gradients = attend_vjp(
            head.query,
            head.key,
            head.value,
            grad,
            scale=head.scale,
            prefix_lengths=head.prefix_lengths,
            beside=beside,
            low_precision=True,
        )
        known = zip(*(found[start] for start in sorted(found)), strict=True)
        state = Backward(head, grad, *(xp.concat(list(x)) for x in known))
        enough = policy.sure * SLACK * tol
        error = state.error(gradients, np.arange(0), rng, enough, few=policy.check_rows)
    return gradients if error <= SLACK * tol else None


def vjp_work(head: Head, tol: float) -> float:
    """Work over all logits, in bfloat16 where allowed; units of ``exact_vjp_work``."""
    return exact_vjp_work(head) * (
        POLICY.gradients.rounded_time if _may_round(head, tol) else 1.0
    )


def _may_round(head: Head, tol: float) -> bool:
    """Whether bfloat16 products are tried."""
    return (
        tol >= POLICY.gradients.low_precision_tol
        and head.logits >= POLICY.gradients.few_rounded_logits
        # the gradient of the output has the width and the dtype of values
        and multiplies_in_low_precision(head.query, head.key, head.value, head.value)
    )


def exact_vjp(head: Head, grad: Array) -> Gradients:
    """Exact gradients of one head, in float64 where its own dtype may overflow."""
    xp, (_, m, d, p) = head.xp, head.sizes
    if m == 0:
        query, key, value = (xp.zeros_like(x, dtype=head.dtype) for x in _arrays(head))
        return query, key, value
    peaks = [float(xp.max(xp.abs(x))) for x in (*_arrays(head), grad)]
    largest = max(d * abs(head.scale) * peaks[0] * peaks[1], p * peaks[2] * peaks[3])
    for dtype in dict.fromkeys([head.dtype, xp.float64]):
        if largest <= float(xp.finfo(dtype).max) / 16:
            gradients: Gradients = attend_vjp(
                xp.astype(head.query, dtype, copy=False),
                head.key,
                head.value,
                grad,
                scale=head.scale,
                prefix_lengths=head.prefix_lengths,
            )
            return gradients
    raise RefusalError(
        f"products of up to {largest:.1e} overflow float64: scale query, key, value or "
        "grad_output down"
    )


def _arrays(head: Head) -> tuple[Array, Array, Array]:
    return head.query, head.key, head.value
