"""Products of rows with one vector, which run at the speed of memory."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE
from sketching._ops.cpu.features import has

# bytes of a vector that leaves room for rows in the first cache
_SHORT = 1 << 14
# four rows at once are a quarter faster with AVX2, where one row leaves memory idle;
# with AVX-512 one row at a time was measured to be faster than BLAS
_FOUR = not has("avx512f")


def vector_products(rows, vector):
    """Multiply rows by a vector: BLAS is faster only where the vector is long."""
    if vector.nbytes > _SHORT and rows.dtype == vector.dtype:
        return rows @ vector
    out = np.empty(len(rows), vector.dtype)
    products(rows, vector, out)
    return out


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def products(rows, vector, out):
    """Write the product of each row, of floats or integers, with the vector."""
    kind = vector.dtype.type
    first = rows.shape[0] // 4 * 4 if _FOUR else 0
    for i in range(0, first, 4):
        one, two, three, four = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        a, b, c, d = kind(0), kind(0), kind(0), kind(0)
        for t in range(vector.size):
            x = vector[t]
            a += kind(one[t]) * x
            b += kind(two[t]) * x
            c += kind(three[t]) * x
            d += kind(four[t]) * x
        out[i], out[i + 1], out[i + 2], out[i + 3] = a, b, c, d
    for i in range(first, rows.shape[0]):
        row, total = rows[i], kind(0)
        for t in range(row.size):
            total += kind(row[t]) * vector[t]
        out[i] = total
