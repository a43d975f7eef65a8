"""Both passes in blocks that stay in cache: functions in fused loops, sums by BLAS.

Each basis function is one line of memory, so that every loop runs along contiguous
numbers. The sum of weights of a query, and the sums over keys without values, come out
of the same loops, so that BLAS is left with a round number of columns.
"""

import numpy as np

from fastattn._ops.cpu.blocks import ROWS, span_of
from fastattn._ops.cpu.products import Sums, rounds
from fastattn._ops.cpu.recurrence import Recurrence, add_polynomials, energies
from fastattn._ops.cpu.tile_products import combine_functions
from fastattn._ops.lowrank import CLAMP, LARGEST, LEAST
from sketching._lib.threads import run_blocks
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum


def key_sums(
    key, value, center, projection, landmarks, value_center, *,
    offset, longest, parent, coordinate, power, low_precision=False,
):  # fmt: skip
    dtype = projection.dtype
    m, p = value.shape
    r, c = len(parent), len(landmarks)
    span = span_of(m, (r + c) * (p + 1) * 8)
    tasks = -(-m // span)
    parts = np.empty((tasks, r + c, p + 1))
    rounded = rounds(low_precision, dtype)
    ends = np.full((tasks, 2, p), np.inf, dtype=dtype)
    ends[:, 1] *= -1
    far = np.empty(m, dtype=np.bool_)
    scalars = [
        dtype.type(x) for x in (offset, longest, _landmark_norm(landmarks), LARGEST)
    ]
    factor = (1 / np.sqrt(power)).astype(dtype)

    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def work(task):
        flat = np.empty((r + c) * ROWS, dtype=dtype)
        sums = Sums(r + c, p, ROWS, rounded, dtype)
        totals = np.zeros(r + c)
        for lo in range(task * span, min((task + 1) * span, m), ROWS):
            hi = min(lo + ROWS, m)
            centred = np.subtract(key[lo:hi], center, dtype=dtype, order="C")
            shifted = np.subtract(value[lo:hi], value_center, dtype=dtype, order="C")
            features = flat[: (r + c) * (hi - lo)].reshape(r + c, hi - lo)
            y = projection.T @ centred.T
            _weigh(centred, y, *scalars, far[lo:hi])
            np.matmul(landmarks, y[:-1], out=features[r:])
            _key_features(y, parent, coordinate, factor, features, totals)
            _extremes(shifted, ends[task])
            sums.add(features, shifted)
        parts[task, :, :p], parts[task, :, p] = sums.total(), totals

    run_blocks(work, range(tasks))
    low, high = ends[:, 0].min(axis=0), ends[:, 1].max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        return parts.sum(axis=0), np.stack([low, high]), far


def query_means(
    query, functions, weights, far_key, far_value, bounds, value_center, *,
    parent, coordinate, power,
):  # fmt: skip
    projection, origin, landmarks, spread = functions
    dtype = projection.dtype
    n, p = len(query), len(value_center)
    r, c = len(parent), len(landmarks)
    value = np.empty((n, p), dtype=dtype)
    logarithm = np.empty(n, dtype=dtype)
    span = span_of(n)
    half = 0.5 * np.sum(landmarks**2, axis=1)
    readout = np.ascontiguousarray(weights[:, :p])
    shares = np.ascontiguousarray(weights[:, p])
    recurrence = Recurrence.of(parent, coordinate, power, dtype, hermite=True)
    clamp, least = dtype.type(CLAMP), dtype.type(LEAST)
    # copies: read-only arrays would need a further compiled signature
    spread, bounds, value_center = (
        np.array(x, order="C") for x in (spread, bounds, value_center)
    )
    origin = origin[:, None]

    @np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")
    def work(task):
        flat = np.empty((r + c) * ROWS, dtype=dtype)
        for lo in range(task * span, min((task + 1) * span, n), ROWS):
            hi = min(lo + ROWS, n)
            features = flat[: (r + c) * (hi - lo)].reshape(r + c, hi - lo)
            block = query[lo:hi].astype(dtype, copy=False)
            x = projection.T @ block.T
            x -= origin
            reliable = np.empty(hi - lo, dtype=np.bool_)
            total = np.empty(hi - lo, dtype=dtype)
            _settle(x, spread, reliable)
            np.matmul(landmarks, x[:-1], out=features[r:])
            _query_features(x, half, shares, recurrence, clamp, features, total)
            out = value[lo:hi]
            combine_functions(features, readout, out)
            if len(far_key):
                _add_far(block, far_key, far_value, reliable, total, out)
            _finish(
                x[-1],
                total,
                reliable,
                least,
                bounds,
                value_center,
                out,
                logarithm[lo:hi],
            )

    run_blocks(work, range(-(-n // span)))
    return value, logarithm


def _landmark_norm(landmarks):
    return np.sqrt(np.max(np.sum(landmarks**2, axis=1), initial=0))


def _add_far(query, far_key, far_value, reliable, total, out):
    weight = query @ far_key.T
    reliable &= np.all(weight <= LARGEST, axis=1)
    np.exp(weight, out=weight)
    weight[~reliable] = 0
    out += weight @ far_value[:, :-1]
    total += weight @ far_value[:, -1]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _weigh(centred, y, offset, longest, landmark_norm, largest, far):
    # completes log a in the last row of y; far keys get no coordinates and no weight
    t, half = y.shape[0] - 1, y.dtype.type(0.5)
    zero = y.dtype.type(0)
    for i in range(y.shape[1]):
        length = zero
        for l in range(centred.shape[1]):
            length += centred[i, l] * centred[i, l]
        far[i] = not length <= longest
    square = np.zeros(y.shape[1], dtype=y.dtype)
    for l in range(t):
        for i in range(y.shape[1]):
            square[i] += y[l, i] * y[l, i]
    log = y[t]
    for i in range(y.shape[1]):
        log[i] += offset + half * square[i]
        size = np.sqrt(square[i])
        if not log[i] + size * max(landmark_norm, half * size) <= largest:
            far[i] = True
    for i in range(y.shape[1]):
        if far[i]:
            log[i] = -np.inf
            for l in range(t):
                y[l, i] = zero


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _key_features(y, parent, coordinate, factor, features, totals):
    n, r = features.shape[1], parent.size
    log = y[y.shape[0] - 1]
    for i in range(n):
        features[0, i] = exp(log[i])
    for j in range(1, r):
        row, source, side = features[j], features[parent[j]], y[coordinate[j]]
        w = factor[j]
        for i in range(n):
            row[i] = source[i] * side[i] * w
    for j in range(r, features.shape[0]):
        row = features[j]
        for i in range(n):
            row[i] = exp(row[i] + log[i])
    for j in range(features.shape[0]):
        row = features[j]
        total = y.dtype.type(0)
        for i in range(n):
            total += row[i]
        totals[j] += total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _extremes(values, ends):
    low, high = ends[0], ends[1]
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(row.size):
            low[j] = -maximum(-low[j], -row[j])
            high[j] = maximum(high[j], row[j])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _settle(x, spread, reliable):
    # outliers get zero coordinates, so that no basis function overflows
    n, one = x.shape[1], x.dtype.type(1)
    energy = energies(x, spread)
    for i in range(n):
        reliable[i] = energy[i] <= one
        if not reliable[i]:
            for l in range(spread.size):
                x[l, i] = x.dtype.type(0)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _query_features(x, half, shares, recurrence, clamp, features, total):
    n, r = features.shape[1], recurrence.parent.size
    for i in range(n):
        features[0, i] = x.dtype.type(1)
        total[i] = shares[0]
    add_polynomials(x, recurrence, features)
    for j in range(1, r):
        row, share = features[j], shares[j]
        for i in range(n):
            total[i] += share * row[i]
    for j in range(r, features.shape[0]):
        row, h, share = features[j], half[j - r], shares[j]
        for i in range(n):
            weight = exp(-maximum(h - row[i], -clamp))
            row[i] = weight
            total[i] += share * weight


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish(shift, total, reliable, least, bounds, value_center, out, logarithm):
    low, high = bounds[0], bounds[1]
    for i in range(out.shape[0]):
        row = out[i]
        if reliable[i] and total[i] > least and np.isfinite(total[i]):
            logarithm[i] = np.log(total[i]) + shift[i]
            w = total.dtype.type(1) / total[i]
            for j in range(row.size):
                row[j] = maximum(row[j] * w, low[j])
                row[j] = value_center[j] - maximum(-row[j], -high[j])
        else:
            logarithm[i] = np.nan
            for j in range(row.size):
                row[j] = value_center[j]
