"""Both passes of the derivative in blocks that stay in cache.

Each basis function is one line of memory, as in the forward pass, and so are the
derivatives by them, which fused loops propagate from each polynomial to its parent.
"""

from typing import NamedTuple

import numpy as np

from fastattn._ops.cpu.blocks import span_of
from fastattn._ops.cpu.products import Readout, Sums, rounds
from fastattn._ops.cpu.recurrence import Recurrence, add_polynomials, energies
from fastattn._ops.cpu.tiles import whole_tiles
from fastattn._ops.lowrank import CLAMP
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum

# rows whose functions and derivatives exist at once, on each thread
_ROWS = 128


class _OtherKeys(NamedTuple):
    """What a block of rows knows of keys outside of the sums, and its least weight."""

    elsewhere: np.ndarray
    partial: np.ndarray
    least: np.ndarray


def query_vjp(
    query, grad, elsewhere, partial, least, functions, weights, *,
    parent, coordinate, power, low_precision=False,
):  # fmt: skip
    projection, origin, landmarks, spread = functions
    dtype, n = projection.dtype, len(query)
    r, (size, width) = len(parent), weights.shape
    span = span_of(n, size * width * 8)
    tasks = -(-n // span)
    parts = np.zeros((tasks, size, width))
    out = np.empty((n, query.shape[1]), dtype=dtype)
    logarithm, delta = np.empty((2, n), dtype=dtype)
    half = 0.5 * np.sum(landmarks**2, axis=1)
    recurrence = Recurrence.of(parent, coordinate, power, dtype, hermite=True)
    origin, clamp = origin[:, None], dtype.type(CLAMP)
    values, shares = (np.ascontiguousarray(weights[:, x]) for x in (slice(-1), -1))
    rounded = rounds(low_precision, dtype)
    readout = Readout(values, rounded)
    # copies: read-only arrays would need a further compiled signature
    spread, elsewhere, partial, least = (
        np.array(x, dtype=dtype) for x in (spread, elsewhere, partial, least)
    )

    @np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")
    def work(task):
        buffers = np.empty((2, whole_tiles(size) * _ROWS), dtype=dtype)
        sums = Sums(size, width - 1, _ROWS, rounded, dtype)
        masses = np.zeros(size)
        for lo in range(task * span, min((task + 1) * span, n), _ROWS):
            rows = slice(lo, min(lo + _ROWS, n))
            features, wide = _cut(buffers, rows)
            features, slope = features[:size], wide[:size]
            x = projection.T @ query[rows].astype(dtype, copy=False).T
            x -= origin
            _settle(x, spread, elsewhere[rows])
            np.matmul(landmarks, x[:-1], out=features[r:])
            features[0] = 1
            add_polynomials(x, recurrence, features)
            _at_landmarks(half, clamp, features[r:])
            own = np.array(grad[rows], dtype=dtype, order="C")
            readout.multiply(own, wide)
            others = _OtherKeys(elsewhere[rows], partial[rows], least[rows])
            tilt, factor = _judge(
                features, slope, shares, x[-1], others, own, logarithm[rows],
                delta[rows],
            )  # fmt: skip
            sums.add(features, own)
            masses -= features @ (factor * delta[rows])
            _pull_back(x, recurrence, shares, delta[rows], features, slope)
            x[:-1] += landmarks.T @ slope[r:]
            x[-1] = tilt
            x *= factor
            np.matmul(x.T, projection.T, out=out[rows])
        parts[task, :, :-1], parts[task, :, -1] = sums.total(), masses

    run_blocks(work, range(tasks))
    with np.errstate(over="ignore", invalid="ignore"):
        total = parts[0] if tasks == 1 else parts.sum(axis=0)
        return out, total, logarithm, delta


def key_vjp(
    key, value, far, center, projection, landmarks, value_center, weights, *,
    offset, parent, coordinate, power, low_precision=False,
):  # fmt: skip
    dtype, (m, p) = projection.dtype, value.shape
    r, size = len(parent), len(weights)
    span = span_of(m)
    out = np.empty((m, key.shape[1]), dtype=dtype)
    values = np.empty((m, p), dtype=dtype)
    recurrence = Recurrence.of(parent, coordinate, power, dtype, hermite=False)
    offset = dtype.type(offset)
    own, shares = (np.ascontiguousarray(weights[:, x]) for x in (slice(p), p))
    readout = Readout(own, rounds(low_precision, dtype))
    minus = np.full(_ROWS, -1, dtype=dtype)
    far = np.array(far)

    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def work(task):
        buffers = np.empty((2, whole_tiles(size) * _ROWS), dtype=dtype)
        for lo in range(task * span, min((task + 1) * span, m), _ROWS):
            rows = slice(lo, min(lo + _ROWS, m))
            features, wide = _cut(buffers, rows)
            features, slope = features[:size], wide[:size]
            y = projection.T @ np.subtract(key[rows], center, dtype=dtype).T
            _weigh(y, offset, far[rows])
            np.matmul(landmarks, y[:-1], out=features[r:])
            _start(y[-1], features, r)
            add_polynomials(y, recurrence, features)
            readout.read(features, values[rows])
            shifted = np.subtract(value[rows], value_center, dtype=dtype, order="C")
            readout.multiply(shifted, wide)
            coordinates = y[:-1].copy()
            y[-1] = _products(features, slope, shares)
            _pull_back(y, recurrence, shares, minus[: len(shifted)], features, slope)
            y[:-1] += landmarks.T @ slope[r:]
            y[:-1] += coordinates * y[-1]
            np.matmul(y.T, projection.T, out=out[rows])

    run_blocks(work, range(-(-m // span)))
    return out, values


def _cut(buffers, rows):
    """Matrices with a column for each row of a block."""
    count, size = rows.stop - rows.start, buffers.shape[1] // _ROWS
    return buffers[:, : size * count].reshape(2, size, count)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _settle(x, spread, elsewhere):
    # zero coordinates for outliers, so that no basis function overflows
    n, zero = x.shape[1], x.dtype.type(0)
    energy = energies(x, spread)
    for i in range(n):
        if not (energy[i] <= 1 and elsewhere[i] < np.inf):
            for l in range(spread.size):
                x[l, i] = zero
            x[spread.size, i] = np.nan


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _judge(features, slope, shares, shift, others, right, logarithm, delta):
    # completes the statistics of the rows, and the factors of their functions
    elsewhere, partial, least = others
    n, p, zero = features.shape[1], right.shape[1], slope.dtype.type(0)
    mean, mass = np.zeros_like(shift), np.zeros_like(shift)
    for j in range(features.shape[0]):
        row, push, share = features[j], slope[j], shares[j]
        for i in range(n):
            mean[i] += row[i] * push[i]
            mass[i] += row[i] * share
    factor = np.empty_like(shift)
    for i in range(n):
        near, other = np.log(mass[i]) + shift[i], elsewhere[i]
        if near > least[i] and np.isfinite(near):
            peak = max(near, other)
            one, two = np.exp(near - peak), np.exp(other - peak)
            logarithm[i] = peak + np.log(one + two)
            delta[i] = (one * (mean[i] / mass[i]) + two * partial[i]) / (one + two)
            factor[i] = np.exp(shift[i] - logarithm[i])
        else:
            logarithm[i], delta[i], factor[i] = np.inf, zero, zero
            mean[i] = mass[i] = zero
            for j in range(features.shape[0]):
                features[j, i] = zero
                slope[j, i] = zero
        for l in range(p):
            right[i, l] *= factor[i]
        mean[i] -= delta[i] * mass[i]
    return mean, factor


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh(y, offset, far):
    # completes log a in the last row of y; far keys get no coordinates and no weight
    t, half = y.shape[0] - 1, y.dtype.type(0.5)
    log = y[t]
    for i in range(y.shape[1]):
        log[i] += offset
    for l in range(t):
        for i in range(y.shape[1]):
            log[i] += half * y[l, i] * y[l, i]
    for i in range(y.shape[1]):
        if far[i]:
            log[i] = -np.inf
            for l in range(t):
                y[l, i] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _start(log, features, r):
    for i in range(log.size):
        features[0, i] = exp(log[i])
    for j in range(r, features.shape[0]):
        row = features[j]
        for i in range(log.size):
            row[i] = exp(row[i] + log[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _at_landmarks(half, clamp, features):
    for j in range(features.shape[0]):
        row, h = features[j], half[j]
        for i in range(row.size):
            row[i] = exp(-maximum(h - row[i], -clamp))


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pull_back(x, recurrence, shares, delta, features, slope):
    # replaces the coordinates by the derivatives by them, gradients less shares times
    # delta, and leaves those of the landmarks times their functions in ``slope``
    parent, grandparent, coordinate, factor, lower = recurrence
    n, r, t = features.shape[1], parent.size, x.shape[0] - 1
    for j in range(r, features.shape[0]):
        row, push, share = features[j], slope[j], shares[j]
        for i in range(n):
            push[i] = (push[i] - share * delta[i]) * row[i]
    back = np.zeros((t, n), dtype=x.dtype)
    part = np.empty(n, dtype=x.dtype)
    for j in range(r - 1, 0, -1):
        push, source, side = slope[j], features[parent[j]], x[coordinate[j]]
        left, sum_ = slope[parent[j]], back[coordinate[j]]
        w, share = factor[j], factor[j] * shares[j]
        # a loop for each row that is written: one loop over all would not vectorise
        for i in range(n):
            part[i] = w * push[i] - share * delta[i]
        for i in range(n):
            sum_[i] += part[i] * source[i]
        for i in range(n):
            left[i] += part[i] * side[i]
        if lower[j] != 0:
            older, v = slope[grandparent[j]], lower[j] / w
            for i in range(n):
                older[i] -= v * part[i]
    x[:t] = back


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _products(features, slope, shares):
    # of functions with gradients and shares of them
    total = np.zeros(features.shape[1], dtype=features.dtype)
    for j in range(features.shape[0]):
        row, push, share = features[j], slope[j], shares[j]
        for i in range(total.size):
            total[i] += row[i] * (push[i] + share)
    return total
