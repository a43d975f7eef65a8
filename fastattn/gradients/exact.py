"""Derivatives over all logits: exact ones, and coarse ones that are checked.

Where the processor multiplies bfloat16 numbers in half the time, a tolerance may leave
room for that. Rows and keys are then compared with their exact derivatives, as those of
a low rank are.
"""

import numpy as np

from fastattn._ops.gradient import attend_vjp, multiplies_in_low_precision
from fastattn.gradients.backward import SLACK, Backward, exact_vjp_work
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# rounding made derivatives of real heads err by up to 0.016: a half of three times this
ENOUGH = 0.01
# heads with fewer logits than this are differentiated exactly: the check costs as much
_FEW_LOGITS = 1 << 23
# rounding errs alike in all rows: few of them tell where it is far from what is allowed
_FEW, _SURE = 48, 0.5
# time of rounded products and their check, in times of exact ones by BLAS
_COARSE = 0.5


def low_precision_vjp(
    head: Head, grad: Array, tol: float, rng: np.random.Generator
) -> Gradients | None:
    """Differentiate in products of rounded numbers, if these meet ``3 * tol``."""
    if not _may_round(head, tol):
        return None
    xp, found = head.xp, {}

    def beside(rows: slice, normalizer: Array, delta: Array) -> tuple[Array, Array]:
        found[rows.start] = normalizer, delta
        return normalizer, delta

    # of numbers that overflow the check is not content with what comes
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
        enough = _SURE * SLACK * tol
        error = state.error(gradients, np.arange(0), rng, enough, few=_FEW)
    return gradients if error <= SLACK * tol else None


def vjp_work(head: Head, tol: float) -> float:
    """Work of what is done where nothing else pays, in units of ``exact_vjp_work``."""
    return exact_vjp_work(head) * (_COARSE if _may_round(head, tol) else 1.0)


def _may_round(head: Head, tol: float) -> bool:
    """Whether rounded products are tried."""
    return (
        tol >= ENOUGH
        and head.logits >= _FEW_LOGITS
        # derivatives by the answer have the width and the dtype of values
        and multiplies_in_low_precision(head.query, head.key, head.value, head.value)
    )


def exact_vjp(head: Head, grad: Array) -> Gradients:
    """Differentiate one head exactly, in a precision where nothing overflows."""
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
