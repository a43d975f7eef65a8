"""Feature maps in one pass over a row; causal products as batched small products."""

from typing import Any

import numpy as np

from fastattn._ops.linear import CHUNK
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum

# multiplications of a product that BLAS does without copying its factors first
_SMALL = 1_000_000
# rows of a product: more are no faster, and with fewer a single product is faster
_MOST_ROWS, _LEAST_ROWS = 128, 32
# rows that are summed in their own precision, before sums continue in float64
_FEW = 32
# rows of a chunk whose state is found together with others, and numbers in the states
_STEP, _STATES = 32, 1 << 17
# fewer states at once are no better than one by one
_LEAST_STATES = 4


def elu_plus_one(x):
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    _elu_plus_one(x.reshape(-1), out.reshape(-1))
    return out


def positive(x):
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    _positive(x.reshape(-1), x.dtype.type(0), out.reshape(-1))
    return out


def exponentials(x):
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    peak = np.empty((*x.shape[:-1], 1), x.dtype)
    size = x.shape[-1]
    _exponentials(x.reshape(-1, size), out.reshape(-1, size), peak.reshape(-1))
    return out, peak


def key_sums(right, value):
    (m, r), p = right.shape, value.shape[1]
    rows = _rows(r * p)
    whole = m // rows * rows if rows else 0
    found = right[whole:].T @ value[whole:]
    if whole:
        some = right[:whole].reshape(-1, rows, r).transpose(0, 2, 1)
        found += np.matmul(some, value[:whole].reshape(-1, rows, p)).sum(axis=0)
    weights = np.zeros(r)
    _add_rows(right, np.empty(r, right.dtype), weights)
    weights = weights.astype(right.dtype)
    return np.concatenate([found, weights[:, None]], axis=1)


def row_means(left, sums, *, offset, normalize, out=None):
    (n, r), p = left.shape, sums.shape[1] - 1
    # the sum of the weights is a column of its own: one more would slow BLAS down
    values, weights = (np.ascontiguousarray(x) for x in (sums[:, :-1], sums[:, -1]))
    if out is None:
        out = np.empty((n, p), sums.dtype)
    rows = _rows(r * p)
    whole = n // rows * rows if rows else 0
    if whole:
        some = left[:whole].reshape(-1, rows, r)
        np.matmul(some, values, out=out[:whole].reshape(-1, rows, p))
    np.matmul(left[whole:], values, out=out[whole:])
    total = left @ weights
    total += sums.dtype.type(offset)
    if normalize:
        _divide(out, total, np.empty_like(total))
    return out, total


def _rows(size):
    """Rows of small products with matrices of ``size`` numbers; 0 for one product."""
    rows = min(_SMALL // size, _MOST_ROWS) // 16 * 16
    return rows if rows >= _LEAST_ROWS else 0


def divided(sums, *, offset, out=None):
    *lead, width = sums.shape
    if out is None:
        out = np.empty((*lead, width - 1), sums.dtype)
    total = np.empty(lead, sums.dtype)
    rows = np.ascontiguousarray(sums).reshape(-1, width)
    _divided(
        rows,
        sums.dtype.type(offset),
        out.reshape(-1, width - 1),
        total.reshape(-1),
        np.empty(total.size, sums.dtype),
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
    prefix_lengths,
    decay=None,
    row=None,
    column=None,
    origin=0,
):
    n, dtype = len(left), left.dtype
    out = np.empty((n, value.shape[1]), dtype)
    state = np.array(state, order="C")
    prefix_lengths = np.ascontiguousarray(prefix_lengths, dtype=np.int64)
    fading = None
    if decay is not None:
        first = min(origin, column.min(initial=origin))
        powers = (float(decay) ** np.arange(int(row[-1] - first) + 1)).astype(dtype)
        fading = _Fading(powers, row, column, origin)
    done = _in_step(left, right, value, state, out, prefix_lengths, fading)
    part = np.empty_like(state)
    for start in range(done, n, CHUNK):
        end = min(start + CHUNK, n)
        early, last = int(prefix_lengths[start]), int(prefix_lengths[end - 1])
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
            _fade(near, prefix_lengths[start:end], row[start:end], column[done:last],
            done,
                  fading.powers)  # fmt: skip
        else:
            _hide(near, prefix_lengths[start:end], done)
        rows += near @ value[done:last]
        _absorb(state, right, value, slice(done, last), fading, end - 1, part)
        done = last
    if fading and n:
        state *= fading.powers[row[-1] - fading.seen]
    return out, state


def _in_step(left, right, value, state, out, prefix_lengths, fading):
    """Compute the first rows while each sees one key more; return how many.

    The states before all chunks of a group are found before any is used: a few large
    calls instead of many small ones.
    """
    (n, r), p = left.shape, value.shape[1]
    group = _STATES // (r * p)
    if group < _LEAST_STATES or n <= 2 * _STEP:
        return 0
    count = (_regular(prefix_lengths, fading) - 1) // _STEP
    if count < 1:
        return 0
    group = min(group, count)
    powers = np.ones(_STEP + 1, left.dtype)
    if fading:
        state *= fading.powers[fading.row[0] - fading.seen]
        powers = fading.powers[: _STEP + 1]
        fading.seen = fading.row[count * _STEP]
    falling = np.ascontiguousarray(powers[::-1])
    states = np.empty((group, r, p), left.dtype)
    weights = np.empty((group, _STEP, _STEP), left.dtype)
    far = np.empty((group, _STEP, p), left.dtype)
    for start in range(0, count, group):
        size = min(group, count - start)
        rows = slice(start * _STEP, (start + size) * _STEP)
        some, keys, values, found = (
            x[rows].reshape(size, _STEP, -1) for x in (left, right, value, out)
        )
        near = np.matmul(some, keys.transpose(0, 2, 1), out=weights[:size])
        _hide_later(near, falling)
        np.matmul(near, values, out=found)
        if fading:
            values = values * falling[:-1, None]
        own = np.matmul(keys.transpose(0, 2, 1), values, out=states[:size])
        _run(own.reshape(size, -1), state.reshape(-1), powers[-1])
        _add_faded(found, np.matmul(some, own, out=far[:size]), powers)
    return count * _STEP


def _regular(prefix_lengths, fading):
    """How many rows, from the first, see one key more each, one position ahead."""
    number = np.arange(len(prefix_lengths))
    off = prefix_lengths != number + 1
    if fading:
        keys = min(len(prefix_lengths), len(fading.column))
        off[keys:] = True
        off |= fading.row - fading.row[0] != number
        off[:keys] |= fading.column[:keys] != fading.row[:keys]
    return int(off.argmax()) if off.any() else len(prefix_lengths)


class _Fading:
    """Decay of keys by position, and the position that a state refers to."""

    def __init__(self, powers, row, column, origin):
        self.powers, self.row, self.column, self.seen = powers, row, column, origin


def _absorb(state, right, value, keys, fading, number, part):
    """Add keys to the state, as seen from a row that sees them all."""
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


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _positive(x, zero, out):
    for i in range(x.size):
        out[i] = maximum(x[i], zero)


@njit(nogil=True, cache=True, error_model="numpy")
def _divide(out, total, factor):
    # divisions side by side first: one before each row would hold it up
    for i in range(total.size):
        factor[i] = 1 / total[i] if total[i] != 0 else total[i]
    for i in range(out.shape[0]):
        row, other = out[i], factor[i]
        for j in range(row.size):
            row[j] *= other


@njit(nogil=True, cache=True, error_model="numpy")
def _divided(sums, offset, out, total, factor):
    for i in range(sums.shape[0]):
        total[i] = sums[i, -1] + offset
        factor[i] = 1 / total[i] if total[i] != 0 else total[i]
    for i in range(sums.shape[0]):
        row, result, other = sums[i], out[i], factor[i]
        for j in range(result.size):
            result[j] = row[j] * other


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
def _add_rows(x, part, total):
    # short sums first: where terms cancel, the error is that of a sum of few rows
    for start in range(0, x.shape[0], _FEW):
        part[:] = 0
        for i in range(start, min(start + _FEW, x.shape[0])):
            row = x[i]
            for j in range(row.size):
                part[j] += row[j]
        for j in range(total.size):
            total[j] += part[j]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _hide_later(near, powers):
    size = near.shape[1]
    for c in range(near.shape[0]):
        for i in range(size):
            row, weights = near[c, i], powers[size - i :]
            for j in range(i + 1):
                row[j] *= weights[j]
            row[i + 1 :] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _run(own, state, shrink):
    # what each chunk adds to the state becomes the state before it
    for c in range(own.shape[0]):
        row = own[c]
        for j in range(state.size):
            before = state[j]
            state[j] = before * shrink + row[j]
            row[j] = before


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add_faded(found, far, powers):
    for c in range(found.shape[0]):
        for i in range(found.shape[1]):
            row, other, factor = found[c, i], far[c, i], powers[i]
            for j in range(row.size):
                row[j] += other[j] * factor


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _hide(near, prefix_lengths, done):
    for i in range(near.shape[0]):
        near[i, prefix_lengths[i] - done :] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _fade(near, prefix_lengths, row, column, done, powers):
    for i in range(near.shape[0]):
        count = prefix_lengths[i] - done
        for j in range(count):
            near[i, j] *= powers[row[i] - column[j]]
        near[i, count:] = 0
