"""The derivative of exact attention in tiles: five products that are never packed.

Queries are lanes, ``LANES`` to a group. Weights, and the products ``grad V^T``, are
stored for all keys, so that each is computed once; a block has fewer rows where there
are many keys. In the second pass a short block of them, rescaled, stays in first-level
cache while it is multiplied with queries, keys and derivatives.
"""

import numpy as np

from fastattn._ops.cpu.derivative_tiles import (
    change_float_tile,
    change_pair_tile,
    fetch,
    slope_float_tile,
    slope_pair_tile,
)
from fastattn._ops.cpu.packing import mean_of, pack_rows
from fastattn._ops.cpu.softmax_tiles import hide, largest_seen
from fastattn._ops.cpu.tiles import (
    COLUMNS,
    LANES,
    LOG2,
    add_float_tile,
    add_tile,
    has_tiles,
    weigh_float_tile,
    weigh_pair_tile,
)
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE

# queries that all keys pass before they do so again: up to so many, or so large a part
# of all, since memory that is new costs as much as a product
_ROWS, _STEPS, _LOW_PRECISION_STEPS, _FEWEST = 1024, 8, 4, 4 * LANES
# what is stored stays below this many bytes; not all caches are as large, but keys,
# and the sums over queries, would be brought from memory more often
_LARGEST_KEPT = 1 << 26
# where log-sum-exps are merged with those of other keys, each call of the function
# that knows them costs time: rows are merged together, below this many bytes
_LARGEST_ASKING = 1 << 23
# keys that pass a group at once: their weights stay in first-level cache
_KEYS = 192


def serves(query, key, value, grad):
    """Whether derivatives can be computed in tiles."""
    return (
        has_tiles()
        and all(x.dtype == np.float32 for x in (query, key, value, grad))
        and 0 not in (*key.shape, *value.shape)
        and key.shape[1] % LANES == 0
        and value.shape[1] % LANES == 0
    )


def rows_at_once(n, keys, is_asking):
    """How many of ``n`` queries pass the keys together."""
    line = 4 * keys.m * keys.planes
    steps = _LOW_PRECISION_STEPS if keys.low_precision else _STEPS
    rows = min(_ROWS, n // steps, _LARGEST_KEPT // line)
    if is_asking:
        rows = max(rows, min(n, _LARGEST_ASKING // line))
    return max(_FEWEST, rows // LANES * LANES)


def kept(n, keys):
    """How many numbers a block of ``n`` rows stores."""
    return keys.planes * -(-n // LANES) * LANES * len(keys.key)


def filled(x, multiple, number=0):
    """An array padded with a number to whole tiles, or whole groups, of rows."""
    missing = -len(x) % multiple
    if not missing:
        return np.ascontiguousarray(x)
    return np.concatenate([x, np.full((missing, *x.shape[1:]), number, x.dtype)])


class Keys:
    """Keys and values, padded to whole tiles; in low precision, pairs of bfloat16.

    In low precision the means are subtracted, so that only deviations are rounded.
    """

    def __init__(self, key, value, low_precision):
        self.m, self.low_precision = len(key), low_precision
        # in low precision a weight and a product are the halves of one word
        self.planes = 1 if low_precision else 2
        if low_precision:
            self.means = [mean_of(x) for x in (key, value)]
            key, value = (x - y for x, y in zip((key, value), self.means, strict=True))
        self.key, self.value = (filled(x, COLUMNS) for x in (key, value))
        self.words = self.down = self.key
        self.value_words = self.value
        if low_precision:
            self.words, self.value_words = _pairs(self.key), _pairs(self.value)
            self.down = _pairs_down(self.key)


class Block:
    """A block of rows, which stores weights between two passes over the keys.

    ``prefix_lengths``, ``(n,)``, counts the keys that a row sees. Weights are stored in
    ``room``, relative to the normalizers where these are given.
    """

    def __init__(self, query, keys, grad, scale, prefix_lengths, known, room):
        n, m, low_precision, key = len(query), keys.m, keys.low_precision, keys.key
        # in float64: a scale, and a query, of extreme size may only meet halfway
        scaled = np.multiply(query, scale, dtype=np.float64)
        raised = (LOG2 * scaled).astype(np.float32)
        if known is None:
            shift = largest_seen(raised, key[:m], prefix_lengths)
        else:
            shift = (LOG2 * np.asarray(known, np.float64)).astype(np.float32)
        self.keys, self.scale, self.blind = keys, scale, prefix_lengths == 0
        self.query, self.grad = (
            _in_groups(x.astype(np.float32, copy=False)) for x in (scaled, grad)
        )
        self.seen = _in_groups(np.asarray(prefix_lengths, np.int64), prefix_lengths[-1])
        room = room[: kept(n, keys)].reshape(-1, len(self.seen), len(key), LANES)
        # the same ones where both are in one word
        self.kept = room[0], room[-1]
        mass, moment = np.zeros((2, *self.seen.shape))
        lanes, grads = _in_groups(raised), self.grad
        self.offset = np.zeros((2, n), np.float32)
        if low_precision:
            lanes, grads = _pairs(lanes), _pairs(grads)
            self.query, self.grad = _pairs_down(self.query), _pairs_down(self.grad)
            self.offset[:] = (scaled @ keys.means[0], grad @ keys.means[1])
            shift = shift - np.float32(LOG2) * self.offset[0]
        # the padding of the last group has no weights
        self.shift = _in_groups(shift, np.inf)
        _weigh(
            low_precision, _across(lanes), _across(grads), self.shift, self.seen,
            keys.words, keys.value_words, *self.kept, mass, moment,
        )  # fmt: skip
        self.share, self.is_fine = np.ones(n), True
        if known is None:
            self._sum(shift, *(x.reshape(-1)[:n] for x in (mass, moment)))

    def _sum(self, shift, mass, moment):
        """Find the log-sum-exp and delta of the rows over these keys."""
        mass = np.where(self.blind, 1, mass)
        self.is_fine = bool(
            np.all((mass > 0) & np.isfinite(mass) & np.isfinite(moment))
        )
        self.share = np.where(self.blind, 0, 1 / mass)
        normalizer = shift / LOG2 + np.log(mass) + self.offset[0]
        normalizer[self.blind] = -np.inf
        self.normalizer = normalizer.astype(np.float32)
        self.delta = (self.share * moment + self.offset[1]).astype(np.float32)

    def settle(self, normalizer, delta):
        """Set the log-sum-exp and delta of the rows over all keys."""
        own = self.normalizer
        self.share *= np.exp(np.where(self.blind, -np.inf, own - normalizer))
        self.delta = delta

    def add(self, query_slope, key_sum, value_sum):
        """Write dQ, and add to dK and dV."""
        groups, d = len(self.query), self.keys.key.shape[1]
        sums = np.zeros((groups, d, LANES), np.float32)
        share, delta = (
            _in_groups(x.astype(np.float32, copy=False))
            for x in (self.share, self.delta - self.offset[1])
        )
        _add(
            self.keys.low_precision, *self.kept, share, delta, self.seen, self.query,
            self.grad, self.keys.down, sums, key_sum, value_sum,
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


def _pairs(x):
    """Neighbours in every row rounded to bfloat16, in the bits of a float32."""
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    words = np.empty((len(rows), x.shape[-1] // 2), np.uint32)
    pack_rows(rows, words)
    return words.view(np.float32).reshape(*x.shape[:-1], -1)


def _pairs_down(x):
    """Neighbours in every column, of an even number of rows, likewise."""
    *lead, n, d = x.shape
    return _pairs(np.swapaxes(x.reshape(*lead, n // 2, 2, d), -1, -2))[..., 0]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh(
    low_precision, lanes, grads, shift, seen, key, value, weights, change, mass, moment
):
    part, tile = (
        np.empty((2, LANES), np.float32),
        np.empty((COLUMNS, LANES), np.float32),
    )
    for lo in range(0, seen.max(), _KEYS):
        for g in range(seen.shape[0]):
            part[:] = 0
            _weigh_group(
                low_precision, lanes[g], grads[g], shift[g], seen[g], key, value, lo,
                weights[g], change[g], tile, part,
            )  # fmt: skip
            for l in range(LANES):
                mass[g, l] += part[0, l]
                moment[g, l] += part[1, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh_group(
    low_precision,
    lanes,
    grads,
    shift,
    seen,
    key,
    value,
    lo,
    weights,
    change,
    tile,
    part,
):
    # addresses, since slices that are made in a loop count who holds them
    d, p, spare = key.shape[1], value.shape[1], np.empty(LANES, np.float32)
    last, full = min(lo + _KEYS, seen.max()), seen.min()
    lane, grad, own_shift = lanes.ctypes.data, grads.ctypes.data, shift.ctypes.data
    keys, values = key.ctypes.data, value.ctypes.data
    mass, others = part.ctypes.data, spare.ctypes.data
    here, there = weights.ctypes.data, change.ctypes.data
    for first in range(lo, last, COLUMNS):
        line, is_seen = 4 * LANES * first, first + COLUMNS <= full
        own = mass if is_seen else others
        right = keys + 4 * d * first
        if low_precision:
            weigh_pair_tile(
                lane, 4 * LANES, right, 4 * d, d, own_shift, own, tile.ctypes.data
            )
        else:
            weigh_float_tile(
                lane, 4 * LANES, right, 4 * d, d, own_shift, own, here + line
            )
        if not is_seen:
            hide(tile if low_precision else weights[first:], first, seen, part[0])
        right, moment = values + 4 * p * first, mass + 4 * LANES
        if low_precision:
            change_pair_tile(
                grad, 4 * LANES, right, 4 * p, p, tile.ctypes.data, moment, there + line
            )
        else:
            change_float_tile(
                grad, 4 * LANES, right, 4 * p, p, here + line, moment, there + line
            )


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add(
    low_precision, weights, change, share, delta, seen, query, grad, key, sums, key_sum,
    value_sum,
):  # fmt: skip
    # pairs are half as many words, and half as many steps
    d, p, each = key.shape[1], grad.shape[2], 2 if low_precision else 1
    part = np.empty((d, LANES), np.float32)
    own, slopes, across = (
        np.empty((_KEYS, LANES), np.float32),
        np.empty((_KEYS, LANES), np.float32),
        np.empty((_KEYS, LANES), np.float32),
    )
    for lo in range(0, seen.max(), _KEYS):
        keys = key.ctypes.data + 4 * d * lo // each
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
                low_precision, weights[g, lo:].ctypes.data, change[g, lo:].ctypes.data,
                size, share[g].ctypes.data, delta[g].ctypes.data, own.ctypes.data,
                slopes.ctypes.data, across.ctypes.data,
            )  # fmt: skip
            after = min(g + 1, len(seen) - 1)
            _add_rows(
                low_precision, own.ctypes.data, size, grad[g].ctypes.data, p,
                value_sums, weights[after, lo:].ctypes.data,
            )  # fmt: skip
            _add_rows(
                low_precision, slopes.ctypes.data, size, query[g].ctypes.data, d,
                key_sums, change[after, lo:].ctypes.data,
            )  # fmt: skip
            left = across.ctypes.data if low_precision else slopes.ctypes.data
            for c in range(0, d, COLUMNS):
                _multiply(
                    low_precision, left, 4 * LANES, keys + 4 * c, 4, 4 * d,
                    size // each, part.ctypes.data + 4 * LANES * c, 4 * LANES, 1,
                )  # fmt: skip
            for t in range(d):
                for l in range(LANES):
                    sums[g, t, l] += part[t, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _differentiate(
    low_precision, weights, change, size, share, delta, own, slopes, across
):
    for first in range(0, size, COLUMNS):
        line = 4 * LANES * first
        if low_precision:
            slope_pair_tile(
                change + line, share, delta, own + line // 2, slopes + line // 2,
                across + line // 2,
            )  # fmt: skip
        else:
            slope_float_tile(
                weights + line, change + line, share, delta, own + line, slopes + line
            )


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add_rows(low_precision, weights, size, rows, width, sums, ahead):
    # to every key the rows of the group, weighted; meanwhile the stored weights of the
    # next group are prefetched
    steps = LANES // 2 if low_precision else LANES
    for c in range(0, width, LANES):
        for first in range(0, size, COLUMNS):
            _multiply(
                low_precision, rows + 4 * c, 4 * width, weights + 4 * steps * first,
                4 * steps, 4, steps, sums + 4 * (width * first + c), 4 * width, 0,
            )  # fmt: skip
            if c == 0:
                for line in range(0, 4 * LANES * COLUMNS, 64):
                    fetch(ahead + 4 * LANES * first + line)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _multiply(low_precision, left, row, right, column, step, steps, sums, line, fresh):
    if low_precision:
        add_tile(left, row, right, column, step, steps, sums, line, fresh)
    else:
        add_float_tile(left, row, right, column, step, steps, sums, line, fresh)
