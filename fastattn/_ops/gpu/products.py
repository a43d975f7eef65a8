"""Products shared by the CuPy kernels: their tiles, and sums over rows of functions."""

import math

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel

# as in tiles.cuh
THREADS = 128
TILE = 64
_DEPTH = 32
# rows whose coordinates exist at once
ROWS = 1 << 18
# blocks that keep every multiprocessor busy
_BLOCKS = 2048
# rows that a block of moments sums in working precision: least and most
_SPANS = (128, 1024)
# all partial sums together stay below this many bytes
_LARGEST_PARTS = 1 << 26


def spans(rows, rank, p, dtype):
    """Rows that a block of threads sums, and rows whose coordinates exist at once."""
    number = math.prod(tiles(rank, p))
    least, most = _SPANS
    # a multiple of a tile's, few if there are too few blocks for the device
    wanted = max(least, min(most, min(rows, ROWS) * number // _BLOCKS))
    span = _DEPTH * -(-wanted // _DEPTH)
    largest = _LARGEST_PARTS // (rank * (p + 1) * dtype.itemsize)
    return span, span * max(1, min(ROWS // span, largest))


def sum_products(x, weight, value, indices, rank, span):
    """Sum over rows of monomials times weight times ``[value, 1]``, in float64.

    ``x`` has one line of memory for each coordinate.
    """
    rows, p = value.shape
    parts = cp.empty((-(-rows // span), rank, p + 1), dtype=value.dtype)
    kernel("monomials.cu", "moments", value.dtype)(
        (*tiles(rank, p), len(parts)),
        (THREADS,),
        (
            x, weight, cp.ascontiguousarray(value), *indices, parts, rows, span, rank,
            p,
        ),
    )  # fmt: skip
    return parts.sum(axis=0, dtype=cp.float64)


def lines(centred, projection):
    """Coordinates of the rows, one coordinate to a line of memory."""
    return cp.ascontiguousarray(cp.matmul(projection.T, centred.T))


def tiles(rows, p):
    """Tiles of a matrix of ``rows`` rows and ``p`` columns, at least one of these."""
    return -(-rows // TILE), max(1, -(-p // TILE))


def move_lists(numbers):
    """Return the start of each row's list, and all lists, without entries < 0."""
    start = np.append(0, np.cumsum(np.sum(numbers >= 0, axis=1)))
    moved = tuple(
        cp.asarray(x.astype(np.int32)) for x in (start, numbers[numbers >= 0])
    )
    # later calls may come from other streams
    cp.cuda.get_current_stream().synchronize()
    return moved
