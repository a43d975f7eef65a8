"""Assignments in tiles: a product by BLAS, then one pass that keeps the two least."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE
from sketching._ops.cpu.spans import over_spans

# numbers of one tile of products: they stay in the second-level cache
_TILE = 1 << 16
# rows below which starting another thread costs more than it saves
_SPAN = 1 << 14


def two_nearest(points, centers, squares, slots):
    n, dtype = len(slots), points.dtype
    labels, least, second = (
        np.empty(n, np.int64),
        np.empty(n, dtype),
        np.empty(n, dtype),
    )
    rows = max(256, _TILE // len(centers))
    directions = np.ascontiguousarray(-2 * centers.T)

    def work(start, end):
        # tiles share their memory: the pages of fresh arrays cost as much as the copy
        size = min(rows, end - start)
        copies = np.empty((size, points.shape[1]), dtype)
        products = np.empty((size, len(centers)), dtype)
        for first in range(start, end, rows):
            part = slice(first, min(first + rows, end))
            some = _rows_at(points, slots[part], copies)
            found = np.matmul(some, directions, out=products[: len(some)])
            _two_least(found, squares, labels[part], least[part], second[part])

    over_spans(work, n, max(rows, _SPAN))
    return labels, least, second


def _rows_at(points, slots, copies):
    """Some rows: a view if they follow each other, else copied."""
    if slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
        return points[slots[0] : slots[-1] + 1]
    # without the mode NumPy would copy twice; slots are within bounds
    return np.take(points, slots, axis=0, out=copies[: len(slots)], mode="clip")


def own_distances(points, centers, labels, slots):
    out = np.empty(len(slots))

    def work(start, end):
        part = slice(start, end)
        _own_distances(points, centers, labels[part], slots[part], out[part])

    over_spans(work, len(slots), _SPAN)
    return out


def cluster_sums(points, labels, weights, *, n_clusters):
    out = np.zeros((n_clusters, points.shape[1]))
    _cluster_sums(points, labels, weights, out)
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def _two_least(products, squares, labels, least, second):
    for i in range(products.shape[0]):
        row, where = products[i], 0
        first, other = row.dtype.type(np.inf), row.dtype.type(np.inf)
        for j in range(row.size):
            score = squares[j] + row[j]
            if score < other:
                if score < first:
                    first, other, where = score, first, j
                else:
                    other = score
        labels[i], least[i], second[i] = where, first, other


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _cluster_sums(points, labels, weights, out):
    for i in range(points.shape[0]):
        row, weight, total = points[i], np.float64(weights[i]), out[labels[i]]
        for t in range(row.size):
            total[t] += weight * row[t]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _own_distances(points, centers, labels, slots, out):
    for i in range(slots.size):
        row, center, square = points[slots[i]], centers[labels[i]], 0.0
        for t in range(row.size):
            apart = np.float64(row[t]) - np.float64(center[t])
            square += apart * apart
        out[i] = np.sqrt(square)
