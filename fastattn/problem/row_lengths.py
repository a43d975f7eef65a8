"""Squared norms of rows, moved and turned, a block at a time."""

from typing import Any

import numpy as np

from fastattn._ops.rows import squared_lengths
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    device_of,
    to_host,
)

# rows of a block: a product of it stays in cache
_BLOCK = 2048


def row_lengths(
    x: Array, center: Any = 0, turn: Array | None = None, dtype: Any = None
) -> Array:
    """Squared norms of the rows of ``(x - center) @ turn``, on the host.

    Infinite or NaN where squares overflow; squares that underflow count as zero.

    Parameters
    ----------
    x : array, shape (n, d)
        The rows.
    center : array, shape (d,), or 0
        Subtracted from every row.
    turn : array, shape (d, k) or (d,), optional
        One dimension scales the columns; the identity by default.
    dtype : dtype, optional
        Of computation; by default that of ``x``.
    """
    xp, (n, d) = array_namespace(x), x.shape
    dtype = compute_dtype(xp, x.dtype) if dtype is None else dtype
    move = {"dtype": dtype, "device": device_of(x)}
    zeros, ones, found = xp.zeros(d, **move), xp.ones(d, **move), np.empty(n)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        shift = xp.asarray(center, **move) if np.ndim(center) else zeros
        matrix = ones if turn is None else xp.asarray(turn, **move)
        for start in range(0, n, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n))
            block, args = xp.astype(x[rows, :], dtype, copy=False), (shift, matrix)
            if matrix.ndim > 1:
                few = matrix.shape[1]
                block, args = (block - shift) @ matrix, (zeros[:few], ones[:few])
            found[rows] = to_host(squared_lengths(block, *args))
    return found
