"""Near keys of a block of queries in products of eight bits, fused with the softmax.

Queries are lanes, ``LANES`` to a group: a group's logits, weights and sums stay in
cache while tiles of keys and values pass. What is rounded is the distance of a query
from the mean of its block, which is small, so that logits are off by little; the mean's
own logits are not rounded.
"""

import numpy as np
from numba import njit

from fastattn._ops.cpu.bfloat16 import COLUMNS, LANES, add_tile, pair
from sketching._ops.cpu.elementary import CONTRACT, REASSOCIATE, maximum, power_of_two

# near keys that are done at once
_NEAR = 512
# far below every logit
_NOTHING = np.float32(-1e30)


def add_near(near, query, mean, key, pairs, value, peak, total, out):
    """Add near keys to what a block of queries has summed of the others.

    ``pairs`` are the packed keys; ``peak``, ``total`` and ``out`` change in place.
    """
    if len(near):
        _add_near(near, query, mean, key, pairs, value, peak, total, out)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add_near(near, query, mean, key, pairs, value, peak, total, out):
    n, p, halves = query.shape[0], value.shape[1], pairs.shape[1]
    groups, columns = -(-n // LANES), -(-p // COLUMNS) * COLUMNS
    lanes = np.empty((groups, halves, LANES), np.uint32)
    _pack_queries(query, mean, lanes)
    largest = np.full((groups, LANES), _NOTHING)
    mass = np.zeros((groups, LANES), np.float32)
    sums = np.zeros((groups, columns, LANES), np.float32)
    keys = np.empty((_NEAR, halves), np.uint32)
    values = np.zeros((_NEAR // 2, columns), np.uint32)
    tilt = np.empty(_NEAR, np.float32)
    logits = np.empty((_NEAR, LANES), np.float32)
    weights = np.empty((_NEAR // 2, LANES), np.uint32)
    for lo in range(0, near.size, _NEAR):
        some = near[lo : lo + _NEAR]
        size = _gather(some, key, mean, pairs, value, keys, tilt, values)
        for g in range(groups):
            for j in range(0, size, COLUMNS):
                add_tile(
                    lanes[g].ctypes.data, 4 * LANES,
                    keys.ctypes.data + 4 * halves * j, 4 * halves, 4, halves,
                    logits.ctypes.data + 4 * LANES * j, 4 * LANES, 1,
                )  # fmt: skip
            _raise(logits[:size], tilt, largest[g], mass[g], sums[g])
            _soften(logits[:size], tilt, largest[g], mass[g], weights)
            for c in range(0, columns, COLUMNS):
                add_tile(
                    weights.ctypes.data, 4 * LANES,
                    values.ctypes.data + 4 * c, 4, 4 * columns, size // 2,
                    sums[g].ctypes.data + 4 * LANES * c, 4 * LANES, 0,
                )  # fmt: skip
    _merge(largest, mass, sums, peak, total, out)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack_queries(query, mean, lanes):
    n, d = query.shape
    for g in range(lanes.shape[0]):
        for l in range(LANES):
            # lanes beyond the last query repeat it
            i = min(g * LANES + l, n - 1)
            for t in range(d // 2):
                low = query[i, 2 * t] - mean[2 * t]
                high = query[i, 2 * t + 1] - mean[2 * t + 1]
                lanes[g, t, l] = pair(low, high)
            if d % 2:
                low = query[i, d - 1] - mean[d - 1]
                lanes[g, d // 2, l] = pair(low, np.float32(0))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _gather(near, key, mean, pairs, value, keys, tilt, values):
    # keys as they are packed, values of two keys in a pair; filled up to whole tiles
    count, p = near.size, value.shape[1]
    size = -(-count // COLUMNS) * COLUMNS
    for i in range(size):
        j = near[min(i, count - 1)]
        for t in range(pairs.shape[1]):
            keys[i, t] = pairs[j, t]
        s = np.float32(0)
        for t in range(mean.size):
            s += key[j, t] * mean[t]
        tilt[i] = s if i < count else _NOTHING
    for i in range(size // 2):
        j, k = near[min(2 * i, count - 1)], near[min(2 * i + 1, count - 1)]
        for t in range(p):
            values[i, t] = pair(value[j, t], value[k, t])
    return size


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _raise(logits, tilt, largest, mass, sums):
    # the largest logits so far, and what was summed relative to them
    new, shrink = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    new[:] = largest
    for j in range(0, logits.shape[0], COLUMNS):
        for l in range(LANES):
            top = new[l]
            for k in range(COLUMNS):
                top = maximum(top, logits[j + k, l] + tilt[j + k])
            new[l] = top
    larger = False
    for l in range(LANES):
        larger |= new[l] > largest[l]
    if not larger:
        return
    for l in range(LANES):
        shrink[l] = _exp(largest[l] - new[l])
        mass[l] *= shrink[l]
        largest[l] = new[l]
    for c in range(sums.shape[0]):
        for l in range(LANES):
            sums[c, l] *= shrink[l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _soften(logits, tilt, largest, mass, weights):
    # weights of two keys in a pair
    part = np.zeros(LANES, np.float32)
    for j in range(logits.shape[0] // 2):
        one, two = tilt[2 * j], tilt[2 * j + 1]
        for l in range(LANES):
            low = _exp(logits[2 * j, l] + one - largest[l])
            high = _exp(logits[2 * j + 1, l] + two - largest[l])
            part[l] += low + high
            weights[j, l] = pair(low, high)
    for l in range(LANES):
        mass[l] += part[l]


@njit(fastmath=CONTRACT, error_model="numpy", cache=True)
def _exp(x):
    # to 1e-4, less than what weights are rounded by
    x = maximum(x * np.float32(1.44269504), np.float32(-126.0))
    n = np.floor(x + np.float32(0.5))
    r = x - n
    y = np.float32(0.0550089232) * r + np.float32(0.242210961)
    y = y * r + np.float32(0.693282929)
    return (y * r + np.float32(1.0)) * power_of_two(np.int32(n), x)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _merge(largest, mass, sums, peak, total, out):
    for i in range(out.shape[0]):
        g, l = i // LANES, i % LANES
        top = np.maximum(peak[i], largest[g, l])
        old, new = np.exp(peak[i] - top), np.exp(largest[g, l] - top)
        peak[i] = top
        total[i] = total[i] * old + mass[g, l] * new
        for c in range(out.shape[1]):
            out[i, c] = out[i, c] * old + sums[g, c, l] * new
