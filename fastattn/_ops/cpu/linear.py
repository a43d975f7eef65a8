"""Feature maps in one pass over a row; causal products as small ones by BLAS."""

from typing import Any

import numpy as np
from numba import njit

from fastattn._ops.linear import CHUNK
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum


def elu_plus_one(x):
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    _elu_plus_one(x.reshape(-1), out.reshape(-1))
    return out


def exponentials(x):
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    peak = np.empty((*x.shape[:-1], 1), x.dtype)
    size = x.shape[-1]
    _exponentials(x.reshape(-1, size), out.reshape(-1, size), peak.reshape(-1))
    return out, peak


def divided(sums, *, offset):
    *lead, width = sums.shape
    out = np.empty((*lead, width - 1), sums.dtype)
    total = np.empty(lead, sums.dtype)
    rows = np.ascontiguousarray(sums).reshape(-1, width)
    _divided(
        rows, sums.dtype.type(offset), out.reshape(-1, width - 1), total.reshape(-1)
    )
    return out, total


def squares(x):
    x = np.ascontiguousarray(x)
    d = x.shape[-1]
    out = np.empty((*x.shape[:-1], 1 + d + d * (d + 1) // 2), x.dtype)
    _squares(x.reshape(-1, d), out.reshape(-1, out.shape[-1]))
    return out


def prefix_products(
    left,
    right,
    value,
    state,
    *,
    visible,
    decay=None,
    row=None,
    column=None,
    origin=0,
):
    n, dtype = len(left), left.dtype
    out = np.empty((n, value.shape[1]), dtype)
    state, done = state.copy(), 0
    visible = np.ascontiguousarray(visible, dtype=np.int64)
    fading = None
    if decay is not None:
        first = min(origin, column.min(initial=origin))
        powers = (float(decay) ** np.arange(int(row[-1] - first) + 1)).astype(dtype)
        fading = _Fading(powers, row, column, origin)
    part = np.empty_like(state)
    for start in range(0, n, CHUNK):
        end = min(start + CHUNK, n)
        early, last = int(visible[start]), int(visible[end - 1])
        if early - done > CHUNK:
            _absorb(state, right, value, slice(done, early), fading, start, part)
            done = early
        some, rows = left[start:end], out[start:end]
        np.matmul(some, state, out=rows)
        if fading:
            rows *= fading.powers[row[start:end] - fading.seen][:, None]
        if last == done:
            continue
        near = some @ right[done:last].T
        if fading:
            _fade(near, visible[start:end], row[start:end], column[done:last], done,
                  fading.powers)  # fmt: skip
        else:
            _hide(near, visible[start:end], done)
        rows += near @ value[done:last]
        _absorb(state, right, value, slice(done, last), fading, end - 1, part)
        done = last
    if fading and n:
        state *= fading.powers[row[-1] - fading.seen]
    return out, state


class _Fading:
    """What keys lose to rows, and where the state is seen from."""

    def __init__(self, powers, row, column, origin):
        self.powers, self.row, self.column, self.seen = powers, row, column, origin


def _absorb(state, right, value, keys, fading, number, part):
    """Add keys to the state, as a row that sees them all does."""
    values = value[keys]
    if fading:
        place = fading.row[number]
        state *= fading.powers[place - fading.seen]
        values = values * fading.powers[place - fading.column[keys]][:, None]
        fading.seen = place
    state += np.matmul(right[keys].T, values, out=part)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _elu_plus_one(x, out):
    for i in range(x.size):
        above: Any = maximum(x[i], x[i] * 0)
        out[i] = above + exp(x[i] - above)


@njit(nogil=True, cache=True, error_model="numpy")
def _divided(sums, offset, out, total):
    for i in range(sums.shape[0]):
        row, result = sums[i], out[i]
        whole = row[-1] + offset
        total[i] = whole
        factor = 1 / whole if whole != 0 else whole
        for j in range(result.size):
            result[j] = row[j] * factor


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _exponentials(x, out, peak):
    for i in range(x.shape[0]):
        row, result = x[i], out[i]
        top = row[0]
        for j in range(row.size):
            top = maximum(top, row[j])
        for j in range(row.size):
            result[j] = exp(row[j] - top)
        peak[i] = top


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _squares(x, out):
    half = x.dtype.type(0.5**0.5)
    d = x.shape[1]
    for i in range(x.shape[0]):
        row, result = x[i], out[i]
        result[0] = 1
        result[1 : d + 1] = row
        place = d + 1
        for a in range(d):
            factor = row[a]
            result[place] = factor * factor * half
            for b in range(1, d - a):
                result[place + b] = factor * row[a + b]
            place += d - a


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _hide(near, visible, done):
    for i in range(near.shape[0]):
        near[i, visible[i] - done :] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _fade(near, visible, row, column, done, powers):
    for i in range(near.shape[0]):
        count = visible[i] - done
        for j in range(count):
            near[i, j] *= powers[row[i] - column[j]]
        near[i, count:] = 0
