"""Bisection in one compiled loop; the products of a round of k-means by BLAS."""

import numpy as np

from fastattn._ops.clusters import SAMPLE, STEPS
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum

# rows whose products with all means exist at once, on each thread
_ROWS = 1024


def partition(x, *, parts, least, most):
    # copies: read-only and strided arrays would need further compiled signatures
    x = np.array(x, order="C")
    return _partition(x, parts, least, most)


def regroup(x, order, *, start):
    x, parts = np.array(x, order="C"), len(start) - 1
    mean = np.empty((parts, x.shape[1]), dtype=x.dtype)
    _means(x, order, start, mean)
    half = np.sum(mean**2, axis=1) / 2
    flipped = np.ascontiguousarray(mean.T)
    label = np.empty(len(x), dtype=np.int64)

    def work(task):
        rows = slice(task * _ROWS, (task + 1) * _ROWS)
        _largest(x[rows] @ flipped, half, label[rows])

    run_blocks(work, range(-(-len(x) // _ROWS)))
    return _sort(label, parts)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _partition(x, parts, least, most):
    n, d = x.shape
    # long parts lose at least so many rows by each cut
    limit = parts + (n // least if n > most else 0)
    index = np.arange(n)
    lo, hi = np.zeros(limit, np.int64), np.zeros(limit, np.int64)
    spread = np.zeros(limit, x.dtype)
    mean, axis = np.empty((limit, d), x.dtype), np.empty((limit, d), x.dtype)
    hi[0], count = n, 1
    spread[0] = _direction(x, index, mean[0], axis[0])
    while count < limit:
        widest, long = -1, False
        for i in range(count):
            size = hi[i] - lo[i]
            if size < 2 * least or (count >= parts and size <= most):
                continue
            more = size > most
            wider = widest < 0 or spread[i] > spread[widest]
            if (more and not long) or (more == long and wider):
                widest, long = i, more
        if widest < 0:
            break
        piece = index[lo[widest] : hi[widest]]
        cut = lo[widest] + _split(x, piece, mean[widest], axis[widest], least)
        lo[count], hi[count], hi[widest] = cut, hi[widest], cut
        for i in (widest, count):
            spread[i] = _direction(x, index[lo[i] : hi[i]], mean[i], axis[i])
        count += 1
    return index, np.append(np.sort(lo[:count]), n)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _direction(x, index, mean, w):
    n, d = index.size, x.shape[1]
    step, count = max(1, n // SAMPLE), 0
    mean[:] = 0
    for i in range(0, n, step):
        count += 1
        for l in range(d):
            mean[l] += x[index[i], l]
    share = x.dtype.type(1) / x.dtype.type(count)
    few = np.empty((count, d), x.dtype)
    longest, total = x.dtype.type(-1), x.dtype.type(0)
    for l in range(d):
        mean[l] *= share
    for i in range(count):
        length = x.dtype.type(0)
        for l in range(d):
            few[i, l] = x[index[i * step], l] - mean[l]
            length += few[i, l] * few[i, l]
        total += length
        if length > longest:
            longest = length
            w[:] = few[i]
    fresh = np.empty(d, x.dtype)
    for _ in range(STEPS):
        fresh[:] = 0
        for i in range(count):
            s = _dot(few[i], w)
            for l in range(d):
                fresh[l] += s * few[i, l]
        size = np.sqrt(_dot(fresh, fresh)) + np.finfo(x.dtype).tiny
        for l in range(d):
            w[l] = fresh[l] / size
    if _dot(few[0], w) > 0:
        for l in range(d):
            w[l] = -w[l]
    return total * share * x.dtype.type(n)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _dot(x, y):
    s = x.dtype.type(0)
    for l in range(x.size):
        s += x[l] * y[l]
    return s


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _split(x, index, mean, w, least):
    # orders the rows so that the halves are contiguous; returns where they meet
    n = index.size
    place = np.empty(n, x.dtype)
    count = 0
    for i in range(n):
        s = x.dtype.type(0)
        for l in range(mean.size):
            s += (x[index[i], l] - mean[l]) * w[l]
        place[i] = s
        count += s < 0
    old = index.copy()
    cut = min(max(count, least), n - least)
    if cut != count:
        rank = np.argsort(place, kind="mergesort")
        for i in range(n):
            index[i] = old[rank[i]]
        return cut
    below, above = 0, count
    for i in range(n):
        if place[i] < 0:
            index[below] = old[i]
            below += 1
        else:
            index[above] = old[i]
            above += 1
    return cut


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _means(x, order, start, out):
    for c in range(out.shape[0]):
        out[c] = 0
        for i in range(start[c], start[c + 1]):
            for l in range(x.shape[1]):
                out[c, l] += x[order[i], l]
        count = x.dtype.type(start[c + 1] - start[c])
        for l in range(x.shape[1]):
            out[c, l] /= count


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _largest(product, half, label):
    for i in range(product.shape[0]):
        row = product[i]
        for c in range(row.size):
            row[c] -= half[c]
        best = row[0]
        for c in range(row.size):
            best = maximum(best, row[c])
        label[i] = 0
        for c in range(row.size):
            if row[c] == best:
                label[i] = c
                break


@njit(nogil=True, cache=True, error_model="numpy")
def _sort(label, parts):
    # a counting sort
    place = np.zeros(parts + 1, np.int64)
    for c in label:
        place[c + 1] += 1
    place = np.cumsum(place)
    start = np.unique(place)
    order = np.empty(label.size, np.int64)
    for i in range(label.size):
        order[place[label[i]]] = i
        place[label[i]] += 1
    return order, start
