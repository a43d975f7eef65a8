"""One pass over points, as a reference for the time of a metric update."""

import numpy as np
from numba import njit


def fused_pass(points, vectors):
    """Products of every point with two vectors, each point read once."""
    out = np.empty((len(points), 2), points.dtype)
    _paired_products(points, *vectors, out)
    return out


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _paired_products(points, left, right, out):
    for i in range(points.shape[0]):
        row = points[i]
        first, second = row.dtype.type(0), row.dtype.type(0)
        for t in range(row.size):
            first += row[t] * left[t]
            second += row[t] * right[t]
        out[i, 0], out[i, 1] = first, second
