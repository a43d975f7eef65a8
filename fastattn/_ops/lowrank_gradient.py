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
    drift: Array,
    logarithm: Array,
    projection: Array,
    origin: Array,
    landmarks: Array,
    weights: Array,
    *,
    parent: Any,
    coordinate: Any,
    power: Any,
) -> tuple[Array, Array]:
    r"""Derivatives by the queries, and the sums over queries that keys need.

    With ``[x, s] = query @ projection - origin`` and ``f(x)`` the orthonormal Hermite
    polynomials and the ``exp(x . p - |p|^2 / 2)`` at the rows ``p`` of ``landmarks``,
    a query adds ``f(x) @ weights @ e`` with ``e = exp(s - logarithm) [grad, -drift]``,
    which is differentiated by the query with ``logarithm`` and ``drift`` held fixed.
    ``query`` is ``(n, d)``, ``grad`` ``(n, p)``, ``projection`` ``(d, t + 1)``,
    ``weights`` ``(r + c, p + 1)``; a row whose ``logarithm`` is infinite adds nothing.

    Returns the derivatives, ``(n, d)``, and the sum of ``f(x) e^T``, ``(r + c, p + 1)``
    in float64.
    """
    xp = array_namespace(query, grad, projection, weights)
    dtype, parts, total = projection.dtype, [], None
    half = xp.sum(landmarks**2, axis=1) / 2
    for start in range(0, query.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, query.shape[0]))
        both = xp.matmul(xp.astype(query[rows, :], dtype), projection) - origin
        used = xp.isfinite(logarithm[rows])
        both = xp.where(used[:, None], both, xp.zeros_like(both))
        x, factor = both[:, :-1], xp.exp(both[:, -1] - logarithm[rows])
        right = xp.concat([grad[rows, :], -drift[rows, None]], axis=1)
        right = right * factor[:, None]
        columns = _polynomials(x, xp.ones_like(factor), parent, coordinate, power, True)
        exponents = xp.matmul(x, landmarks.T) - half
        most = xp.full_like(exponents, CLAMP)
        marks = xp.exp(xp.where(exponents < most, exponents, most))
        features = xp.concat([xp.stack(columns, axis=1), marks], axis=1)
        part = xp.astype(xp.matmul(features.T, right), xp.float64)
        total = part if total is None else total + part
        slope = xp.matmul(right, weights.T)
        back = _pulled_back(x, columns, slope, parent, coordinate, power, True)
        r = len(parent)
        back = back + xp.matmul(slope[:, r:] * marks, landmarks)
        tilt = xp.sum(slope * features, axis=1)[:, None]
        parts.append(xp.matmul(xp.concat([back, tilt], axis=1), projection.T))
    return xp.concat(parts, axis=0), total


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
