"""The centre that is subtracted from the points before they are stored.

A point is stored as its difference from the centre, rounded. Where the centre is far
from zero in units of the standard deviation, that difference is exact for nearly all
points (Sterbenz), and products of it are far more precise than those of the points.
Otherwise the centre is zero: centering would gain little and would not be exact.
"""

import numpy as np

from sketching._lib.arrays import Array

# centred if means exceed so many deviations; a scan loses the square of it in precision
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
    """Which entries of points their centred rows do not determine exactly."""
    with np.errstate(over="ignore"):
        found: Array = rows + center != points
    return found
