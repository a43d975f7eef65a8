"""The centre that points are kept from, so that nothing of them is lost.

A point is kept as its difference to the centre, rounded. Where the centre is far from
zero in units of the spread, that difference is exact for nearly all points (Sterbenz),
and products of it are far more precise than those of the points. Elsewhere the centre
is zero: there it would gain little, and the differences would not be exact.
"""

import numpy as np

from sketching._lib.arrays import Array

# means beyond so many deviations are centred; a scan loses the square of it
_FAR = {4: 4.0, 8: 64.0}
# the centre is a multiple of a power of two below the spread over so much
_COARSE, _FINE = 8, 1024


def centre_of(points: Array, dtype: np.dtype, *, always: bool = False) -> Array:
    """Choose a centre for points, in their precision; ``always`` one of all columns."""
    sums, squares, largest = 0.0, 0.0, 0.0
    for start in range(0, len(points), 4096):
        rows = points[start : start + 4096].astype(np.float64)
        sums = sums + rows.sum(axis=0)
        largest = np.maximum(largest, np.abs(rows).max(axis=0))
    mean = sums / len(points)
    for start in range(0, len(points), 4096):
        rows = points[start : start + 4096].astype(np.float64) - mean
        squares = squares + np.einsum("nd,nd->d", rows, rows)
    spread = np.sqrt(squares / len(points))
    # few bits: differences to it then have no more than the points themselves
    step = np.maximum(
        spread / (_FINE if always else _COARSE), largest * np.finfo(dtype).eps * 4
    )
    step = 2.0 ** np.floor(np.log2(np.maximum(step, np.finfo(dtype).tiny)))
    center = np.rint(mean / step) * step
    is_far = np.abs(mean) > _FAR[dtype.itemsize] * spread
    return np.where(is_far | always, center, 0.0).astype(dtype)


def lossy(points: Array, rows: Array, center: Array) -> Array:
    """Say of every entry whether the centred row does not lead back to the point."""
    with np.errstate(over="ignore"):
        found: Array = rows + center != points
    return found
