"""Of many rows: one polynomial from those that it is made from, and energies."""

import numpy as np
from numba import njit

from sketching._ops.cpu.elementary import REASSOCIATE


@njit(nogil=True, error_model="numpy", fastmath=REASSOCIATE, inline="always")
def add_polynomial(j, x, parent, grandparent, coordinate, factor, lower, features):
    # number j from the one it was made from, and for Hermite that one's own
    row, source, side = features[j], features[parent[j]], x[coordinate[j]]
    w = factor[j]
    if lower[j] == 0:
        for i in range(row.size):
            row[i] = source[i] * side[i] * w
    else:
        back, v = features[grandparent[j]], lower[j]
        for i in range(row.size):
            row[i] = source[i] * side[i] * w - v * back[i]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def energies(x, spread):
    # of columns: their squares, weighted by the spread of each coordinate
    energy = np.zeros(x.shape[1], dtype=x.dtype)
    for l in range(spread.size):
        for i in range(x.shape[1]):
            energy[i] += spread[l] * x[l, i] * x[l, i]
    return energy
