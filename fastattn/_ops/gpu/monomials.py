"""Monomials of a tile of rows in shared memory, multiplied where they are made.

Only :func:`monomials` itself writes monomials to global memory. A monomial is the
product of its own coordinates, so that tiles are independent. This holds for large
ranks too: a monomial costs as many products as it has factors, few compared with the
``p`` columns that it is multiplied by.

Not run on a device yet: the kernels were compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in; block sizes are estimates.
"""

import functools

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel
from fastattn._ops.gpu.products import (
    ROWS,
    THREADS,
    lines,
    move_lists,
    spans,
    sum_products,
    tiles,
)

# the most blocks that a grid has in its second and third direction
_LARGEST_GRID = 65535


def monomials(x, *, parent, coordinate):
    rows, rank = len(x), len(parent)
    start, factor = _factors(parent, coordinate)
    features = cp.empty((rank, rows), dtype=x.dtype)
    kernel("monomials.cu", "monomials", x.dtype)(
        (-(-rows // THREADS), min(rank, _LARGEST_GRID)),
        (THREADS,),
        (cp.ascontiguousarray(x.T), start, factor, features, rows, rank),
    )
    return features.T


def moments(key, value, center, projection, tilt, value_center, *, parent, coordinate):
    dtype, rank, (m, p) = projection.dtype, len(parent), value.shape
    indices = _factors(parent, coordinate)
    span, size = spans(m, rank, p, dtype)
    total = cp.zeros((rank, p + 1), dtype=cp.float64)
    for lo in range(0, m, size):
        rows = slice(lo, min(lo + size, m))
        centred = key[rows].astype(dtype, copy=False) - center
        weight = cp.exp(cp.matmul(centred, tilt))
        values = value[rows].astype(dtype, copy=False) - value_center
        total += sum_products(
            lines(centred, projection), weight, values, indices, rank, span
        )
    return total.astype(dtype)


def means(query, center, projection, readout, value_center, *, parent, coordinate):
    dtype, rank, n = projection.dtype, len(parent), len(query)
    p = readout.shape[1] - 1
    start, factor = _factors(parent, coordinate)
    readout, value_center = (
        cp.ascontiguousarray(readout),
        cp.ascontiguousarray(value_center),
    )
    value, total = cp.empty((n, p), dtype=dtype), cp.empty(n, dtype=dtype)
    for lo in range(0, n, ROWS):
        rows = min(ROWS, n - lo)
        centred = query[lo : lo + rows].astype(dtype, copy=False) - center
        kernel("monomials.cu", "means", dtype)(
            tiles(rows, p),
            (THREADS,),
            (
                lines(centred, projection), readout, value_center, start, factor,
                value[lo : lo + rows], total[lo : lo + rows], rows, rank, p,
            ),
        )  # fmt: skip
    return value, total


def _factors(parent, coordinate):
    """Return the coordinates whose product each monomial is, on the current device.

    The coordinates of monomial ``j`` are numbers ``start[j]`` to ``start[j + 1] - 1``
    of ``factor``.
    """
    indices = (np.asarray(x, dtype=np.int64).tobytes() for x in (parent, coordinate))
    return _moved_factors(cp.cuda.runtime.getDevice(), *indices)


@functools.lru_cache(maxsize=16)
def _moved_factors(device, parent, coordinate):  # noqa: ARG001 (a part of the key)
    parent, coordinate = (np.frombuffer(x, np.int64) for x in (parent, coordinate))
    chain, place = [], np.arange(len(parent))
    while place.any():
        chain.append(np.where(place > 0, coordinate[place], -1))
        place = parent[place]
    # from the root down, in the order of the reference, which makes roundings equal
    return move_lists(np.array(chain[::-1]).reshape(-1, len(parent)).T)
