"""Feature maps in one pass each, and causal products by chunks done in parallel.

Sums over the keys between chunks, their running sums, and the answers of all chunks are
three launches, for as many chunks as have their states in memory at once. The products
without a mask are cuBLAS's: they need no op.

Not run on a device yet: the kernels were compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in; block sizes are estimates.
"""

import math

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel
from fastattn._ops.gpu.products import THREADS, TILE

# numbers of the states of chunks that exist at once
_STATES = 1 << 26
# blocks that keep every multiprocessor busy
_BLOCKS = 2048
# the most blocks that a grid has in its second and third direction
_LARGEST_GRID = 65535


def elu_plus_one(x):
    x = cp.ascontiguousarray(x)
    out = cp.empty(x.shape, dtype=x.dtype)
    kernel("linear.cu", "elu_plus_one", x.dtype)(
        (max(1, min(_BLOCKS, -(-x.size // THREADS))),), (THREADS,), (x, out, x.size)
    )
    return out


def squares(x):
    x = cp.ascontiguousarray(x)
    d = x.shape[-1]
    pairs = [cp.asarray(y.astype(np.int32)) for y in np.triu_indices(d)]
    width = 1 + d + d * (d + 1) // 2
    out = cp.empty((*x.shape[:-1], width), dtype=x.dtype)
    rows = math.prod(x.shape[:-1])
    kernel("linear.cu", "squares", x.dtype)(
        (-(-width // THREADS), max(1, min(rows, _LARGEST_GRID))),
        (THREADS,),
        (x, *pairs, out, rows, d, width),
    )
    return out


def prefix_products(
    left,
    right,
    value,
    state,
    *,
    prefix_lengths,
    decay=None,
    row=None,
    column=None,
    origin=0,
):
    left, right, value, state = map(cp.ascontiguousarray, (left, right, value, state))
    (n, r), p, dtype = left.shape, value.shape[1], left.dtype
    fading = _Fading(1.0 if decay is None else decay, row, column, n, len(right))
    plan = _Chunks(np.asarray(prefix_lengths), fading, origin, dtype)
    faded = value
    if fading.moves:
        faded = value[: len(plan.key_fade)] * plan.key_fade[:, None]
    out = cp.empty((n, p), dtype=dtype)
    size = max(1, min(_LARGEST_GRID, _STATES // (r * p)))
    # the last part has no rows: its state is the one after the last row
    for lo in range(0, plan.parts, size):
        some = slice(lo, min(lo + size, plan.parts))
        parts = cp.empty((some.stop - lo, r, p), dtype=dtype)
        kernel("linear.cu", "sum_chunks", dtype)(
            (-(-r // TILE), -(-p // TILE), len(parts)),
            (THREADS,),
            (right, faded, plan.edge[lo:], parts, r, p),
        )
        kernel("linear.cu", "add_up", dtype)(
            (-(-r * p // THREADS),),
            (THREADS,),
            (parts, state, plan.shrink[lo:], len(parts), r * p),
        )
        chunks = min(some.stop, plan.parts - 1) - lo
        if chunks:
            kernel("linear.cu", "answer_chunks", dtype)(
                (chunks, -(-p // TILE)),
                (THREADS,),
                (
                    left, right, value, parts, plan.row_fade, plan.prefix_lengths,
                    *plan.positions, out, lo * TILE, n, r, p,
                    dtype.type(fading.rate),
                ),
            )  # fmt: skip
        state = parts[-1]
    return out, state.copy()


class _Fading:
    """Positions of rows and keys, on the host, and the logarithm of the decay."""

    def __init__(self, decay, row, column, n, m):
        # where positions do not matter all are equal
        self.rate = 0.0 if row is None else math.log(decay)
        self.row = np.zeros(n, np.int64) if row is None else np.asarray(row)
        self.column = np.zeros(m, np.int64) if row is None else np.asarray(column)
        self.moves = row is not None

    def over(self, gap):
        """Decay factors of position gaps."""
        return np.exp(self.rate * gap)


class _Chunks:
    """Arrays that the CUDA kernels need for chunks of rows, on the device.

    Part ``c`` of the keys ends where those begin that not all rows of chunk ``c`` see;
    its state refers to the position of the first of them. The last part ends where the
    last row's keys do, and refers to the position of that row.
    """

    def __init__(self, prefix_lengths, fading, origin, dtype):
        n, starts = len(prefix_lengths), np.arange(0, len(prefix_lengths), TILE)
        edge = np.concatenate([[0], prefix_lengths[starts], prefix_lengths[-1:]])
        seen = np.append(fading.row[starts], fading.row[-1])
        self.parts = len(seen)
        before = np.append(origin if fading.moves else 0, seen[:-1])
        ahead = np.repeat(seen, np.diff(edge)) - fading.column[: edge[-1]]
        chunk = np.arange(n) // TILE
        self.key_fade, self.shrink, self.row_fade = (
            cp.asarray(fading.over(gap).astype(dtype))
            for gap in (ahead, seen - before, fading.row - seen[chunk])
        )
        self.edge, self.prefix_lengths, *self.positions = (
            cp.asarray(np.ascontiguousarray(x, dtype=np.int64))
            for x in (edge, prefix_lengths, fading.row, fading.column)
        )
