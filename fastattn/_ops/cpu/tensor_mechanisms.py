"""Windows of tuples: one product for the pairs of several rows, then a fused softmax.

Windows of neighbouring rows overlap, so that a block of rows shares one slab of the
last factor's keys, little longer than a window, of which each row masks a part.
"""

import math

import numpy as np

from fastattn._ops.tensor_mechanisms import expand
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum

# logits of a block: they stay in cache
_LOGITS = 1 << 18
# what the calls for a block cost, in units of the time of one logit
_CALLS = 20000


def attend_windows(query, keys, values, starts, stops, *, sizes, scale):
    n, dtype, last = len(query), query.dtype, sizes[-1]
    before = int(np.prod(sizes[:-1]))
    # fewer rows waste less of the slab, more rows share the cost of the calls
    rows = math.isqrt(_CALLS // before)
    rows = max(1, min(rows, n, _LOGITS // (before * (last + rows))))
    out = np.empty((n, values[-1].shape[1]), dtype=dtype)
    normalizer = np.empty(n, dtype=dtype)

    @np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")
    def work(task):
        block = slice(task * rows, min((task + 1) * rows, n))
        firsts, ends = ([x[block] for x in side] for side in (starts, stops))
        joined, product, seen = expand(
            query[block], keys[:-1], values[:-1], firsts[:-1], ends[:-1], sizes[:-1]
        )
        scaled = np.multiply(joined, scale, dtype=np.float64).astype(dtype)
        low = int(firsts[-1].min())
        slab = slice(low, max(int(ends[-1].max()), low))
        count, width = seen.shape
        logits = scaled.reshape(count * width, -1) @ keys[-1][slab].T
        logits = logits.reshape(count, width, -1)
        peak, total = _soften(logits, seen, firsts[-1] - low, ends[-1] - low)
        part = logits.reshape(count * width, -1) @ values[-1][slab]
        sums = np.sum(part.reshape(count, width, -1) * product, axis=1, dtype=float)
        out[block] = sums / np.where(total > 0, total, 1)[:, None]
        normalizer[block] = np.log(total) + peak

    run_blocks(work, range(-(-n // rows)))
    return out, normalizer


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _soften(logits, seen, first, end):
    # turns logits into weights relative to the largest of a row; tuples that a row does
    # not see get weight zero
    rows, width, _ = logits.shape
    peaks = np.full(rows, -np.inf, dtype=logits.dtype)
    totals = np.zeros(rows, dtype=np.float64)
    for i in range(rows):
        a, b = first[i], end[i]
        peak = peaks[i]
        for j in range(width):
            if seen[i, j]:
                row = logits[i, j, a:b]
                for k in range(row.size):
                    peak = maximum(peak, row[k])
        peaks[i] = peak
        for j in range(width):
            if not seen[i, j] or a >= b:
                logits[i, j, :] = 0
                continue
            logits[i, j, :a] = 0
            logits[i, j, b:] = 0
            row = logits[i, j, a:b]
            partial = row[0] * 0
            for k in range(row.size):
                weight = exp(row[k] - peak)
                row[k] = weight
                partial += weight
            totals[i] += partial
    return peaks, totals
