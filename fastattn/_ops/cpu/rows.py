"""Squared lengths of rows in one pass, without copies."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE


def squared_lengths(x, center, factors):
    out = np.zeros(len(x), x.dtype)
    _squared_lengths(x, center, factors, out)
    return out


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _squared_lengths(x, center, factors, out):
    for i in range(x.shape[0]):
        row, total = x[i], out[i]
        for c in range(x.shape[1]):
            entry = (row[c] - center[c]) * factors[c]
            total += entry * entry
        out[i] = total
