"""Gradients of a batch: check the output gradient, assemble those of the heads."""

import numpy as np

from fastattn.problem.batch import Batch, pick
from fastattn.problem.rows import scatter_rows
from sketching._lib.arrays import Array, array_namespace, plain, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_finite

# gradients with respect to query, key and value
Gradients = tuple[Array, Array, Array]


def check_grad(batch: Batch, grad: Array) -> Array:
    """Check ``grad_output`` against the shape and dtype of the output."""
    try:
        array_namespace(batch.query, grad)
    except TypeError as error:
        raise TypeError(f"grad_output: {error}") from error
    grad = plain(grad)
    if grad.dtype != batch.query.dtype:
        raise TypeError(
            f"grad_output: expected {batch.query.dtype}, as the query, got {grad.dtype}"
        )
    wanted = (*batch.lead, batch.query.shape[-2], batch.value.shape[-1])
    if tuple(grad.shape) != wanted:
        raise ValueError(
            f"grad_output: expected shape {wanted}, as the output of attention, got "
            f"{tuple(grad.shape)}"
        )
    check_finite("grad_output", grad)
    return grad


def unmasked(batch: Batch, place: tuple[int, ...], gradients: Gradients) -> Gradients:
    """Insert zero gradients for masked keys, which the head does not contain."""
    if batch.key_mask is None:
        return gradients
    m = batch.key.shape[-2]
    kept = np.flatnonzero(to_host(pick(batch.key_mask, place, 1)))
    return (
        gradients[0],
        scatter_rows(gradients[1], kept, m),
        scatter_rows(gradients[2], kept, m),
    )


def assembled(name: str, x: Array, sums: dict[tuple[int, ...], Array]) -> Array:
    """Assemble the gradients of the heads in the shape and dtype of an argument."""
    xp = array_namespace(x)
    parts = [sums[place] for place in np.ndindex(*x.shape[:-2])]
    whole = parts[0] if len(parts) == 1 else xp.stack(parts)
    with np.errstate(over="ignore"):
        whole = xp.astype(xp.reshape(whole, x.shape), x.dtype, copy=False)
    if not bool(xp.all(xp.isfinite(whole))):
        raise RefusalError(
            f"the gradient of {name} overflows {x.dtype}: scale grad_output down or "
            "pass arrays of a wider dtype"
        )
    return whole
