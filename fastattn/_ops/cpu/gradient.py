"""The derivative of exact attention: five products in tiles, or by BLAS.

With BLAS, two fused passes do the rest. A block of queries stores its logits and the
products ``grad V^T`` with all keys, so that each is computed once: weights are made
relative to the peak of a block of keys, and rescaled in the second pass, when the
row's peak, sum and delta over all keys are known.
"""

import numpy as np

from fastattn._ops.cpu import gradient_tiles as tiles
from fastattn._ops.cpu.tiles import multiplies_bytes
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum

# a block of logits, 512 x 256 float32, and its block of ``grad V^T`` stay in cache
ROWS = 512
KEYS = 256
# queries in a block are fewer, down to this number, where there are many keys
FEWEST = 32
# and where rows see some keys only, since a block multiplies all that one of its rows
# sees: so many blocks then, but no fewer queries
_STEPS, _FEWEST_SEEING = 8, 64
# the products that a block of queries stores stay below this many bytes
_LARGEST_KEPT = 1 << 27
# and those of blocks that await the statistics of other keys below this many
_LARGEST_GROUP = 1 << 24
# tasks, each with its own sums over queries: a number that does not depend on the
# threads, so that the answer does not; fewer where sums would exceed so many bytes
_TASKS = 16
_FEWEST_TASKS = 4
_LARGEST_PARTS = 1 << 26


def attend_vjp(
    query, key, value, grad, *, scale, prefix_lengths, log_normalizer=None, delta=None,
    beside=None, low_precision=False,
):  # fmt: skip
    (n, d), (m, p), dtype = query.shape, value.shape, query.dtype
    if prefix_lengths is not None:
        prefix_lengths = np.minimum(prefix_lengths, m)
    rows = _Rows(
        query, key, value, grad, scale, prefix_lengths, log_normalizer, delta, beside
    )
    in_tiles = tiles.serves(query, key, value, grad)
    size, keys, group = m, None, rows.group
    if in_tiles:
        keys = tiles.Keys(key, value, low_precision and multiplies_bytes())
        group = tiles.rows_at_once(n, keys, beside is not None)
        size = len(keys.key)
    part = size * (d + p) * dtype.itemsize
    tasks = min(_TASKS, max(_FEWEST_TASKS, _LARGEST_PARTS // max(part, 1)))
    span = group * max(1, -(-n // (group * tasks)))
    tasks = -(-n // span)
    query_slope = np.zeros((n, d), dtype=dtype)
    key_parts = np.zeros((tasks, size, d), dtype=dtype)
    value_parts = np.zeros((tasks, size, p), dtype=dtype)

    # sums that overflow give numbers that are not finite; the caller checks for them
    @np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")
    def work(task):
        own = slice(task * span, min((task + 1) * span, n))
        sums = key_parts[task], value_parts[task]
        if in_tiles:
            rows.add_in_tiles(own, group, keys, query_slope, *sums)
        else:
            rows.add_by_blas(own, query_slope, *sums)

    run_blocks(work, range(tasks))
    return query_slope, _total(key_parts)[:m], _total(value_parts)[:m]


class _Rows:
    """The arrays of the rows, and the options of the pass."""

    def __init__(
        self,
        query,
        key,
        value,
        grad,
        scale,
        prefix_lengths,
        log_normalizer,
        delta,
        beside,
    ):
        self.query, self.key, self.value, self.grad = query, key, value, grad
        self.scale, self.prefix_lengths, self.beside = scale, prefix_lengths, beside
        self.log_normalizer, self.delta = log_normalizer, delta
        self.rooms = []
        n, kept = len(query), 2 * len(key) * query.dtype.itemsize
        self.size = min(ROWS, max(FEWEST, _LARGEST_KEPT // max(kept, 1)))
        if prefix_lengths is not None:
            self.size = min(self.size, max(_FEWEST_SEEING, n // _STEPS))
        blocks = max(1, _LARGEST_GROUP // max(kept * self.size, 1))
        blocks = 1 if beside is None else blocks
        self.group = self.size * min(blocks, -(-n // self.size))

    def add_in_tiles(self, own, group, keys, query_slope, key_sum, value_sum):
        """Add the terms of some rows to the sums over queries, in tiles."""
        m, known = len(self.key), self.log_normalizer
        size = tiles.kept(min(group, len(self.query)), keys)
        # once a thread: fresh memory costs as much as a product
        room = self.rooms.pop() if self.rooms else np.empty(size, np.float32)
        for start in range(own.start, own.stop, group):
            some = slice(start, min(start + group, own.stop))
            seen = self.prefix_lengths
            seen = np.full(some.stop - start, m) if seen is None else seen[some]
            block = tiles.Block(
                self.query[some], keys, self.grad[some], self.scale, seen,
                None if known is None else known[some], room,
            )  # fmt: skip
            if not block.is_fine:
                self.add_by_blas(some, query_slope, key_sum[:m], value_sum[:m])
                continue
            if known is not None:
                block.delta = self.delta[some]
            if self.beside is not None:
                block.settle(*self.beside(some, block.normalizer, block.delta))
            block.add(query_slope[some], key_sum, value_sum)
        self.rooms.append(room)

    def add_by_blas(self, own, query_slope, key_sum, value_sum):
        """Add the terms of some rows to the sums over queries, by BLAS."""
        m, dtype = len(self.key), self.query.dtype
        prefix_lengths, known = self.prefix_lengths, self.log_normalizer
        # once a task: fresh memory costs as much as a product
        room = min(self.group, own.stop - own.start)
        buffers = np.empty((2, room * m), dtype=dtype)
        for first in range(own.start, own.stop, self.group):
            last, some = min(first + self.group, own.stop), []
            for start in range(first, last, self.size):
                rows = slice(start, min(start + self.size, last))
                # in float64: a scale, and a query, of extreme size may only meet
                # halfway
                scaled = np.multiply(self.query[rows], self.scale, dtype=np.float64)
                grad = self.grad[rows].astype(dtype, copy=False)
                block = _Block(rows, scaled.astype(dtype), grad)
                block.weigh(
                    self.key, self.value,
                    None if prefix_lengths is None else prefix_lengths[rows],
                    None if known is None else known[rows], buffers[:,
                    (start - first) * m :],
                )  # fmt: skip
                some.append(block)
            if self.beside is not None:
                _settle(some, self.beside)
            for block in some:
                if self.delta is not None:
                    block.delta = self.delta[block.rows].astype(dtype, copy=False)
                slope = query_slope[block.rows]
                block.add(self.key, slope, key_sum, value_sum)
                np.multiply(
                    slope, self.scale, out=slope, dtype=np.float64,
                    casting="same_kind",
                )  # fmt: skip


def _total(parts):
    return parts[0] if len(parts) == 1 else parts.sum(axis=0)


def _settle(blocks, beside):
    """Merge the statistics of some blocks of rows with those of the other keys."""
    rows = slice(blocks[0].rows.start, blocks[-1].rows.stop)
    own = np.concatenate([x.normalizer for x in blocks])
    normalizer, delta = beside(rows, own, np.concatenate([x.delta for x in blocks]))
    # rows that see none of these keys have no weights
    share = np.exp(np.where(own == -np.inf, own, own - normalizer))
    for block in blocks:
        some = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
        block.factor *= share[some]
        block.delta = delta[some]


class _Block:
    """A block of rows, which stores weights between two passes over the keys."""

    def __init__(self, rows, query, grad):
        self.rows, self.query, self.grad = rows, query, grad

    def weigh(self, key, value, prefix_lengths, known, buffers):
        """Exponentiate logits, relative to the given normalizers or to the peaks."""
        n, dtype = len(self.query), self.query.dtype
        last = (
            len(key)
            if prefix_lengths is None
            else min(len(key), int(prefix_lengths.max()))
        )
        spans = [slice(lo, min(lo + KEYS, last)) for lo in range(0, last, KEYS)]
        peak, total, mean = np.empty((3, len(spans), n), dtype=dtype)
        self.parts = []
        for c, keys in enumerate(spans):
            # contiguous, the last one too: strided rows would not vectorise
            place, width = slice(n * keys.start, n * keys.stop), keys.stop - keys.start
            weights, change = (x[place].reshape(n, width) for x in buffers)
            np.matmul(self.query, key[keys].astype(dtype, copy=False).T, out=weights)
            np.matmul(self.grad, value[keys].astype(dtype, copy=False).T, out=change)
            count = (
                np.full(n, width)
                if prefix_lengths is None
                else prefix_lengths - keys.start
            )
            if known is None:
                _soften(weights, change, count, peak[c], total[c], mean[c])
            else:
                _exponentiate(weights, count, known)
            self.parts.append((keys, weights, change))
        if known is None:
            self.factor, self.delta, self.normalizer = _combine(peak, total, mean)
        else:
            self.factor = np.ones_like(peak)

    def add(self, key, query_sum, key_sum, value_sum):
        """Add the terms of the rows to the sums for dQ, dK and dV."""
        dtype = self.query.dtype
        for (keys, weights, change), factor in zip(
            self.parts, self.factor, strict=True
        ):
            _differentiate(weights, change, factor, self.delta)
            value_sum[keys] += weights.T @ self.grad
            key_sum[keys] += change.T @ self.query
            query_sum += change @ key[keys].astype(dtype, copy=False)


def _combine(peak, total, mean):
    """Factors of the weights of each block of keys; delta and log-sum-exp of rows."""
    top = peak.max(axis=0, initial=-np.inf)
    factor = np.exp(peak - np.where(np.isfinite(top), top, 0))
    whole = np.sum(factor * total, axis=0)
    factor /= np.where(whole == 0, 1, whole)
    return factor, np.sum(factor * mean, axis=0), top + np.log(whole)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _soften(logits, change, count, peak, total, mean):
    # turns logits into weights relative to the largest of their row in this block
    for i in range(logits.shape[0]):
        size = min(max(count[i], 0), logits.shape[1])
        logits[i, size:] = 0
        peak[i], total[i], mean[i] = -np.inf, 0, 0
        if size == 0:
            continue
        row, slope = logits[i, :size], change[i, :size]
        largest = row[0]
        for j in range(size):
            largest = maximum(largest, row[j])
        part, moment = row[0] * 0, row[0] * 0
        for j in range(size):
            weight = exp(row[j] - largest)
            row[j] = weight
            part += weight
            moment += weight * slope[j]
        peak[i], total[i], mean[i] = largest, part, moment


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _exponentiate(logits, count, normalizer):
    for i in range(logits.shape[0]):
        size = min(max(count[i], 0), logits.shape[1])
        logits[i, size:] = 0
        row, shift = logits[i, :size], normalizer[i]
        for j in range(size):
            # no weight exceeds 1
            row[j] = exp(-maximum(shift - row[j], row[j] * 0))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _differentiate(weights, change, factor, delta):
    for i in range(weights.shape[0]):
        row, slope, w, shift = weights[i], change[i], factor[i], delta[i]
        for j in range(row.size):
            weight = row[j] * w
            row[j] = weight
            slope[j] = weight * (slope[j] - shift)
