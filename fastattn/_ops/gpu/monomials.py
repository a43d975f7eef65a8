"""Monomials of a tile of rows in shared memory, multiplied where they are made.

Only :func:`monomials` itself writes monomials to global memory. A monomial is the
product of its own coordinates, so that no tile waits for another one's.

Not run on a device yet: the kernels were compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in; block sizes are estimates.
"""

import functools

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel

# as in monomials.cu
_THREADS = 128
_TILE = 64
_DEPTH = 32
# rows whose coordinates exist at once
_ROWS = 1 << 18
# blocks that keep every multiprocessor busy
_BLOCKS = 2048
# rows that a block of moments sums in working precision: least and most
_SPANS = (128, 1024)
# all partial sums together stay below this many bytes
_LARGEST_PARTS = 1 << 26
# the most blocks that a grid has in its second and third direction
_LARGEST_GRID = 65535


def monomials(x, *, parent, coordinate):
    rows, rank = len(x), len(parent)
    start, factor = _factors(parent, coordinate)
    features = cp.empty((rank, rows), dtype=x.dtype)
    kernel("monomials.cu", "monomials", x.dtype)(
        (-(-rows // _THREADS), min(rank, _LARGEST_GRID)),
        (_THREADS,),
        (cp.ascontiguousarray(x.T), start, factor, features, rows, rank),
    )
    return features.T


def moments(key, value, center, projection, tilt, middle, *, parent, coordinate):
    dtype, rank, (m, p) = projection.dtype, len(parent), value.shape
    start, factor = _factors(parent, coordinate)
    tiles = -(-rank // _TILE), max(1, -(-p // _TILE))
    span = _span(min(m, _ROWS), tiles[0] * tiles[1])
    largest = _LARGEST_PARTS // (rank * (p + 1) * dtype.itemsize)
    size = span * max(1, min(_ROWS // span, largest))
    total = cp.zeros((rank, p + 1), dtype=cp.float64)
    for lo in range(0, m, size):
        rows = min(size, m - lo)
        centred = key[lo : lo + rows].astype(dtype, copy=False) - center
        weight = cp.exp(cp.matmul(centred, tilt))
        values = value[lo : lo + rows].astype(dtype, copy=False) - middle
        parts = cp.empty((-(-rows // span), rank, p + 1), dtype=dtype)
        kernel("monomials.cu", "moments", dtype)(
            (*tiles, len(parts)),
            (_THREADS,),
            (
                _coordinates(centred, projection), weight, cp.ascontiguousarray(values),
                start, factor, parts, rows, span, rank, p,
            ),
        )  # fmt: skip
        total += parts.sum(axis=0, dtype=cp.float64)
    return total.astype(dtype)


def means(query, center, projection, readout, middle, *, parent, coordinate):
    dtype, rank, n = projection.dtype, len(parent), len(query)
    p = readout.shape[1] - 1
    start, factor = _factors(parent, coordinate)
    readout, middle = cp.ascontiguousarray(readout), cp.ascontiguousarray(middle)
    value, total = cp.empty((n, p), dtype=dtype), cp.empty(n, dtype=dtype)
    for lo in range(0, n, _ROWS):
        rows = min(_ROWS, n - lo)
        centred = query[lo : lo + rows].astype(dtype, copy=False) - center
        kernel("monomials.cu", "means", dtype)(
            (-(-rows // _TILE), max(1, -(-p // _TILE))),
            (_THREADS,),
            (
                _coordinates(centred, projection), readout, middle, start, factor,
                value[lo : lo + rows], total[lo : lo + rows], rows, rank, p,
            ),
        )  # fmt: skip
    return value, total


def _coordinates(centred, projection):
    """Coordinates of the rows, one coordinate to a line of memory."""
    return cp.ascontiguousarray(cp.matmul(projection.T, centred.T))


def _span(rows, tiles):
    """Rows that a block sums: a multiple of a tile's, few if blocks are wanting."""
    least, most = _SPANS
    return _DEPTH * -(-max(least, min(most, rows * tiles // _BLOCKS)) // _DEPTH)


def _factors(parent, coordinate):
    """Return the coordinates whose product each monomial is, on the current device.

    The coordinates of monomial ``j`` are numbers ``start[j]`` to ``start[j + 1] - 1``
    of ``factor``.
    """
    recipe = (np.asarray(x, dtype=np.int64).tobytes() for x in (parent, coordinate))
    return _moved_factors(cp.cuda.runtime.getDevice(), *recipe)


@functools.lru_cache(maxsize=16)
def _moved_factors(device, parent, coordinate):  # noqa: ARG001 (a part of the key)
    parent, coordinate = (np.frombuffer(x, np.int64) for x in (parent, coordinate))
    chain, place = [], np.arange(len(parent))
    while place.any():
        chain.append(np.where(place > 0, coordinate[place], -1))
        place = parent[place]
    # from the root down, in the order of the reference, which makes roundings equal
    factors = np.array(chain[::-1], dtype=np.int32).reshape(-1, len(parent)).T
    start = np.append(0, np.cumsum(np.sum(factors >= 0, axis=1)))
    moved = cp.asarray(start.astype(np.int32)), cp.asarray(factors[factors >= 0])
    # later calls may come from other streams
    cp.cuda.get_current_stream().synchronize()
    return moved
