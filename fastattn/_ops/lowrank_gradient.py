"""The derivative of a low-rank softmax: one pass over queries, one over keys.

The functions of a row are those of :mod:`fastattn._ops.lowrank`: number ``j`` of the
polynomials is made from number ``parent[j] < j`` and coordinate ``coordinate[j]``, so
its derivative is handed back to its parent, the last number first.
"""

import math
from typing import Any

from fastattn._ops.lowrank import CLAMP
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op

_BLOCK = 1024


@op("cpu")
def query_vjp(
    query: Array,
    grad: Array,
    elsewhere: Array,
    partial: Array,
    least: Array,
    projection: Array,
    origin: Array,
    landmarks: Array,
    spread: Array,
    weights: Array,
    *,
    parent: Any,
    coordinate: Any,
    power: Any,
) -> tuple[Array, Array, Array, Array]:
    r"""Derivatives by the queries, and the sums over queries that keys need.

    With ``[x, s] = query @ projection - origin`` and ``f(x)`` the orthonormal Hermite
    polynomials and the ``exp(x . p - |p|^2 / 2)`` at the rows ``p`` of ``landmarks``,
    ``exp(s) f(x) @ weights``, ``(r + c, p + 1)``, holds the weighted sums of the values
    and, last, the sum of the weights. There may be other keys: ``elsewhere`` is the
    log-sum-exp of their logits, minus infinity where there are none, and ``partial``
    the product of their own answer and ``grad``, ``(n, p)``; both are held fixed.

    A row is good if ``sum(spread x^2) <= 1``, the logarithm of its sum of weights is
    above ``least`` and finite, and ``elsewhere`` is below infinity; the others add
    nothing. Returns the derivatives of ``sum(grad * answer)``, ``(n, d)``; the sum of
    ``f(x) e^T``, ``(r + c, p + 1)`` in float64, where ``e = exp(s - logarithm) [grad,
    -drift]``; the log-sum-exp of all keys, infinite where a row is not good; and the
    drift, which is the product of the answer and ``grad``, ``(n,)`` each.
    """
    xp = array_namespace(query, grad, projection, weights)
    dtype, parts, total = projection.dtype, [], None
    half = xp.sum(landmarks**2, axis=1) / 2
    for start in range(0, query.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, query.shape[0]))
        both = xp.matmul(xp.astype(query[rows, :], dtype), projection) - origin
        good = xp.sum(spread * both[:, :-1] ** 2, axis=1) <= 1
        both = xp.where(good[:, None], both, xp.zeros_like(both))
        x, shift = both[:, :-1], both[:, -1]
        one = xp.ones_like(shift)
        columns = _polynomials(x, one, parent, coordinate, power, True)
        exponents = xp.matmul(x, landmarks.T) - half
        most = xp.full_like(exponents, CLAMP)
        marks = xp.exp(xp.where(exponents < most, exponents, most))
        features = xp.concat([xp.stack(columns, axis=1), marks], axis=1)
        slope = xp.matmul(grad[rows, :], xp.matrix_transpose(weights[:, :-1]))
        mean, mass = (
            xp.sum(features * slope, axis=1),
            xp.matmul(features, weights[:, -1]),
        )
        near = xp.log(xp.where(mass > 0, mass, one)) + shift
        good = xp.logical_and(good, xp.logical_and(mass > 0, xp.isfinite(mass)))
        good = xp.logical_and(good, near > least[rows])
        good = xp.logical_and(good, elsewhere[rows] < xp.inf)
        near, other, mass = (
            xp.where(good, x, one) for x in (near, elsewhere[rows], mass)
        )
        peak = xp.where(near > other, near, other)
        left, right = xp.exp(near - peak), xp.exp(other - peak)
        logarithm = peak + xp.log(left + right)
        drift = (left * (mean / mass) + right * partial[rows]) / (left + right)
        logarithm = xp.where(good, logarithm, xp.full_like(logarithm, xp.inf))
        drift = xp.where(good, drift, xp.zeros_like(drift))
        factor = xp.exp(shift - logarithm)
        right = xp.concat([grad[rows, :], -drift[:, None]], axis=1) * factor[:, None]
        part = xp.astype(xp.matmul(features.T, right), xp.float64)
        total = part if total is None else total + part
        slope = (slope - drift[:, None] * weights[:, -1]) * factor[:, None]
        back = _pulled_back(x, columns, slope, parent, coordinate, power, True)
        back = back + xp.matmul(slope[:, len(parent) :] * marks, landmarks)
        tilt = (factor * (mean - drift * mass))[:, None]
        slope = xp.matmul(xp.concat([back, tilt], axis=1), projection.T)
        slope = xp.where(good[:, None], slope, xp.zeros_like(slope))
        parts.append((slope, logarithm, drift))
    slope, logarithm, drift = (xp.concat(x, axis=0) for x in zip(*parts, strict=True))
    return slope, total, logarithm, drift


@op("cpu")
def key_vjp(
    key: Array,
    value: Array,
    far: Array,
    center: Array,
    projection: Array,
    landmarks: Array,
    middle: Array,
    weights: Array,
    *,
    offset: float,
    parent: Any,
    coordinate: Any,
    power: Any,
) -> tuple[Array, Array]:
    r"""Derivatives by keys and values of ``f(key) @ weights @ [value - middle, 1]``.

    With ``[y, t] = (key - center) @ projection`` and ``a = exp(t + |y|^2 / 2 +
    offset)`` the functions are ``a y^alpha / sqrt(alpha!)`` and ``a exp(y . p)`` at
    the rows ``p`` of ``landmarks``; keys that are ``far``, boolean ``(m,)``, have none.
    ``key`` is ``(m, d)``, ``value`` ``(m, p)``, ``weights`` ``(r + c, p + 1)``; the
    answers are ``(m, d)`` and ``(m, p)``.
    """
    xp = array_namespace(key, value, projection, weights)
    dtype, keys, values = projection.dtype, [], []
    for start in range(0, key.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, key.shape[0]))
        both = xp.matmul(xp.astype(key[rows, :], dtype) - center, projection)
        both = xp.where(far[rows, None], xp.zeros_like(both), both)
        y = both[:, :-1]
        log_weight = both[:, -1] + offset + xp.sum(y**2, axis=1) / 2
        nothing = xp.full_like(log_weight, -xp.inf)
        log_weight = xp.where(far[rows], nothing, log_weight)
        first = xp.exp(log_weight)
        columns = _polynomials(y, first, parent, coordinate, power, False)
        marks = xp.exp(xp.matmul(y, landmarks.T) + log_weight[:, None])
        features = xp.concat([xp.stack(columns, axis=1), marks], axis=1)
        values.append(xp.matmul(features, weights[:, :-1]))
        shifted = xp.astype(value[rows, :], dtype) - middle
        right = xp.concat([shifted, xp.ones_like(shifted[:, :1])], axis=1)
        slope = xp.matmul(right, weights.T)
        back = _pulled_back(y, columns, slope, parent, coordinate, power, False)
        back = back + xp.matmul(slope[:, len(parent) :] * marks, landmarks)
        tilt = xp.sum(slope * features, axis=1)[:, None]
        back = xp.concat([back + tilt * y, tilt], axis=1)
        keys.append(xp.matmul(back, projection.T))
    return xp.concat(keys, axis=0), xp.concat(values, axis=0)


def _polynomials(
    x: Array, first: Array, parent: Any, coordinate: Any, power: Any, hermite: bool
) -> list[Array]:
    """Every ``first He_alpha(x)``, or ``first x^alpha / sqrt(alpha!)``, as columns."""
    columns = [first]
    for j in range(1, len(parent)):
        column = columns[parent[j]] * x[:, int(coordinate[j])]
        if hermite and power[j] > 1:
            before = columns[parent[parent[j]]]
            column = column - math.sqrt(power[j] - 1) * before
        columns.append(column / math.sqrt(power[j]))
    return columns


def _pulled_back(
    x: Array,
    columns: list[Array],
    slope: Array,
    parent: Any,
    coordinate: Any,
    power: Any,
    hermite: bool,
) -> Array:
    """Derivative by ``x`` of the polynomials, each times its column of ``slope``."""
    xp = array_namespace(x, slope)
    back = [xp.zeros_like(x[:, 0]) for _ in range(x.shape[1])]
    left = [slope[:, j] for j in range(len(parent))]
    for j in range(len(parent) - 1, 0, -1):
        source, axis = int(parent[j]), int(coordinate[j])
        push = left[j] / math.sqrt(power[j])
        back[axis] = back[axis] + push * columns[source]
        left[source] = left[source] + push * x[:, axis]
        if hermite and power[j] > 1:
            older = int(parent[source])
            left[older] = left[older] - push * math.sqrt(power[j] - 1)
    return xp.stack(back, axis=1)
