"""The fast Walsh-Hadamard transform, one row in the cache at a time."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE
from sketching._ops.cpu.spans import over_spans

# entries below which starting another thread costs more than it saves
_ENTRIES = 1 << 18


def hadamard(x):
    out = np.array(x, order="C")
    rows = out.reshape(-1, out.shape[-1])
    span = max(1, _ENTRIES // out.shape[-1])
    over_spans(lambda start, end: _hadamard(rows[start:end]), len(rows), span)
    return out


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _hadamard(rows):
    n, d = rows.shape
    for i in range(n):
        row = rows[i]
        # two levels at a time: half the passes over the row
        step = 1
        while 2 * step < d:
            for start in range(0, d, 4 * step):
                _butterfly(row[start : start + 4 * step], step)
            step *= 4
        if step < d:
            for j in range(step):
                left, right = row[j], row[j + step]
                row[j] = left + right
                row[j + step] = left - right


@njit(
    nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE, inline="always"
)
def _butterfly(part, step):
    a, b = part[:step], part[step : 2 * step]
    c, d = part[2 * step : 3 * step], part[3 * step :]
    for j in range(step):
        p, q = a[j] + b[j], a[j] - b[j]
        r, s = c[j] + d[j], c[j] - d[j]
        a[j], b[j] = p + r, q + s
        c[j], d[j] = p - r, q - s
