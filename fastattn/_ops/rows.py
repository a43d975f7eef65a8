"""Squared lengths of the rows of one head, for its statistics."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def squared_lengths(x: Array, center: Array, factors: Array) -> Array:
    """Sum the squares of each row of ``(x - center) * factors``.

    Parameters
    ----------
    x : array, shape (n, d)
        Of a real dtype of computation, as the others.
    center, factors : array, shape (d,)
        Subtracted from a row, and factors of its columns.

    Returns
    -------
    array, shape (n,)
        Infinite, or NaN, where a square overflows.
    """
    xp = array_namespace(x)
    moved = (x - center) * factors
    return xp.vecdot(moved, moved)
