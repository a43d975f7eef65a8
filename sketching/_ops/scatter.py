"""Entries of rows, added to few coordinates each."""

from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op


@op("cpu")
def scatter_columns(x: Array, places: Array, weights: Array, *, size: int) -> Array:
    """Add ``weights[j, t] * x[..., j]`` to coordinate ``places[j, t]`` of each row.

    ``x`` is ``(..., d)``, ``places`` and ``weights`` are ``(d, s)``; the answer is
    ``(..., size)``.
    """
    xp = array_namespace(x, places, weights)
    targets = xp.arange(size, dtype=places.dtype, device=device_of(x))
    is_there = places[:, :, None] == targets
    zero = xp.zeros_like(weights)[:, :, None]
    return xp.matmul(x, xp.sum(xp.where(is_there, weights[:, :, None], zero), axis=1))
