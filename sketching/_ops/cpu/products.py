"""Products of rows with one vector, which run at the speed of memory."""

import numpy as np
from numba import njit

from sketching._ops.cpu.elementary import REASSOCIATE

# bytes of a vector that leaves room for rows in the first cache
_SHORT = 1 << 14


def vector_products(rows, vector):
    """Multiply rows by a vector: BLAS is better only where the vector is long."""
    if vector.nbytes > _SHORT and rows.dtype == vector.dtype:
        return rows @ vector
    out = np.empty(len(rows), vector.dtype)
    products(rows, vector, out)
    return out


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def products(rows, vector, out):
    """Write the product of each row, of floats or integers, with the vector."""
    kind = vector.dtype.type
    for i in range(rows.shape[0]):
        row, total = rows[i], kind(0)
        for t in range(row.size):
            total += kind(row[t]) * vector[t]
        out[i] = total
