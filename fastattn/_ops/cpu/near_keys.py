"""Near keys of a block of queries by int8 or bfloat16 matmul, fused with the softmax.

Near keys are gathered in short blocks, which all groups of queries pass while they are
in cache. The difference of a query and the mean of its block is rounded; it is small,
so that the errors of logits are small. The logits of the mean are not rounded.
"""

import numpy as np

from fastattn._ops.cpu.packing import KEYS, NOTHING, add_values, pack_lanes, weigh_keys
from fastattn._ops.cpu.tiles import COLUMNS, LANES, LOG2, pair
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE

# near keys whose largest logit a row's weights are relative to
_SAMPLED_KEYS = 32
_LOG2 = np.float32(LOG2)


def add_near(near, query, mean, key, packed, value, peak, total, out):
    """Add near keys to the sums of a block of queries over the far field.

    ``packed`` are the keys, rounded; ``peak``, ``total`` and ``out`` change in place,
    unless a sum overflows: then nothing changes and the answer is False.
    """
    if not len(near):
        return True
    some = near[:: max(1, len(near) // _SAMPLED_KEYS)]
    shift = np.maximum(peak, np.max(query @ key[some].T, axis=1)) * _LOG2
    step = (query - mean) * _LOG2
    relative = shift - step @ packed.mean
    mass = np.empty(len(query), np.float32)
    sums = np.empty_like(out)
    _sum_near(
        near, step, mean * _LOG2, key, packed.integers, packed.words, packed.offset,
        packed.column, value, relative, mass, sums,
    )  # fmt: skip
    if not (np.isfinite(mass).all() and np.isfinite(sums).all()):
        return False
    top = shift / _LOG2
    old = np.exp(peak - top)
    total *= old
    total += mass
    out *= old[:, None]
    out += sums
    peak[:] = top
    return True


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _sum_near(
    near, query, mean, key, integers, words, offset, column, value, shift, mass, sums
):
    n, p = query.shape[0], value.shape[1]
    groups, columns = -(-n // LANES), -(-p // COLUMNS) * COLUMNS
    lanes = np.empty((groups, words.shape[1], LANES), np.uint32)
    unit = np.empty((groups, LANES), np.float32)
    shifts = np.empty((groups, LANES), np.float32)
    masses = np.zeros((groups, LANES), np.float32)
    parts = np.zeros((groups, columns, LANES), np.float32)
    for g in range(groups):
        pack_lanes(query, g * LANES, integers, column, lanes[g], unit[g])
        for l in range(LANES):
            shifts[g, l] = shift[min(g * LANES + l, n - 1)]
    some = np.empty((KEYS, words.shape[1]), np.uint32)
    begin, tilt = np.empty(KEYS, np.int32), np.empty(KEYS, np.float32)
    pairs = np.zeros((KEYS // 2, columns), np.uint32)
    weights = np.empty((KEYS // 2, LANES), np.uint32)
    for lo in range(0, near.size, KEYS):
        tiles = _gather(
            near[lo : lo + KEYS], key, mean, words, offset, value, some, begin, tilt,
            pairs,
        )  # fmt: skip
        for g in range(groups):
            weigh_keys(
                lanes[g], unit[g], shifts[g], integers, some, begin, tilt, 0, tiles,
                KEYS, masses[g], weights,
            )  # fmt: skip
            add_values(weights, pairs, 0, tiles, parts[g])
    for i in range(n):
        g, l = i // LANES, i % LANES
        mass[i] = masses[g, l]
        for c in range(p):
            sums[i, c] = parts[g, c, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _gather(near, key, mean, words, offset, value, some, begin, tilt, pairs):
    # returns how many tiles there are; the padding of the last tile has no weight
    count, p = near.size, value.shape[1]
    tiles = -(-count // COLUMNS)
    for i in range(tiles * COLUMNS):
        j = near[min(i, count - 1)]
        for t in range(words.shape[1]):
            some[i, t] = words[j, t]
        begin[i] = offset[j]
        s = np.float32(0)
        for t in range(mean.size):
            s += key[j, t] * mean[t]
        tilt[i] = s if i < count else NOTHING
    for i in range(tiles * COLUMNS // 2):
        j, k = near[min(2 * i, count - 1)], near[min(2 * i + 1, count - 1)]
        for t in range(p):
            pairs[i, t] = pair(value[j, t], value[k, t])
    return tiles
