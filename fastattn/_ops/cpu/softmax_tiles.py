"""A block of rows of exact attention whose logits never leave the registers.

Queries are lanes, ``LANES`` to a group. Keys and values are read where they lie, so
that few rows are as fast per row as many. BLAS is slower for few rows: it packs both
sides.
"""

import numpy as np

from fastattn._ops.cpu.tiles import (
    COLUMNS,
    LANES,
    LOG2,
    add_float_tile,
    has_tiles,
    weigh_float_tile,
)
from fastattn._ops.extreme import may_overflow
from fastattn._ops.quantized import SAMPLED_KEYS
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum

# keys that pass a group at once, after which their sums are added to those before:
# no more terms are added one after the other than the bound of the rounding allows for
KEYS = 256
# groups that a block of keys passes while it is in second-level cache
_GROUPS = 8


def serves(query, key, value):
    """Whether a block of rows can be attended to in tiles."""
    arrays = query, key, value
    return (
        has_tiles()
        and all(x.dtype == np.float32 for x in arrays)
        and all(x.flags.c_contiguous for x in (key, value))
        and value.shape[1] % COLUMNS == 0
    )


def attend_tiles(query, key, value, scale, prefix_lengths, out, normalizer):
    """Attend from a block of rows; False, output undefined, if a sum may overflow."""
    # in float64: a scale, and a query, of extreme size may only meet halfway
    scaled = np.multiply(query, scale * LOG2, dtype=np.float64).astype(np.float32)
    shift = largest_seen(scaled, key, prefix_lengths)
    if not np.isfinite(shift).all():
        return False
    seen = np.full(len(query), len(key)) if prefix_lengths is None else prefix_lengths
    good, largest = _attend(scaled, shift, seen, key, value, out, normalizer)
    longest, most = float(np.abs(scaled).max()), float(np.finfo(np.float32).max)
    return good and not may_overflow(longest, float(largest), key.shape[1], most)


def largest_seen(query, key, prefix_lengths):
    """The largest logit of every row with some evenly spread keys that it sees."""
    step = max(1, len(key) // SAMPLED_KEYS)
    logits = query @ key[::step].T
    if prefix_lengths is not None:
        number = np.arange(0, len(key), step)
        # a row that sees none takes the first
        logits[number[None, :] >= np.maximum(prefix_lengths, 1)[:, None]] = -np.inf
    return np.max(logits, axis=1)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _attend(query, shift, prefix_lengths, key, value, out, normalizer):
    (n, d), (m, p) = query.shape, value.shape
    most = min(_GROUPS, -(-n // LANES))
    lanes = np.empty((most, d, LANES), np.float32)
    sums = np.empty((most, p, LANES), np.float32)
    shifts, total = np.empty((most, LANES), np.float32), np.empty((most, LANES))
    seen = np.empty((most, LANES), np.int64)
    part = np.empty((p, LANES), np.float32)
    weights = np.empty((KEYS, LANES), np.float32)
    mass, good = np.empty(LANES, np.float32), True
    largest = np.float32(0)
    # the last keys, padded to a tile
    rest = m - m % COLUMNS
    last_key = np.zeros((COLUMNS, d), np.float32)
    last_value = np.zeros((COLUMNS, p), np.float32)
    last_key[: m - rest], last_value[: m - rest] = key[rest:], value[rest:]
    for start in range(0, n, most * LANES):
        groups = min(most, -(-(n - start) // LANES))
        for g in range(groups):
            _pack(
                query,
                shift,
                prefix_lengths,
                start + g * LANES,
                lanes[g],
                shifts[g],
                seen[g],
            )
        total[:], sums[:] = 0, 0
        for lo in range(0, m, KEYS):
            if start == 0:
                largest = maximum(largest, _largest(key[lo : lo + KEYS]))
            for g in range(groups):
                last = seen[g].max()
                if lo >= last:
                    continue
                tiles = -(-(min(lo + KEYS, last) - lo) // COLUMNS)
                mass[:] = 0
                _weigh(
                    lanes[g], shifts[g], seen[g], key, last_key, lo, tiles, mass,
                    weights,
                )  # fmt: skip
                whole = tiles - (lo + tiles * COLUMNS > rest)
                _add(weights, value[lo:], whole, 1, part)
                if whole < tiles:
                    _add(weights[whole * COLUMNS :], last_value, 1, whole == 0, part)
                for l in range(LANES):
                    total[g, l] += mass[l]
                for c in range(p):
                    for l in range(LANES):
                        sums[g, c, l] += part[c, l]
        for g in range(groups):
            rows = slice(start + g * LANES, min(start + (g + 1) * LANES, n))
            good &= _finish(
                sums[g], total[g], shifts[g], seen[g], out[rows], normalizer[rows]
            )
    return good, largest


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _largest(key):
    largest = np.float32(0)
    for j in range(key.shape[0]):
        for t in range(key.shape[1]):
            largest = maximum(largest, abs(key[j, t]))
    return largest


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack(query, shift, prefix_lengths, start, lanes, shifts, seen):
    for l in range(LANES):
        # lanes beyond the last query repeat it
        i = min(start + l, query.shape[0] - 1)
        shifts[l], seen[l] = shift[i], prefix_lengths[i]
        for t in range(query.shape[1]):
            lanes[t, l] = query[i, t]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh(lanes, shifts, seen, key, last_key, lo, tiles, mass, weights):
    m, d = key.shape
    full, spare = seen.min(), np.empty(LANES, np.float32)
    for j in range(tiles):
        first = lo + j * COLUMNS
        right = key.ctypes.data + 4 * d * first
        if first + COLUMNS > m:
            right = last_key.ctypes.data
        own = mass if first + COLUMNS <= full else spare
        weigh_float_tile(
            lanes.ctypes.data, 4 * LANES, right, 4 * d, d, shifts.ctypes.data,
            own.ctypes.data, weights.ctypes.data + 4 * LANES * COLUMNS * j,
        )  # fmt: skip
        if first + COLUMNS > full:
            hide(weights[j * COLUMNS :], first, seen, mass)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add(weights, value, tiles, fresh, part):
    p = value.shape[1]
    for c in range(0, p if tiles else 0, COLUMNS):
        add_float_tile(
            weights.ctypes.data, 4 * LANES, value.ctypes.data + 4 * c, 4, 4 * p,
            tiles * COLUMNS, part.ctypes.data + 4 * LANES * c, 4 * LANES, fresh,
        )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def hide(weights, first, seen, mass):
    # weights of keys that a lane does not see become zero; the rest of a tile is summed
    for i in range(COLUMNS):
        for l in range(LANES):
            if first + i >= seen[l]:
                weights[i, l] = 0
            mass[l] += weights[i, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish(sums, total, shifts, seen, out, normalizer):
    good = True
    for i in range(out.shape[0]):
        if seen[i] == 0:
            normalizer[i] = -np.inf
            out[i] = 0
            continue
        good &= total[i] > 0 and np.isfinite(total[i])
        normalizer[i] = (np.log2(total[i]) + shifts[i]) / LOG2
        for c in range(out.shape[1]):
            good &= np.isfinite(sums[c, i])
            out[i, c] = sums[c, i] / total[i]
    return good
