"""Weights of keys and moments of clusters, as blocks of queries see them."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, exp, maximum


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def localise(key, start, centre, local):
    for c in range(centre.shape[0]):
        centre[c] = 0
        for j in range(start[c], start[c + 1]):
            for l in range(key.shape[1]):
                centre[c, l] += key[j, l]
        count = key.dtype.type(start[c + 1] - start[c])
        for l in range(key.shape[1]):
            centre[c, l] /= count
        for j in range(start[c], start[c + 1]):
            for l in range(key.shape[1]):
                local[j, l] = key[j, l] - centre[c, l]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def tilt(weight, start, mass, top):
    # logits become weights relative to the largest of a cluster
    for c in range(mass.size):
        lo, hi = start[c], start[c + 1]
        largest, s = weight[lo], weight.dtype.type(0)
        for j in range(lo, hi):
            largest = maximum(largest, weight[j])
        for j in range(lo, hi):
            weight[j] = exp(weight[j] - largest)
            s += weight[j]
        mass[c], top[c] = s, largest


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def bend(square, rate, largest):
    for j in range(square.size):
        z = square[j] if square[j] < largest else largest
        square[j] = z * exp(rate * z)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def growths(logit, top, mass, distance, growth):
    zero, one = logit.dtype.type(0), logit.dtype.type(1)
    growth[:] = 0
    whole = np.finfo(logit.dtype).tiny
    for i in range(distance.size):
        whole += distance[i]
    for i in range(distance.size):
        row, largest = logit[i], logit[i, 0] + top[0]
        for c in range(row.size):
            row[c] += top[c]
            largest = maximum(largest, row[c])
        total = zero
        for c in range(row.size):
            row[c] = exp(row[c] - largest)
            total += mass[c] * row[c]
        total, share = one / total, distance[i] / whole
        for c in range(row.size):
            growth[c] += (row[c] * total) ** 2 * share
    for c in range(growth.size):
        growth[c] = np.sqrt(growth[c])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def classify(
    weight, remainder, growth, start, threshold, least, alike, near, first_order, spans,
    total, error,
):  # fmt: skip
    # lists near and first-order keys; weights of near keys become 0; returns their
    # number
    zero, a, b = weight.dtype.type(0), 0, 0
    for c in range(growth.size):
        spans[c] = b
        g, high = growth[c], zero
        lo, hi = start[c], start[c + 1]
        for j in range(lo, hi):
            high = maximum(high, weight[j] * remainder[j])
        if high * g > least:
            for j in range(lo, hi):
                s = weight[j] * g * remainder[j]
                near[a] = j
                first_order[b] = j
                is_near = s > threshold
                a += is_near
                b += (s > least) & (not is_near)
                if is_near:
                    weight[j] = zero
        s, rest, squares = zero, zero, zero
        for j in range(lo, hi):
            s += weight[j]
            rest += weight[j] * remainder[j]
            squares += (weight[j] * remainder[j]) ** 2
        total[c] = s
        error[c] = (squares + alike * rest * rest) / s / s if s > 0 else zero
    spans[growth.size] = b
    return a


@njit(nogil=True, error_model="numpy", fastmath=REASSOCIATE, inline="always")
def _add_four(weight, local, value, a, b, v):
    w0, w1, w2, w3 = weight[0], weight[1], weight[2], weight[3]
    for l in range(a.size):
        x0, x1, x2, x3 = local[0, l], local[1, l], local[2, l], local[3, l]
        y0, y1, y2, y3 = w0 * x0, w1 * x1, w2 * x2, w3 * x3
        a[l] += (y0 + y1) + (y2 + y3)
        b[l] += (y0 * x0 + y1 * x1) + (y2 * x2 + y3 * x3)
    for l in range(v.size):
        v[l] += (w0 * value[0, l] + w1 * value[1, l]) + (
            w2 * value[2, l] + w3 * value[3, l]
        )


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def sum_moments(weight, local, value, start, total, shift, variance, average):
    # clusters are outermost, so that one reading of the keys serves all blocks
    d, p, zero = local.shape[1], value.shape[1], weight.dtype.type(0)
    for c in range(total.shape[1]):
        lo, hi = start[c], start[c + 1]
        even = lo + (hi - lo) // 4 * 4
        for r in range(total.shape[0]):
            if total[r, c] == 0:
                continue
            w, a, b, v = weight[r], shift[r, c], variance[r, c], average[r, c]
            a[:] = 0
            b[:] = 0
            v[:] = 0
            for j in range(lo, even, 4):
                _add_four(w[j : j + 4], local[j : j + 4], value[j : j + 4], a, b, v)
            for j in range(even, hi):
                for l in range(d):
                    x = w[j] * local[j, l]
                    a[l] += x
                    b[l] += x * local[j, l]
                for l in range(p):
                    v[l] += w[j] * value[j, l]
            scale = weight.dtype.type(1) / total[r, c]
            for l in range(d):
                a[l] *= scale
                b[l] = maximum(b[l] * scale - a[l] * a[l], zero)
            for l in range(p):
                v[l] *= scale
