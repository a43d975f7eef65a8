"""Blocks of queries as in the forward pass; logits and ``grad V^T`` are computed once.

The gradients of far keys are summed over clusters first: several blocks distribute
them to the keys in one pass over the keys.
"""

import numpy as np

from fastattn._ops.cpu.gradient import _combine, _differentiate, _soften
from fastattn._ops.cpu.multipole import (
    _KEPT,
    _SHARED,
    _estimate,
    _features,
    _Field,
    _gather,
    _Keys,
    _plain,
    _tabulate,
)
from fastattn._ops.multipole import ALIKE, BEND, FIRST_ORDER, LARGEST
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE

# near keys that are done at once
_NEAR = 256
# tasks have their own sums over queries: no more than these bytes, but a few tasks
_LARGEST_PARTS = 1 << 27
_FEWEST_TASKS = 4


def multipole_vjp(
    query, blocks, key, value, metric, grad, limit, *,
    cuts, start, group, threshold, all_first_order=False,
):  # fmt: skip
    (n, d), (m, p), dtype = query.shape, value.shape, query.dtype
    count = len(cuts) - 1
    query, key, value, grad = (_plain(x) for x in (query, key, value, grad))
    keys = _Keys(key, value, metric, start, group, low_precision=False)
    first_order = -1 if all_first_order else FIRST_ORDER * threshold
    limits = [dtype.type(x) for x in (threshold, first_order, ALIKE)]
    rates = [dtype.type(x) for x in (BEND, LARGEST)]
    shared = max(1, min(_SHARED, _KEPT // m))
    most = max(_FEWEST_TASKS, _LARGEST_PARTS // (m * (d + p) * dtype.itemsize))
    span = shared * max(1, -(-count // (shared * most)))
    tasks = -(-count // span)
    slope = np.empty((n, d), dtype)
    key_parts, value_parts = (np.zeros((tasks, m, x), dtype) for x in (d, p))
    norm, delta = np.empty((2, n), dtype)

    @np.errstate(all="ignore")
    def work(task):
        sums = key_parts[task], value_parts[task]
        memory = np.empty(0, dtype)
        for first in range(task * span, min((task + 1) * span, count), shared):
            some = range(first, min(first + shared, count))
            field = _Field(keys, *(x[some] for x in blocks), limits, rates)
            # one for all blocks: fresh memory costs as much as a product
            size = int((np.diff(cuts[first : some.stop + 1]) * field.count).max())
            if len(memory) < 2 * size:
                memory = np.empty(2 * size, dtype)
            back = _Backward(field, *sums, memory)
            for r in some:
                rows = slice(cuts[r], cuts[r + 1])
                norm[rows], delta[rows] = back.add(
                    r - first, query[rows], grad[rows], limit[rows], slope[rows]
                )
            back.hand_out()

    run_blocks(work, range(tasks))
    return slope, key_parts.sum(axis=0), value_parts.sum(axis=0), norm, delta


class _Backward:
    """Gradients of a few blocks of queries for clusters and groups of keys."""

    def __init__(self, field, key_sum, value_sum, memory):
        self.field, self.key_sum, self.value_sum = field, key_sum, value_sum
        self.memory = memory
        (r, c, d), p, dtype = field.shift.shape, field.average.shape[2], key_sum.dtype
        # over the far weights of a cluster and their derivatives: grad, steps, ones
        self.grads = np.zeros((r, c, p), dtype)
        self.steps = np.zeros((r, c, d), dtype)
        self.ones = np.zeros((r, c), dtype)
        # over the growths of a group: steps times grad
        self.tilts = np.zeros_like(field.moment)

    def add(self, r, query, grad, limit, slope):
        """Differentiate a block; returns log-sum-exps and deltas of its rows."""
        field = self.field
        near = field.near[r, : field.count[r]]
        far = _Far(field, r, query, grad)
        parts = [(far.weights, far.change), *self._near(near, query, grad)]
        peak, total, mean = np.empty((3, len(parts), len(query)), query.dtype)
        for i, (weights, change) in enumerate(parts):
            count = np.full(len(query), weights.shape[1])
            _soften(weights, change, count, peak[i], total[i], mean[i])
        factor, delta, norm = _combine(peak, total, mean)
        reliable = np.isfinite(norm) & (far.errors(factor[0]) <= limit)
        norm[~reliable], delta[~reliable] = np.inf, 0
        for i, (weights, change) in enumerate(parts):
            _differentiate(weights, change, factor[i], delta)
            # not by the factors: what is not finite stays so in a product
            if not reliable.all():
                weights[~reliable], change[~reliable] = 0, 0
        slope[:] = 0
        far.add(grad, slope, self)
        self._add_near(near, parts[1:], query, grad, slope)
        slope[~reliable] = 0
        return norm, delta

    def _near(self, near, query, grad):
        """Logits and products of the values for parts of the near keys."""
        keys, b = self.field.keys, len(query)
        self.picked = np.empty((len(near), query.shape[1]), query.dtype)
        values = np.empty((len(near), grad.shape[1]), query.dtype)
        _gather(near, keys.key, keys.value, self.picked, values)
        buffers = self.memory[: 2 * b * len(near)].reshape(2, -1)
        for lo in range(0, len(near), _NEAR):
            some = slice(lo, min(lo + _NEAR, len(near)))
            # contiguous: strided rows would not vectorise
            weights, change = (
                x[b * lo : b * some.stop].reshape(b, -1) for x in buffers
            )
            np.matmul(query, self.picked[some].T, out=weights)
            np.matmul(grad, values[some].T, out=change)
            yield weights, change

    def _add_near(self, near, parts, query, grad, slope):
        for i, (weights, change) in enumerate(parts):
            some = slice(i * _NEAR, i * _NEAR + weights.shape[1])
            slope += change @ self.picked[some]
            _scatter(
                near[some], change.T @ query, weights.T @ grad, self.key_sum,
                self.value_sum,
            )  # fmt: skip

    def hand_out(self):
        """Distribute the gradients of clusters and groups to their far keys."""
        field, keys = self.field, self.field.keys
        _share(
            field.weight, keys.value, keys.start, field.total, field.mean,
            field.average, self.grads, self.steps, self.ones, self.key_sum,
            self.value_sum,
        )  # fmt: skip
        cuts, (d, p) = keys.cuts, self.tilts.shape[2:]
        lengths = np.diff(field.spans[:, cuts])
        most, dtype = lengths.max(), field.weight.dtype
        local, value = np.empty((most, d), dtype), np.empty((most, p), dtype)
        weight = np.empty(most, dtype)
        common = np.exp(field.top - field.top.max(axis=1)[:, None])
        for g, i in np.argwhere(lengths.T > 0):
            some = field.first_order[
                i, field.spans[i, cuts[g]] : field.spans[i, cuts[g + 1]]
            ]
            size = len(some)
            _gather_first_order(
                cuts[g], cuts[g + 1], field.first_order[i], field.spans[i],
                field.weight[i], keys.local, field.shift[i], keys.value,
                field.average[i], common[i], weight, local, value,
            )  # fmt: skip
            tilt = self.tilts[i, g]
            _scatter_first_order(
                some, weight, local, field.mean[i], value[:size] @ tilt.T,
                local[:size] @ tilt, self.key_sum, self.value_sum,
            )  # fmt: skip


class _Far:
    """The far field of one block of queries."""

    def __init__(self, field, r, query, grad):
        self.field, self.r, keys = field, r, field.keys
        b, d = query.shape
        self.active = active = np.flatnonzero(field.total[r])
        self.table = np.empty((len(active), 2 * d + 1), query.dtype)
        _tabulate(
            active, field.total[r], field.top[r], keys.centre, field.shift[r],
            field.variance[r], self.table,
        )  # fmt: skip
        self.step = np.empty((b, d), query.dtype)
        features = np.empty((b, 2 * d + 1), query.dtype)
        _features(query, field.mean[r], self.step, features)
        self.weights = features @ self.table.T
        self.change = grad @ field.average[r, active].T
        self.has_first_order = len(active) and field.spans[r, -1]
        if self.has_first_order:
            moment = field.moment[r]
            groups = np.arange(len(moment) + 1)
            self.cuts = np.searchsorted(keys.group[active], groups)
            self.factor = field.factor[r, active]
            self.pull = grad @ moment.reshape(-1, grad.shape[1]).T
            _tilt(self.pull, self.step, self.factor, self.cuts, self.change)

    def errors(self, factor):
        """Estimate the squared errors of the rows up to a common factor."""
        field, r = self.field, self.r
        error = np.empty_like(factor)
        own = field.error[r, self.active]
        _estimate(self.weights, own, self.step, field.distance[r], error)
        return error * factor**2

    def add(self, grad, slope, back):
        """Add to the gradients of the queries, of clusters and of groups."""
        r, active, change, d = self.r, self.active, self.change, slope.shape[1]
        if not len(active):
            return
        back.grads[r, active] = self.weights.T @ grad
        back.steps[r, active] = change.T @ self.step
        back.ones[r, active] = change.sum(axis=0)
        both = change @ self.table[:, : 2 * d]
        # the table has half the variances
        slope += both[:, :d] + 2 * self.step * both[:, d:]
        if self.has_first_order:
            wide = np.empty_like(self.pull)
            _pull(
                self.weights, self.factor, self.cuts, self.step, self.pull, wide, slope
            )
            np.matmul(wide.T, grad, out=back.tilts[r].reshape(-1, grad.shape[1]))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _tilt(pull, step, factor, cuts, change):
    # the contribution of first moments to the products of values and grad
    rows, d = step.shape
    for i in range(rows):
        for g in range(cuts.size - 1):
            s = pull.dtype.type(0)
            for l in range(d):
                s += step[i, l] * pull[i, g * d + l]
            for c in range(cuts[g], cuts[g + 1]):
                change[i, c] += factor[c] * s


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pull(weight, factor, cuts, step, pull, wide, slope):
    # growths of the groups times steps, and the gradients of queries by growths
    rows, d = step.shape
    for i in range(rows):
        for g in range(cuts.size - 1):
            s = weight.dtype.type(0)
            for c in range(cuts[g], cuts[g + 1]):
                s += weight[i, c] * factor[c]
            for l in range(d):
                wide[i, g * d + l] = s * step[i, l]
                slope[i, l] += s * pull[i, g * d + l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _scatter(index, keys, values, key_sum, value_sum):
    for i in range(index.size):
        j = index[i]
        for l in range(keys.shape[1]):
            key_sum[j, l] += keys[i, l]
        for l in range(values.shape[1]):
            value_sum[j, l] += values[i, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _share(
    weight, value, start, total, mean, average, grads, steps, ones, key_sum, value_sum
):
    # clusters are outermost, so that one pass over the keys serves all blocks
    p, d = grads.shape[2], steps.shape[2]
    for c in range(total.shape[1]):
        for r in range(total.shape[0]):
            if total[r, c] == 0:
                continue
            grad, step, a = grads[r, c], steps[r, c], mean[r]
            scale, rest = weight.dtype.type(1) / total[r, c], ones[r, c]
            for l in range(p):
                rest -= grad[l] * average[r, c, l]
            for j in range(start[c], start[c + 1]):
                w, s = scale * weight[r, j], rest
                for l in range(p):
                    s += grad[l] * value[j, l]
                for l in range(p):
                    value_sum[j, l] += w * grad[l]
                for l in range(d):
                    key_sum[j, l] += w * (s * a[l] + step[l])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _gather_first_order(
    first, last, first_order, spans, weight, local, shift, value, average, common,
    weights, left, right,
):  # fmt: skip
    n = 0
    for c in range(first, last):
        for b in range(spans[c], spans[c + 1]):
            j = first_order[b]
            weights[n] = weight[j] * common[c]
            for l in range(left.shape[1]):
                left[n, l] = local[j, l] - shift[c, l]
            for l in range(right.shape[1]):
                right[n, l] = value[j, l] - average[c, l]
            n += 1


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _scatter_first_order(index, weight, local, mean, keys, values, key_sum, value_sum):
    for i in range(index.size):
        j, w, s = index[i], weight[i], weight.dtype.type(0)
        for l in range(keys.shape[1]):
            s += local[i, l] * keys[i, l]
        for l in range(keys.shape[1]):
            key_sum[j, l] += w * (keys[i, l] + s * mean[l])
        for l in range(values.shape[1]):
            value_sum[j, l] += w * values[i, l]
