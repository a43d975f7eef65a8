"""Exact softmax attention: cuBLAS for the products, one kernel for the softmax.

Not run on a device yet: the kernel was compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in; block sizes are estimates.
"""

import cupy as cp
import numpy as np

from fastattn._ops import softmax
from fastattn._ops.extreme import may_overflow
from fastattn._ops.gpu import kernel

# logits of one block: 32 MiB in float32, what a second-level cache holds
_LOGITS = 1 << 23
# keys of a block: they are summed before they are added to the running sums
_KEYS = 1024
# as in softmax.cu
_THREADS = 128
_LINES = 4


def attend(query, key, value, *, scale, prefix_lengths, rows=None):
    heads, n, _ = query.shape
    m, p = value.shape[1:]
    dtype = query.dtype
    # in float64: a scale, and a query, of extreme size may only meet halfway
    scaled = (query.astype(cp.float64) * scale).astype(dtype)
    longest, largest = (float(cp.abs(x).max()) for x in (scaled, key))
    if may_overflow(longest, largest, key.shape[2], float(cp.finfo(dtype).max)):
        return softmax.attend.reference(
            query, key, value, scale=scale, prefix_lengths=prefix_lengths, rows=rows
        )
    out = cp.empty((heads, n, p), dtype=dtype)
    normalizer = cp.empty((heads, n), dtype=dtype)
    key, value = key.astype(dtype, copy=False), value.astype(dtype, copy=False)
    keys = max(1, min(m, _KEYS))
    size = max(1, _LOGITS // (heads * keys)) if rows is None else rows
    starts = range(0, n, size)
    last = np.full(len(starts), m)
    if prefix_lengths is None:
        prefix_lengths = cp.full(n, m, dtype=cp.int64)
    else:
        prefix_lengths = cp.asarray(prefix_lengths, dtype=cp.int64)
        # one transfer fetches for every block which keys none of its rows can see
        last = np.maximum.reduceat(cp.asnumpy(prefix_lengths), starts)
    for start, seen in zip(starts, last, strict=True):
        block = slice(start, min(start + size, n))
        _attend_rows(
            scaled[:, block], key[:, :seen], value[:, :seen], prefix_lengths[block],
            keys, out[:, block], normalizer[:, block],
        )  # fmt: skip
    return out, normalizer


def _attend_rows(query, key, value, prefix_lengths, size, out, normalizer):
    """Stream the keys past one block of rows."""
    heads, n, p = out.shape
    lines, dtype = heads * n, out.dtype
    soften = kernel("softmax.cu", "soften", dtype)
    peak = cp.full(lines, -cp.inf, dtype=dtype)
    total = cp.zeros(lines, dtype=cp.float64)
    sums = cp.zeros(out.shape, dtype=dtype)
    buffer = cp.empty(lines * size, dtype=dtype)
    for first in range(0, key.shape[1], size):
        keys = slice(first, min(first + size, key.shape[1]))
        width = keys.stop - first
        logits = buffer[: lines * width].reshape(heads, n, width)
        cp.matmul(query, key[:, keys].swapaxes(1, 2), out=logits)
        soften(
            (-(-lines // _LINES),),
            (_THREADS,),
            (logits, prefix_lengths, peak, total, sums, lines, n, width, first, p),
        )
        sums += cp.matmul(logits, value[:, keys])
    total = total.reshape(heads, n)
    out[...] = sums / cp.where(total > 0, total, 1)[:, :, None]
    normalizer[...] = peak.reshape(heads, n) + cp.log(total)
