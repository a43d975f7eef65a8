"""Exact softmax attention: BLAS for the products, one fused pass for the softmax."""

import math

import numpy as np

from fastattn._ops.cpu.softmax_tiles import attend_tiles, serves
from fastattn._ops.extreme import attend_scaled, may_overflow
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum
from sketching._ops.cpu.features import has

# a block of logits in float32 fills a core's second-level cache: one mebibyte with
# AVX-512, as a rule, and half of that without
ROWS, KEYS = (1024, 320) if has("avx512f") else (512, 256)
# fewer rows take longer blocks of keys: of so many logits, up to so many keys
LOGITS = 3 << 16
LONGEST = 1024
# logits that are stored at once, in float64, where they may overflow
_SCALED = 1 << 20


def attend(query, key, value, *, scale, prefix_lengths, rows=None):
    heads, n, _ = query.shape
    dtype = query.dtype
    out = np.empty((heads, n, value.shape[2]), dtype=dtype)
    normalizer = np.empty((heads, n), dtype=dtype)
    if rows is None:
        # few rows: smaller blocks keep more threads busy, too small ones starve BLAS
        rows = min(ROWS, max(256, -(-heads * n // 4)))
    keys = min(LONGEST, max(KEYS, LOGITS // min(rows, n)))
    per_head = -(-n // rows)
    # with few rows every logit is checked: that takes less time than to read the keys;
    # tiles have a check of their own
    largest = [
        math.inf if n < ROWS or serves(*head) else _largest(head[1])
        for head in zip(query, key, value, strict=True)
    ]

    def work(task):
        head, block = divmod(task, per_head)
        span = slice(block * rows, min((block + 1) * rows, n))
        seen = None if prefix_lengths is None else prefix_lengths[span]
        _attend_rows(
            query[head, span], key[head], value[head], float(scale), seen, keys,
            largest[head], out[head, span], normalizer[head, span],
        )  # fmt: skip

    run_blocks(work, range(heads * per_head))
    return out, normalizer


# sums that overflow give numbers that are not finite; the caller checks for them
@np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")
def _attend_rows(
    query, key, value, scale, prefix_lengths, size, largest, out, normalizer
):
    """Stream all keys past one block of rows."""
    if serves(query, key, value) and attend_tiles(
        query, key, value, scale, prefix_lengths, out, normalizer
    ):
        return
    if _stream(
        query, key, value, scale, prefix_lengths, size, largest, out, normalizer
    ):
        return
    # extreme rows: a few at a time, since all their logits are stored
    rows = max(1, _SCALED // len(key))
    for start in range(0, len(query), rows):
        block = slice(start, start + rows)
        seen = None if prefix_lengths is None else prefix_lengths[block]
        out[block], normalizer[block] = attend_scaled(
            query[block], key, value, scale, seen
        )


def _largest(x):
    """Largest absolute entry."""
    return float(np.max(np.abs(x), initial=0))


def _stream(query, key, value, scale, prefix_lengths, size, largest, out, normalizer):
    """Stream all keys past one block of rows; False if a logit overflowed.

    No entry of a key exceeds ``largest``: logits are checked only where this bound does
    not prove them finite.
    """
    n, dtype = len(query), query.dtype
    # in float64: a scale, and a query, of extreme size may only meet halfway
    scaled = np.multiply(query, scale, dtype=np.float64).astype(dtype)
    most = float(np.finfo(dtype).max)
    is_open = may_overflow(_largest(scaled), largest, query.shape[1], most)
    last = (
        len(key) if prefix_lengths is None else min(len(key), int(prefix_lengths.max()))
    )
    peak = np.full(n, -np.inf, dtype=dtype)
    total = np.zeros(n, dtype=np.float64)
    sums = np.zeros(out.shape, dtype=dtype)
    part = np.empty(out.shape, dtype=dtype)
    buffer = np.empty(n * size, dtype=dtype)
    for start in range(0, last, size):
        keys = slice(start, min(start + size, last))
        # contiguous, the last one too: strided rows would not vectorise
        width = keys.stop - start
        block = buffer[: n * width].reshape(n, width)
        np.matmul(scaled, key[keys].astype(dtype, copy=False).T, out=block)
        count = np.full(n, width) if prefix_lengths is None else prefix_lengths - start
        if not _soften(block, count, is_open, peak, total, sums):
            return False
        np.matmul(block, value[keys].astype(dtype, copy=False), out=part)
        sums += part
    seen = total > 0
    np.divide(sums, np.where(seen, total, 1)[:, None], out=out, casting="same_kind")
    normalizer[:] = peak + np.log(total)
    return True


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _soften(logits, count, is_open, peak, total, sums):
    # turns logits into weights relative to the largest logit so far, and rescales
    # earlier sums whenever a larger one comes; stops at a logit that overflowed
    for i in range(logits.shape[0]):
        size = min(max(count[i], 0), logits.shape[1])
        row = logits[i, :size]
        logits[i, size:] = 0
        if size == 0:
            continue
        if is_open:
            # NaN for what is not finite, so that an earlier overflow is not hidden
            check = row[0] * 0
            for j in range(size):
                check += row[j] * 0
            if check != 0:
                return False
        largest = row[0]
        for j in range(size):
            largest = maximum(largest, row[j])
        if largest > peak[i]:
            shrink = exp(peak[i] - largest)
            peak[i] = largest
            total[i] *= shrink
            for c in range(sums.shape[1]):
                sums[i, c] *= shrink
        shift = peak[i]
        partial = row[0] * 0
        for j in range(size):
            weight = exp(row[j] - shift)
            row[j] = weight
            partial += weight
        total[i] += partial
    return True
