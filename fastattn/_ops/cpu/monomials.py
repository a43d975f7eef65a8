"""Monomials in blocks that stay in cache, multiplied by BLAS.

Each monomial is one line of memory, the product of two contiguous lines.
"""

import numpy as np

from fastattn._ops.cpu.blocks import ROWS, span_of
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE

# sums that overflow are found by their total, so NumPy need not warn of them
_QUIET = np.errstate(over="ignore", invalid="ignore", divide="ignore")


def monomials(x, *, parent, coordinate):
    features = np.empty((len(parent), len(x)), dtype=x.dtype)
    _fill(np.ascontiguousarray(x.T), parent, coordinate, features)
    return features.T


def moments(key, value, center, projection, tilt, value_center, *, parent, coordinate):
    dtype = projection.dtype
    m, p = value.shape
    span = span_of(m, len(parent) * (p + 1) * 8)
    parts = np.zeros((-(-m // span), len(parent), p + 1), dtype=np.float64)

    @_QUIET
    def work(task):
        part = np.empty((len(parent), p + 1), dtype=dtype)
        features = np.empty((len(parent), ROWS), dtype=dtype)
        extended = np.empty((ROWS, p + 1), dtype=dtype)
        for lo in range(task * span, min((task + 1) * span, m), ROWS):
            hi = min(lo + ROWS, m)
            centred = key[lo:hi] - center
            block, values = features[:, : hi - lo], extended[: hi - lo]
            _fill(projection.T @ centred.T, parent, coordinate, block)
            weight = np.exp(centred @ tilt)[:, None]
            np.multiply(value[lo:hi] - value_center, weight, out=values[:, :p])
            values[:, p:] = weight
            parts[task] += np.matmul(block, values, out=part)

    run_blocks(work, range(len(parts)))
    return _total(parts, dtype)


@_QUIET
def _total(parts, dtype):
    return parts.sum(axis=0).astype(dtype)


def means(query, center, projection, readout, value_center, *, parent, coordinate):
    dtype = projection.dtype
    n, p = len(query), readout.shape[1] - 1
    value = np.empty((n, p), dtype=dtype)
    total = np.empty(n, dtype=dtype)
    span = span_of(n)
    columns = np.ascontiguousarray(readout.T)

    @_QUIET
    def work(task):
        features = np.empty((len(parent), ROWS), dtype=dtype)
        for lo in range(task * span, min((task + 1) * span, n), ROWS):
            hi = min(lo + ROWS, n)
            block = features[:, : hi - lo]
            _fill(projection.T @ (query[lo:hi] - center).T, parent, coordinate, block)
            sums = columns @ block
            reliable = (sums[p] > 0) & np.isfinite(sums[p])
            total[lo:hi] = sums[p]
            sums[:, ~reliable] = 0
            sums[p, ~reliable] = 1
            value[lo:hi] = (sums[:p] / sums[p]).T + value_center

    run_blocks(work, range(-(-n // span)))
    return value, total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _fill(x, parent, coordinate, features):
    features[0, :] = 1
    for j in range(1, features.shape[0]):
        source, factor, row = features[parent[j]], x[coordinate[j]], features[j]
        for i in range(row.size):
            row[i] = source[i] * factor[i]
