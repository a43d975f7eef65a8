"""The derivative of exact attention in tiles: five products that are never packed.

Queries are lanes, ``LANES`` to a group. Weights, and the products ``grad V^T``, are
kept for all keys, so that each is computed once; the rows of a block are fewer where
there are many keys. On the way back a short block of them, set right, stays in
first-level cache while it is multiplied with queries, keys and derivatives.
"""

import math

import numpy as np
from numba import njit

from fastattn._ops.cpu.derivative_tiles import (
    change_float_tile,
    fetch,
    slope_float_tile,
)
from fastattn._ops.cpu.softmax_tiles import hide, largest_seen
from fastattn._ops.cpu.tiles import (
    COLUMNS,
    LANES,
    add_float_tile,
    has_tiles,
    weigh_float_tile,
)
from fastattn._ops.quantized import PROBES
from sketching._ops.cpu.elementary import REASSOCIATE

# queries that all keys pass before they do so again: up to so many, or so large a part
# of all, since memory that is new costs as much as a product
_ROWS, _STEPS, _FEWEST = 1024, 8, 4 * LANES
# what they keep stays below this many bytes; not all caches are as large, but keys,
# and the sums over queries, would be brought from memory more often
_LARGEST_KEPT = 1 << 26
# keys that pass a group at once: their weights stay in first-level cache
_KEYS = 192
_LOG2 = 1 / math.log(2)


def serves(query, key, value, grad):
    """Whether derivatives can be computed in tiles."""
    return (
        has_tiles()
        and all(x.dtype == np.float32 for x in (query, key, value, grad))
        and 0 not in (*key.shape, *value.shape)
        and key.shape[1] % LANES == 0
        and value.shape[1] % LANES == 0
    )


def rows_at_once(n, m):
    """How many of ``n`` queries pass ``m`` keys together."""
    rows = min(_ROWS, n // _STEPS, _LARGEST_KEPT // (8 * m))
    return max(_FEWEST, rows // LANES * LANES)


def kept(n, m):
    """How many numbers a block of so many rows, and whole tiles of keys, keeps."""
    return 2 * -(-n // LANES) * LANES * m


def filled(x, multiple, number=0):
    """An array filled up with a number to whole tiles, or whole groups, of rows."""
    missing = -len(x) % multiple
    if not missing:
        return np.ascontiguousarray(x)
    return np.concatenate([x, np.full((missing, *x.shape[1:]), number, x.dtype)])


class Block:
    """A block of rows, which keeps weights between two passes over the keys.

    ``key`` and ``value`` are filled up to whole tiles; ``visible`` counts those that a
    row sees, of ``m``. Weights, which there is ``room`` for, are relative to the
    normalizers where these are known.
    """

    def __init__(self, query, key, value, grad, scale, visible, m, known, room):
        n = len(query)
        # in float64: a scale, and a query, of extreme size may only meet halfway
        scaled = np.multiply(query, scale, dtype=np.float64)
        raised = (_LOG2 * scaled).astype(np.float32)
        if known is None:
            logits = raised @ key[: m : max(1, m // PROBES)].T
            shift = largest_seen(logits, visible, m)
        else:
            shift = (_LOG2 * np.asarray(known, np.float64)).astype(np.float32)
        self.key, self.scale, self.blind = key, scale, visible == 0
        self.query, self.grad = (
            _in_groups(x.astype(np.float32, copy=False)) for x in (scaled, grad)
        )
        # what fills up the last group has no weights
        self.shift = _in_groups(shift, np.inf)
        self.seen = _in_groups(np.asarray(visible, np.int64), visible[-1])
        self.kept = room[: kept(n, len(key))]
        self.kept = self.kept.reshape(2, len(self.seen), len(key), LANES)
        mass, moment = np.zeros((2, *self.seen.shape))
        _weigh(
            _across(_in_groups(raised)), _across(self.grad), self.shift, self.seen, key,
            value, *self.kept, mass, moment,
        )  # fmt: skip
        self.share, self.is_fine = np.ones(n), True
        if known is None:
            self._sum(shift, *(x.reshape(-1)[:n] for x in (mass, moment)))

    def _sum(self, shift, mass, moment):
        """Find out what is known of the rows over these keys."""
        mass = np.where(self.blind, 1, mass)
        self.is_fine = bool(np.all(np.isfinite(mass) & np.isfinite(moment)))
        self.share = np.where(self.blind, 0, 1 / mass)
        normalizer = shift / _LOG2 + np.log(mass)
        normalizer[self.blind] = -np.inf
        self.normalizer = normalizer.astype(np.float32)
        self.drift = (self.share * moment).astype(np.float32)

    def settle(self, normalizer, drift):
        """Take what is known of the rows over all keys."""
        own = self.normalizer
        self.share *= np.exp(np.where(self.blind, -np.inf, own - normalizer))
        self.drift = drift

    def add(self, query_slope, key_sum, value_sum):
        """Write the derivative by the queries, and add to the sums over them."""
        groups, _, d = self.query.shape
        sums = np.zeros((groups, d, LANES), np.float32)
        share, drift = (
            _in_groups(x.astype(np.float32, copy=False))
            for x in (self.share, self.drift)
        )
        _add(
            *self.kept, share, drift, self.seen, self.query, self.grad, self.key, sums,
            key_sum, value_sum,
        )  # fmt: skip
        slope = sums.transpose(0, 2, 1).reshape(-1, d)[: len(query_slope)]
        np.multiply(
            slope, self.scale, out=query_slope, dtype=np.float64, casting="same_kind"
        )


def _in_groups(x, number=0):
    x = filled(x, LANES, number)
    return x.reshape(-1, LANES, *x.shape[1:])


def _across(x):
    return np.ascontiguousarray(x.transpose(0, 2, 1))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh(lanes, grads, shift, seen, key, value, weights, change, mass, moment):
    part = np.empty((2, LANES), np.float32)
    for lo in range(0, seen.max(), _KEYS):
        for g in range(seen.shape[0]):
            part[:] = 0
            _weigh_group(
                lanes[g], grads[g], shift[g], seen[g], key, value, lo, weights[g],
                change[g], part,
            )  # fmt: skip
            for l in range(LANES):
                mass[g, l] += part[0, l]
                moment[g, l] += part[1, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh_group(lanes, grads, shift, seen, key, value, lo, weights, change, part):
    # addresses, since slices that are made in a loop count who holds them
    d, p, spare = key.shape[1], value.shape[1], np.empty(LANES, np.float32)
    last, full = min(lo + _KEYS, seen.max()), seen.min()
    lane, grad, own_shift = lanes.ctypes.data, grads.ctypes.data, shift.ctypes.data
    keys, values = key.ctypes.data, value.ctypes.data
    mass, others = part.ctypes.data, spare.ctypes.data
    here, there = weights.ctypes.data, change.ctypes.data
    for first in range(lo, last, COLUMNS):
        line, is_seen = 4 * LANES * first, first + COLUMNS <= full
        weigh_float_tile(
            lane, 4 * LANES, keys + 4 * d * first, 4 * d, d, own_shift,
            mass if is_seen else others, here + line,
        )  # fmt: skip
        if not is_seen:
            hide(weights[first:], first, seen, part[0])
        change_float_tile(
            grad, 4 * LANES, values + 4 * p * first, 4 * p, p, here + line,
            mass + 4 * LANES, there + line,
        )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add(
    weights, change, share, drift, seen, query, grad, key, sums, key_sum, value_sum
):
    d, p = key.shape[1], grad.shape[2]
    part = np.empty((d, LANES), np.float32)
    own, slopes = (
        np.empty((_KEYS, LANES), np.float32),
        np.empty((_KEYS, LANES), np.float32),
    )
    for lo in range(0, seen.max(), _KEYS):
        keys = key.ctypes.data + 4 * d * lo
        key_sums, value_sums = (
            key_sum.ctypes.data + 4 * d * lo,
            value_sum.ctypes.data + 4 * p * lo,
        )
        for g in range(seen.shape[0]):
            # whole tiles, if any
            size = min(lo + _KEYS, seen[g].max()) - lo
            if size <= 0:
                continue
            size += -size % COLUMNS
            _differentiate(
                weights[g, lo:].ctypes.data, change[g, lo:].ctypes.data, size,
                share[g].ctypes.data, drift[g].ctypes.data, own.ctypes.data,
                slopes.ctypes.data,
            )  # fmt: skip
            after = min(g + 1, len(seen) - 1)
            _add_rows(
                own.ctypes.data, size, grad[g].ctypes.data, p, value_sums,
                weights[after, lo:].ctypes.data,
            )  # fmt: skip
            _add_rows(
                slopes.ctypes.data, size, query[g].ctypes.data, d, key_sums,
                change[after, lo:].ctypes.data,
            )  # fmt: skip
            for c in range(0, d, COLUMNS):
                add_float_tile(
                    slopes.ctypes.data, 4 * LANES, keys + 4 * c, 4, 4 * d, size,
                    part.ctypes.data + 4 * LANES * c, 4 * LANES, 1,
                )  # fmt: skip
            for t in range(d):
                for l in range(LANES):
                    sums[g, t, l] += part[t, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _differentiate(weights, change, size, share, drift, own, slopes):
    for first in range(0, size, COLUMNS):
        line = 4 * LANES * first
        slope_float_tile(
            weights + line, change + line, share, drift, own + line, slopes + line
        )


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add_rows(weights, size, rows, width, sums, ahead):
    # to every key the rows of the group, weighted; meanwhile what the next group has
    # kept is brought nearer
    for c in range(0, width, LANES):
        for first in range(0, size, COLUMNS):
            add_float_tile(
                rows + 4 * c, 4 * width, weights + 4 * LANES * first, 4 * LANES, 4,
                LANES, sums + 4 * (width * first + c), 4 * width, 0,
            )  # fmt: skip
            if c == 0:
                for line in range(0, 4 * LANES * COLUMNS, 64):
                    fetch(ahead + 4 * LANES * first + line)
