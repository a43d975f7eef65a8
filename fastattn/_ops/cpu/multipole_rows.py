"""One row at a time: its clusters, leaves and near keys are listed, then summed."""

from typing import NamedTuple

import numpy as np

from fastattn._ops.cpu.multipole import _plain
from fastattn._ops.multipole_rows import EXPONENT, LARGEST, SKEW, STEPS
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum

# rows that a thread answers at once
_ROWS = 16


class _Keys(NamedTuple):
    """The keys, their values, and the summaries of clusters and leaves."""

    key: np.ndarray
    value: np.ndarray
    clusters: np.ndarray
    leaves: np.ndarray
    first: np.ndarray
    start: np.ndarray


class _Limits(NamedTuple):
    """Limits of a far leaf's error and variance, and of the exponent of a weight."""

    threshold: float
    variance: float
    exponent: float


class _Lists(NamedTuple):
    """Weights of the leaves of a cluster, and lists of all far and near leaves."""

    logits: np.ndarray
    size: np.ndarray
    far: np.ndarray
    far_logits: np.ndarray
    far_size: np.ndarray
    near: np.ndarray


def summarise(key, value, value_center, *, start):
    d, p = key.shape[1], value.shape[1]
    parts = np.zeros((len(start) - 1, 3 * d + p + 3), key.dtype)
    _summarise(_plain(key), _plain(value), _plain(value_center), start, parts)
    return parts


def multipole_rows(query, key, value, clusters, leaves, *, first, start, threshold):
    n, dtype = len(query), query.dtype
    keys = _Keys(*map(_plain, (key, value, clusters, leaves)), first, start)
    query = _plain(query)
    out = np.zeros((n, value.shape[1]), dtype)
    norm, error = np.empty((2, n), dtype)
    counts = np.empty((n, 2), np.int64)
    limits = _Limits(*map(dtype.type, (threshold, LARGEST, EXPONENT)))

    def work(lo):
        some = slice(lo, lo + _ROWS)
        _answer(
            query[some], keys, limits, out[some], norm[some], error[some], counts[some]
        )

    starts = range(0, n, _ROWS)
    if len(starts) == 1:
        # limiting the threads of BLAS, which is not used, would take as long as the row
        work(0)
    else:
        run_blocks(work, starts)
    return out, norm, error, counts


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _summarise(key, value, value_center, start, parts):
    d, p, zero = key.shape[1], value.shape[1], key.dtype.type(0)
    longest = 0
    for c in range(parts.shape[0]):
        longest = max(longest, start[c + 1] - start[c])
    local, along = np.empty((longest, d), key.dtype), np.empty(longest, key.dtype)
    for c in range(parts.shape[0]):
        lo, n, part = start[c], start[c + 1] - start[c], parts[c]
        centre, lead, rest = part[:d], part[d : 2 * d], part[2 * d : 3 * d]
        mean, sizes = part[3 * d : 3 * d + p], part[3 * d + p :]
        share = key.dtype.type(1) / key.dtype.type(n)
        for j in range(lo, lo + n):
            for l in range(d):
                centre[l] += key[j, l] * share
            for l in range(p):
                mean[l] += value[j, l] * share
        spread = apart = zero
        for j in range(n):
            for l in range(d):
                local[j, l] = key[lo + j, l] - centre[l]
                rest[l] += local[j, l] ** 2 * share
            for l in range(p):
                spread += (value[lo + j, l] - mean[l]) ** 2 * share
        for l in range(p):
            apart += (mean[l] - value_center[l]) ** 2
        _find_lead(local[:n], along[:n], lead, rest)
        sizes[0], sizes[1] = np.sqrt(spread), np.sqrt(apart)
        sizes[2] = np.log(key.dtype.type(n))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _find_lead(local, along, lead, rest):
    # power iteration; the variances exclude the direction
    n, d, zero = local.shape[0], local.shape[1], local.dtype.type(0)
    tiny, first = np.finfo(local.dtype).tiny, np.argmax(rest)
    for j in range(n):
        along[j] = local[j, first]
    square = zero
    for _ in range(STEPS):
        length = zero
        lead[:] = zero
        for j in range(n):
            for l in range(d):
                lead[l] += along[j] * local[j, l]
        for l in range(d):
            length += lead[l] ** 2
        length, square = np.sqrt(length) + tiny, zero
        for l in range(d):
            lead[l] /= length
        for j in range(n):
            s = zero
            for l in range(d):
                s += lead[l] * local[j, l]
            along[j] = s
            square += s * s
    deviation = np.sqrt(square / local.dtype.type(n))
    for l in range(d):
        lead[l] *= deviation
        rest[l] = maximum(rest[l] - lead[l] ** 2, zero)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh(query, square, parts, lo, hi, largest, logits, size):
    # logarithms of weights, and the error of a unit weight; minus that error where the
    # variance is too large
    d, half, skew = query.size, query.dtype.type(0.5), query.dtype.type(SKEW)
    last = parts.shape[1] - 1
    for c in range(lo, hi):
        part = parts[c]
        s = t = z = query.dtype.type(0)
        for l in range(d):
            s += query[l] * part[l]
            t += query[l] * part[d + l]
            z += square[l] * part[2 * d + l]
        z += t * t
        is_wide = z > largest
        z = largest if is_wide else z
        spread = np.sqrt(z) * (part[last - 2] + skew * z * part[last - 1])
        logits[c - lo] = s + half * z + part[last]
        size[c - lo] = -spread - 1 if is_wide else spread


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add(weight, rows, at, first, out):
    # weighted sum of some rows, four at a time
    n, p = at.size, out.size
    for i in range(0, n - 3, 4):
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        a, b, c, e = rows[at[i]], rows[at[i + 1]], rows[at[i + 2]], rows[at[i + 3]]
        for l in range(p):
            out[l] += (w0 * a[first + l] + w1 * b[first + l]) + (
                w2 * c[first + l] + w3 * e[first + l]
            )
    for i in range(n // 4 * 4, n):
        a = rows[at[i]]
        for l in range(p):
            out[l] += weight[i] * a[first + l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _total(logits, peak):
    # logits become weights
    total = logits.dtype.type(0)
    for i in range(logits.size):
        logits[i] = exp(logits[i] - peak)
        total += logits[i]
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _squares(weight, size):
    s = weight.dtype.type(0)
    for i in range(weight.size):
        s += (weight[i] * size[i]) ** 2
    return s


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _look_at_leaves(query, square, parts, span, limits, peak, lists, ends):
    # far leaves from number a of their lists on, near ones from b; returns the ends
    threshold, largest, highest = limits
    logits, size, far, far_logits, far_size, near = lists
    (lo, hi), (a, b) = span, ends
    _weigh(query, square, parts, lo, hi, largest, logits, size)
    for c in range(lo, hi):
        x, s = logits[c - lo], size[c - lo]
        above = x - peak
        weight = exp(above if above < highest else highest)
        if s < 0 or weight * s > threshold:
            near[b] = c
            b += 1
        else:
            far[a], far_logits[a], far_size[a] = c, x, s
            a += 1
    return a, b


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _list_keys(query, key, near, start, keys, logits):
    n = 0
    for i in range(near.size):
        for j in range(start[near[i]], start[near[i] + 1]):
            row, s = key[j], query.dtype.type(0)
            for l in range(query.size):
                s += query[l] * row[l]
            keys[n], logits[n] = j, s
            n += 1
    return n


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _largest(x, largest):
    for i in range(x.size):
        largest = maximum(largest, x[i])
    return largest


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _answer(query, keys_and_leaves, limits, out, norm, error, counts):
    key, value, clusters, leaves, first, start = keys_and_leaves
    threshold, largest, highest = limits
    dtype, mean = query.dtype, 3 * query.shape[1]
    c, b, m = clusters.shape[0], leaves.shape[0], start[-1]
    logits, size = np.empty(c, dtype), np.empty(c, dtype)
    # far clusters, far leaves, near leaves, near keys
    far, low = np.empty(c, np.int64), np.empty(b, np.int64)
    near, keys = np.empty(b, np.int64), np.empty(m, np.int64)
    low_logits, low_size = np.empty(b, dtype), np.empty(b, dtype)
    lists = _Lists(
        np.empty(b, dtype), np.empty(b, dtype), low, low_logits, low_size, near
    )
    key_logits, square = np.empty(m, dtype), np.empty(query.shape[1], dtype)
    lowest = -np.finfo(dtype).max
    for i in range(query.shape[0]):
        for l in range(square.size):
            square[l] = query[i, l] ** 2
        _weigh(query[i], square, clusters, 0, c, largest, logits, size)
        peak = _largest(logits, lowest)
        total = dtype.type(0)
        for j in range(c):
            total += exp(logits[j] - peak)
        a, n, k, seen = 0, 0, 0, 0
        limit = threshold * total
        for j in range(c):
            s = size[j]
            if s < 0 or exp(logits[j] - peak) * s > limit:
                lo, hi = first[j], first[j + 1]
                seen += hi - lo
                n, k = _look_at_leaves(
                    query[i], square, leaves, (lo, hi),
                    _Limits(limit, largest, highest), peak, lists, (n, k),
                )  # fmt: skip
            else:
                # the lists of clusters grow over what was read
                far[a], logits[a], size[a] = j, logits[j], s
                a += 1
        k = _list_keys(query[i], key, near[:k], start, keys, key_logits)
        top = _largest(logits[:a], _largest(low_logits[:n], lowest))
        top = _largest(key_logits[:k], top)
        total = _total(logits[:a], top) + _total(low_logits[:n], top)
        total += _total(key_logits[:k], top)
        _add(logits[:a], clusters, far[:a], mean, out[i])
        _add(low_logits[:n], leaves, low[:n], mean, out[i])
        _add(key_logits[:k], value, keys[:k], 0, out[i])
        for l in range(out.shape[1]):
            out[i, l] /= total
        squares = _squares(logits[:a], size[:a]) + _squares(
            low_logits[:n], low_size[:n]
        )
        norm[i], error[i] = top + np.log(total), squares / total / total
        counts[i, 0], counts[i, 1] = seen, k
