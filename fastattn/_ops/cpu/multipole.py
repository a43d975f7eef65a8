"""Several blocks of queries share one pass over the keys; then BLAS, block by block."""

import numpy as np

from fastattn._ops.cpu.cluster_moments import (
    bend,
    classify,
    growths,
    localise,
    sum_moments,
    tilt,
)
from fastattn._ops.cpu.near_keys import add_near
from fastattn._ops.cpu.packing import PackedKeys
from fastattn._ops.cpu.softmax import _soften
from fastattn._ops.cpu.tiles import multiplies_bytes
from fastattn._ops.multipole import ALIKE, BEND, FIRST_ORDER, LARGEST
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE

# blocks of queries that share one pass over the keys, and numbers they may store
_SHARED = 16
_KEPT = 1 << 23
# keys whose tilt is found at once, and near keys that are attended to at once
_TILE = 1024
_NEAR = 512


def describe(query, *, cuts, rows):
    blocks, d = len(cuts) - 1, query.shape[1]
    mean, square = (np.empty((blocks, d), query.dtype) for _ in range(2))
    sampled = np.empty((blocks, rows, d), query.dtype)
    _describe(np.ascontiguousarray(query), cuts, mean, square, sampled)
    return mean, square, sampled


def multipole(
    query, blocks, key, value, metric, *, cuts, start, group, threshold,
    low_precision="",
):  # fmt: skip
    count, m, dtype = len(cuts) - 1, len(key), query.dtype
    out = np.empty((len(query), value.shape[1]), dtype)
    norm, error = np.empty((2, len(query)), dtype)
    counts = np.empty((count, 3), np.int64)
    query, key, value = _plain(query), _plain(key), _plain(value)
    low_precision = low_precision if multiplies_bytes() and dtype == np.float32 else ""
    keys = _Keys(key, value, metric, start, group, low_precision)
    limits = [dtype.type(x) for x in (threshold, FIRST_ORDER * threshold, ALIKE)]
    rates = [dtype.type(x) for x in (BEND, LARGEST)]
    shared = max(1, min(_SHARED, _KEPT // m))

    @np.errstate(all="ignore")
    def work(first):
        some = range(first, min(first + shared, count))
        field = _Field(keys, *(x[some] for x in blocks), limits, rates)
        for r in some:
            rows = slice(cuts[r], cuts[r + 1])
            counts[r] = field.answer(
                r - first, query[rows], out[rows], norm[rows], error[rows]
            )

    run_blocks(work, range(0, count, shared))
    return out, norm, error, counts


def _plain(x):
    # read-only and strided arrays would need further compiled signatures
    plain = x.flags.c_contiguous and x.flags.writeable
    return x if plain else np.array(x, order="C")


class _Keys:
    """Keys, values and clusters, with the arrays that every block of queries uses."""

    def __init__(self, key, value, metric, start, group, low_precision):
        self.key, self.value, self.start, self.group = key, value, start, group
        self.metric = metric
        # groups by their clusters
        self.cuts = np.searchsorted(group, np.arange(group[-1] + 2))
        self.centre = np.empty((len(group), key.shape[1]), key.dtype)
        self.local = np.empty_like(key)
        localise(key, start, self.centre, self.local)
        self.packed = (
            PackedKeys(key, low_precision == "int8") if low_precision else None
        )


class _Field:
    """Weights and moments of the keys for a few blocks of queries."""

    def __init__(self, keys, mean, square, sampled, limits, rates):
        self.keys, self.mean, self.limits = keys, mean, limits
        (m, d), r, dtype = keys.key.shape, len(mean), keys.key.dtype
        p, c = keys.value.shape[1], len(keys.group)
        self.weight, remainder = np.empty((2, r, m), dtype)
        for lo in range(0, m, _TILE):
            tile = slice(lo, lo + _TILE)
            self.weight[:, tile] = (keys.key[tile] @ mean.T).T
            remainder[:, tile] = (keys.local[tile] ** 2 @ square.T).T
        self.top, self.total, self.error = np.empty((3, r, c), dtype)
        tiny = np.finfo(dtype).tiny
        self.distance = keys.metric / (square @ keys.metric + tiny)[:, None]
        self.near, self.first_order = np.empty((2, r, m + 1), np.int32)
        self.spans = np.empty((r, c + 1), np.int64)
        self.count = np.empty(r, np.int64)
        growth = np.empty(c, dtype)
        for i in range(r):
            mass, top = self.total[i], self.top[i]
            tilt(self.weight[i], keys.start, mass, top)
            bend(remainder[i], *rates)
            distance = (sampled[i] * sampled[i]) @ keys.metric
            growths(sampled[i] @ keys.centre.T, top, mass, distance, growth)
            self.count[i] = classify(
                self.weight[i], remainder[i], growth, keys.start, *limits,
                self.near[i], self.first_order[i], self.spans[i], mass, self.error[i],
            )  # fmt: skip
        self.shift, self.variance = np.empty((2, r, c, d), dtype)
        self.average = np.empty((r, c, p), dtype)
        sum_moments(
            self.weight, keys.local, keys.value, keys.start, self.total, self.shift,
            self.variance, self.average,
        )  # fmt: skip
        self._sum_first_moments()

    def _sum_first_moments(self):
        """First moments of first-order keys, by groups."""
        keys, (r, c, d), dtype = self.keys, self.shift.shape, self.shift.dtype
        cuts = keys.cuts
        lengths = np.diff(self.spans[:, cuts])
        left = np.empty((lengths.max(), d), dtype)
        right = np.empty((len(left), self.average.shape[2]), dtype)
        self.moment = np.zeros((r, len(cuts) - 1, d, right.shape[1]), dtype)
        own = np.zeros((r, c), dtype)
        # within a group, relative to one key
        common = np.exp(self.top - self.top.max(axis=1)[:, None])
        # groups are outermost, so that their keys stay in cache for all blocks
        for g, i in np.argwhere(lengths.T > 0):
            _gather_first_order(
                cuts[g], cuts[g + 1], self.first_order[i], self.spans[i],
                self.weight[i], keys.local, self.shift[i], keys.value, self.average[i],
                common[i], left, right, own[i],
            )  # fmt: skip
            size = lengths[i, g]
            np.matmul(left[:size].T, right[:size], out=self.moment[i, g])
        whole = np.add.reduceat(own * common, cuts[:-1], axis=1)
        whole = np.repeat(np.where(whole > 0, whole, 1), np.diff(cuts), axis=1)
        self.factor = own / np.where(self.total > 0, self.total, 1) / whole

    def answer(self, r, query, out, norm, error):
        """Attend from block ``r`` of queries; returns counts of keys and clusters."""
        peak = np.full(len(query), -np.inf, query.dtype)
        total, keys = np.zeros(len(query)), self.keys
        out[:] = 0
        clusters = self._add_far(r, query, peak, total, out, error)
        near, before = self.near[r, : self.count[r]], peak.copy()
        done = keys.packed is not None and add_near(
            near, query, self.mean[r], keys.key, keys.packed, keys.value, peak, total,
            out,
        )  # fmt: skip
        if not done:
            self._add_near(near, query, peak, total, out)
        out /= total[:, None]
        error *= (np.exp(before - peak) / total) ** 2
        norm[:] = peak + np.log(total)
        return len(near), self.spans[r, -1], clusters

    def _add_far(self, r, query, peak, total, out, error):
        keys, (b, d), dtype = self.keys, query.shape, query.dtype
        active = np.flatnonzero(self.total[r])
        if not len(active):
            error[:] = 0
            return 0
        table = np.empty((len(active), 2 * d + 1), dtype)
        average = self.average[r, active]
        _tabulate(
            active, self.total[r], self.top[r], keys.centre, self.shift[r],
            self.variance[r], table,
        )  # fmt: skip
        step, features = np.empty((b, d), dtype), np.empty((b, 2 * d + 1), dtype)
        _features(query, self.mean[r], step, features)
        weights = features @ table.T
        _soften(weights, np.full(b, len(active)), False, peak, total, out)
        _estimate(weights, self.error[r, active], step, self.distance[r], error)
        np.matmul(weights, average, out=out)
        if self.spans[r, -1]:
            self._add_first_moments(r, active, weights, step, out)
        return len(active)

    def _add_first_moments(self, r, active, weights, step, out):
        moment = self.moment[r]
        cuts = np.searchsorted(self.keys.group[active], np.arange(len(moment) + 1))
        wide = np.empty((len(step), len(moment) * step.shape[1]), out.dtype)
        _widen(weights, self.factor[r, active], cuts, step, wide)
        out += wide @ moment.reshape(-1, out.shape[1])

    def _add_near(self, near, query, peak, total, out):
        keys, b, dtype = self.keys, len(query), query.dtype
        picked = np.empty((_NEAR, query.shape[1]), dtype)
        values = np.empty((_NEAR, out.shape[1]), dtype)
        flat, part = np.empty(b * _NEAR, dtype), np.empty_like(out)
        for lo in range(0, len(near), _NEAR):
            some = near[lo : lo + _NEAR]
            size = len(some)
            _gather(some, keys.key, keys.value, picked, values)
            weights = flat[: b * size].reshape(b, size)
            np.matmul(query, picked[:size].T, out=weights)
            _soften(weights, np.full(b, size), False, peak, total, out)
            np.matmul(weights, values[:size], out=part)
            out += part


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _describe(query, cuts, mean, square, sampled):
    d, rows = query.shape[1], sampled.shape[1]
    mean[:] = 0
    square[:] = 0
    for r in range(cuts.size - 1):
        lo, hi = cuts[r], cuts[r + 1]
        share = query.dtype.type(1) / query.dtype.type(hi - lo)
        for i in range(lo, hi):
            for l in range(d):
                mean[r, l] += query[i, l]
        for l in range(d):
            mean[r, l] *= share
        for i in range(lo, hi):
            for l in range(d):
                square[r, l] += (query[i, l] - mean[r, l]) ** 2
        for l in range(d):
            square[r, l] *= share
        for i in range(rows):
            for l in range(d):
                sampled[r, i, l] = query[lo + i * (hi - lo) // rows, l] - mean[r, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _tabulate(active, total, top, centre, shift, variance, table):
    # the factors of the features of a query for the logits of the clusters
    d, half = centre.shape[1], centre.dtype.type(0.5)
    for i in range(active.size):
        c = active[i]
        for l in range(d):
            table[i, l] = centre[c, l] + shift[c, l]
            table[i, d + l] = half * variance[c, l]
        table[i, 2 * d] = np.log(total[c]) + top[c]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _features(query, mean, step, out):
    d = query.shape[1]
    for i in range(query.shape[0]):
        for l in range(d):
            x = query[i, l] - mean[l]
            step[i, l] = x
            out[i, l] = x
            out[i, d + l] = x * x
        out[i, 2 * d] = 1


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _estimate(weight, error, step, distance, out):
    for i in range(out.size):
        s, far = out.dtype.type(0), out.dtype.type(0)
        for c in range(error.size):
            s += weight[i, c] * weight[i, c] * error[c]
        for l in range(distance.size):
            far += step[i, l] * step[i, l] * distance[l]
        out[i] = s * far * far


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _gather_first_order(
    first, last, first_order, spans, weight, local, shift, value, average, common, left,
    right, own,
):  # fmt: skip
    n = 0
    for c in range(first, last):
        mass = weight.dtype.type(0)
        for b in range(spans[c], spans[c + 1]):
            j = first_order[b]
            w = weight[j]
            mass += w
            for l in range(left.shape[1]):
                left[n, l] = w * common[c] * (local[j, l] - shift[c, l])
            for l in range(right.shape[1]):
                right[n, l] = value[j, l] - average[c, l]
            n += 1
        own[c] = mass


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _gather(index, key, value, keys, values):
    for i in range(index.size):
        j = index[i]
        for l in range(keys.shape[1]):
            keys[i, l] = key[j, l]
        for l in range(values.shape[1]):
            values[i, l] = value[j, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _widen(weight, factor, cuts, step, out):
    # growths of the groups times steps: the factors of the stacked moments
    rows, d = step.shape
    for i in range(rows):
        row = weight[i]
        for g in range(cuts.size - 1):
            s = weight.dtype.type(0)
            for c in range(cuts[g], cuts[g + 1]):
                s += row[c] * factor[c]
            for l in range(d):
                out[i, g * d + l] = s * step[i, l]
