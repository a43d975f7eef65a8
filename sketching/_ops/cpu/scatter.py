"""Entries of rows, added to few coordinates each, a row at a time."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE
from sketching._ops.cpu.spans import over_spans

# additions below which starting another thread costs more than it saves
_ADDITIONS = 1 << 18


def scatter_columns(x, places, weights, *, size):
    x = np.ascontiguousarray(x)
    out = np.zeros((*x.shape[:-1], size), x.dtype)
    rows, sums = x.reshape(-1, x.shape[-1]), out.reshape(-1, size)

    def work(start, end):
        _scatter_columns(rows[start:end], places, weights, sums[start:end])

    over_spans(work, len(rows), max(1, _ADDITIONS // places.size))
    return out


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _scatter_columns(x, places, weights, out):
    for i in range(x.shape[0]):
        for j in range(places.shape[0]):
            for t in range(places.shape[1]):
                out[i, places[j, t]] += weights[j, t] * x[i, j]
