"""Rows rounded to int8 or bfloat16, and short blocks of keys for groups of queries.

Queries are lanes, ``LANES`` to a group. Words hold two bfloat16 numbers of a row, or
four integers in units of a column's largest, or of a query's own.
"""

import numpy as np

from fastattn._ops.cpu.tiles import (
    COLUMNS,
    LANES,
    add_tile,
    pair,
    weigh_integer_tile,
    weigh_tile,
    whole_tiles,
)
from fastattn._ops.quantized import STEPS
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum

# keys that pass a group at once: their weights stay in first-level cache
KEYS = 128
# far below every logit
NOTHING = np.float32(-1e30)
# offset that makes signed bytes unsigned
_SIGN = 128


class PackedKeys:
    """Keys less their mean, rounded: pairs of bfloat16 numbers, or integers."""

    def __init__(self, key, integers):
        self.mean = mean_of(key)
        self.integers, (m, d) = integers, key.shape
        self.centred = np.subtract(key, self.mean, dtype=np.float32, order="C")
        whole = whole_tiles(m)
        self.words = np.zeros((whole, -(-d // (4 if integers else 2))), np.uint32)
        self.offset = np.zeros(whole, np.int32)
        self.column = np.ones(d, np.float32)
        if not integers:
            pack_rows(self.centred, self.words)
            return
        self.column = np.abs(self.centred).max(axis=0) / np.float32(STEPS)
        self.column[~(self.column > 0)] = 1
        _pack_bytes(self.centred, 1 / self.column, self.words, self.offset)


def mean_of(x):
    """The mean row in float32; it need not be exact, since it only centers."""
    return x.mean(axis=0, dtype=np.float32)


def packed_values(value):
    """Values of two neighbouring keys in pairs, padded to whole tiles."""
    m, p = value.shape
    pairs = np.zeros((whole_tiles(m) // 2, whole_tiles(p)), np.uint32)
    _pack_pairs(value, pairs)
    return pairs


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def pack_rows(x, pairs):
    """Round neighbours in every row to the nearest bfloat16; ties go up."""
    n = x.shape[1]
    bits, halves = x.view(np.uint32), pairs.view(np.uint16)
    for j in range(x.shape[0]):
        row, packed = bits[j], halves[j]
        for i in range(n):
            packed[i] = np.uint16((row[i] + np.uint32(0x8000)) >> np.uint32(16))
        if n % 2:
            packed[n] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack_bytes(x, factor, out, offset):
    # signed integers, and the sum that corrects for the offset of the other side
    m, d = x.shape
    for i in range(m):
        total = np.int32(0)
        for t in range(d):
            whole = np.int32(np.rint(x[i, t] * factor[t]))
            total += whole
            out[i, t // 4] |= np.uint32(whole & 0xFF) << np.uint32(8 * (t % 4))
        offset[i] = -_SIGN * total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack_pairs(x, out):
    m, p = x.shape
    for i in range(m // 2):
        for t in range(p):
            out[i, t] = pair(x[2 * i, t], x[2 * i + 1, t])
    if m % 2:
        for t in range(p):
            out[m // 2, t] = pair(x[m - 1, t], np.float32(0))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def pack_lanes(query, start, integers, column, lanes, unit):
    """Pack a group of queries from ``start`` on, padded with copies of the last one."""
    if not integers:
        pack_pair_lanes(query, start, lanes)
        return
    lanes[:] = 0
    for l in range(LANES):
        x = query[min(start + l, query.shape[0] - 1)]
        unit[l] = _pack_unsigned(x, column, lanes[:, l])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def pack_pair_lanes(rows, start, lanes):
    """Pack pairs of neighbours in every row of a group, as ``pack_lanes`` does."""
    n, d = rows.shape
    for l in range(LANES):
        x = rows[min(start + l, n - 1)]
        for t in range(d // 2):
            lanes[t, l] = pair(x[2 * t], x[2 * t + 1])
        if d % 2:
            lanes[d // 2, l] = pair(x[d - 1], np.float32(0))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack_unsigned(x, column, out):
    # returns the unit of the integers
    d, largest = x.size, np.float32(0)
    for t in range(d):
        largest = maximum(largest, abs(x[t] * column[t]))
    unit = largest / np.float32(STEPS) if largest > 0 else np.float32(1)
    for t in range(d):
        whole = np.int32(np.rint(x[t] * column[t] / unit)) + _SIGN
        out[t // 4] |= np.uint32(whole) << np.uint32(8 * (t % 4))
    return unit


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def weigh_keys(
    lanes, unit, shift, integers, words, offset, tilt, lo, tiles, full, mass, weights
):
    """Write the weights of ``tiles`` tiles of keys from ``lo`` on.

    They are relative to ``2 ** shift``. Those of tiles up to key ``full`` are added to
    the mass of each lane.
    """
    spare = np.empty(LANES, np.float32)
    for j in range(tiles):
        first = lo + j * COLUMNS
        own = mass if first + COLUMNS <= full else spare
        right = words.ctypes.data + 4 * words.shape[1] * first
        place = weights.ctypes.data + 2 * LANES * COLUMNS * j
        if integers:
            weigh_integer_tile(
                lanes.ctypes.data, 4 * LANES, right, 4 * words.shape[1],
                words.shape[1], offset.ctypes.data + 4 * first, unit.ctypes.data,
                tilt.ctypes.data + 4 * first, shift.ctypes.data, own.ctypes.data, place,
            )  # fmt: skip
        else:
            weigh_tile(
                lanes.ctypes.data, 4 * LANES, right, 4 * words.shape[1],
                words.shape[1], tilt.ctypes.data + 4 * first, shift.ctypes.data,
                own.ctypes.data, place,
            )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def add_values(weights, pairs, lo, tiles, sums):
    """Add values times the weights of ``tiles`` tiles of keys from ``lo`` on."""
    columns = pairs.shape[1]
    for c in range(0, columns, COLUMNS):
        add_tile(
            weights.ctypes.data, 4 * LANES,
            pairs.ctypes.data + 2 * columns * lo + 4 * c, 4, 4 * columns,
            tiles * COLUMNS // 2, sums.ctypes.data + 4 * LANES * c, 4 * LANES, 0,
        )  # fmt: skip
