"""One polynomial of many rows from those that it is made from."""

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
