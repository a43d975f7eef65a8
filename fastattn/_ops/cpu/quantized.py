"""Quantized attention: groups of queries, which all keys pass in short blocks."""

import numpy as np

from fastattn._ops.cpu.packing import (
    KEYS,
    NOTHING,
    PackedKeys,
    add_values,
    mean_of,
    pack_lanes,
    packed_values,
    weigh_keys,
)
from fastattn._ops.cpu.softmax_tiles import largest_seen
from fastattn._ops.cpu.tiles import COLUMNS, LANES, LOG2
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum

# queries that are answered by one task
_QUERIES = 512


@np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")
def attend_quantized(query, key, value, *, scale, prefix_lengths, integers):
    # exponents to the base two
    scale = np.float32(scale * LOG2)
    own, value_center = mean_of(query) * scale, mean_of(value)
    ends = np.stack([value.min(axis=0), value.max(axis=0)]).astype(np.float32)
    keys = PackedKeys(key, integers)
    m, n = len(key), len(query)
    tilt = np.full(len(keys.words), NOTHING)
    tilt[:m] = keys.centred @ own
    pairs = packed_values(np.subtract(value, value_center, dtype=np.float32))
    out, norm = np.empty((n, value.shape[1]), np.float32), np.empty(n, np.float32)
    seen = (
        np.full(n, m)
        if prefix_lengths is None
        else np.asarray(prefix_lengths, np.int64)
    )

    @np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")
    def work(start):
        rows = slice(start, min(start + _QUERIES, n))
        scaled = np.multiply(query[rows], scale, dtype=np.float32)
        shift = largest_seen(
            scaled,
            keys.centred,
            prefix_lengths if prefix_lengths is None else seen[rows],
        )
        constant = scaled @ keys.mean
        scaled -= own
        _answer(
            scaled, shift, constant, seen[rows], m, integers, keys.words, keys.offset,
            keys.column, tilt, pairs, value_center, ends, out[rows], norm[rows],
        )  # fmt: skip

    run_blocks(work, range(0, n, _QUERIES))
    return out, norm


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _answer(
    query, shift, constant, prefix_lengths, count, integers, words, offset, column,
    tilt, pairs, value_center, ends, out, norm,
):  # fmt: skip
    n, m = query.shape[0], tilt.size
    lanes = np.empty((words.shape[1], LANES), np.uint32)
    sums = np.empty((pairs.shape[1], LANES), np.float32)
    unit, shifts, mass = (
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    seen, bits = np.empty(LANES, np.int64), np.empty(LANES, np.uint32)
    weights = np.empty((KEYS // 2, LANES), np.uint32)
    for start in range(0, n, LANES):
        pack_lanes(query, start, integers, column, lanes, unit)
        for l in range(LANES):
            i = min(start + l, n - 1)
            shifts[l], seen[l] = shift[i], prefix_lengths[i]
        last, full = seen.max(), seen.min()
        # the padding of the last tile has no weight
        full = m if full == count else full
        sums[:], mass[:] = 0, 0
        for lo in range(0, last, KEYS):
            tiles = -(-(min(lo + KEYS, last) - lo) // COLUMNS)
            weigh_keys(
                lanes, unit, shifts, integers, words, offset, tilt, lo, tiles, full,
                mass, weights,
            )  # fmt: skip
            for j in range(max(0, (full - lo) // COLUMNS), tiles):
                some = weights[j * COLUMNS // 2 :]
                _hide(some, lo + j * COLUMNS, seen, bits, mass)
            add_values(weights, pairs, lo, tiles, sums)
        rest = slice(start, min(start + LANES, n))
        _finish(
            sums, mass, shifts, seen, constant[rest], value_center, ends, out[rest],
            norm[rest],
        )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _hide(weights, first, seen, bits, mass):
    # weights of keys that a lane does not see become zero; the rest of a tile is summed
    numbers = bits.view(np.float32)
    for i in range(COLUMNS):
        shift = np.uint32(16 * (i % 2))
        line, half = weights[i // 2], np.uint32(0xFFFF) << shift
        for l in range(LANES):
            if first + i >= seen[l]:
                line[l] &= ~half
            bits[l] = ((line[l] & half) >> shift) << np.uint32(16)
        for l in range(LANES):
            mass[l] += numbers[l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish(sums, mass, shifts, seen, constant, value_center, ends, out, norm):
    (n, p), low, high = out.shape, ends[0], ends[1]
    for i in range(n):
        norm[i] = np.nan
        if mass[i] > 0 and np.isfinite(mass[i]):
            norm[i] = (np.log2(mass[i]) + shifts[i] + constant[i]) / LOG2
        if seen[i] == 0:
            norm[i] = -np.inf
        share = np.float32(1) / mass[i] if mass[i] > 0 else np.float32(0)
        for c in range(p):
            # rounded values may lie beyond all others
            out[i, c] = maximum(sums[c, i] * share + value_center[c], low[c])
            out[i, c] = -maximum(-out[i, c], -high[c]) if seen[i] else 0
