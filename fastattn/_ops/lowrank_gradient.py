"""The derivative of a low-rank softmax: one pass over queries, one over keys.

The basis functions of a row are those of :mod:`fastattn._ops.lowrank`: polynomial ``j``
is the product of its parent ``parent[j] < j`` and coordinate ``coordinate[j]``, so that
its derivative propagates to its parent, from the last polynomial to the first.
"""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from fastattn._ops.lowrank import CLAMP, Functions
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
    functions: Functions,
    weights: Array,
    *,
    parent: Any,
    coordinate: Any,
    power: Any,
    low_precision: bool = False,  # noqa: ARG001
) -> tuple[Array, Array, Array, Array]:
    r"""Derivatives by the queries, and the sums over queries for the key pass.

    With ``[x, s]`` and ``f(x)`` of :class:`~fastattn._ops.lowrank.Functions`, ``exp(s)
    f(x) @ weights``, ``(r + c, p + 1)``, holds the weighted sums of the values and,
    last, the sum of the weights. There may be other keys: ``elsewhere``, ``(n,)``,
    is the log-sum-exp of their logits, minus infinity where there are none, and
    ``partial`` the product of their output and ``grad``, ``(n,)``; both are constants.

    A row is reliable if ``sum(spread x^2) <= 1``, the logarithm of its sum of weights
    is above ``least`` and finite, and ``elsewhere`` is below infinity; outliers add
    nothing. Returns the derivatives of ``sum(grad * output)``, ``(n, d)``; the sum of
    ``f(x) e^T``, ``(r + c, p + 1)`` in float64, where ``e = exp(s - logarithm) [grad,
    -delta]``; the log-sum-exp over all keys, infinite for outliers; and ``delta``, the
    product of the output and ``grad``, ``(n,)`` each. With ``low_precision`` a kernel
    may round the factors of products to bfloat16, but not for the sums of weights.
    """
    xp, found = array_namespace(query, grad, *functions, weights), []
    for start in range(0, query.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, query.shape[0]))
        some = [x[rows, ...] for x in (query, grad, elsewhere, partial, least)]
        found.append(_block_vjp(some, functions, weights, (parent, coordinate, power)))
    slope, sums, logarithm, delta = zip(*found, strict=True)
    total = reduce(add, sums)
    return xp.concat(slope, axis=0), total, xp.concat(logarithm), xp.concat(delta)


def _block_vjp(
    rows: Sequence[Array],
    functions: Functions,
    weights: Array,
    indices: tuple[Any, Any, Any],
) -> tuple[Array, Array, Array, Array]:
    """As ``query_vjp``, for a block of rows."""
    query, grad, elsewhere, partial, least = rows
    projection, origin, landmarks, spread = functions
    xp, dtype = array_namespace(query, projection), projection.dtype
    both = xp.matmul(xp.astype(query, dtype), projection) - origin
    reliable = xp.sum(spread * both[:, :-1] ** 2, axis=1) <= 1
    both = xp.where(reliable[:, None], both, xp.zeros_like(both))
    x, shift = both[:, :-1], both[:, -1]
    one = xp.ones_like(shift)
    columns = _polynomials(x, one, *indices, True)
    exponents = xp.matmul(x, landmarks.T) - xp.sum(landmarks**2, axis=1) / 2
    most = xp.full_like(exponents, CLAMP)
    marks = xp.exp(xp.where(exponents < most, exponents, most))
    features = xp.concat([xp.stack(columns, axis=1), marks], axis=1)
    slope = xp.matmul(grad, xp.matrix_transpose(weights[:, :-1]))
    mean, mass = xp.sum(features * slope, axis=1), xp.matmul(features, weights[:, -1])
    near = xp.log(xp.where(mass > 0, mass, one)) + shift
    reliable = xp.logical_and(reliable, xp.logical_and(mass > 0, xp.isfinite(mass)))
    reliable = xp.logical_and(reliable, near > least)
    reliable = xp.logical_and(reliable, elsewhere < xp.inf)
    mass = xp.where(reliable, mass, one)
    own = xp.where(reliable, near, one), mean / mass
    logarithm, delta = _joined(own, (xp.where(reliable, elsewhere, one), partial))
    logarithm = xp.where(reliable, logarithm, xp.full_like(logarithm, xp.inf))
    delta = xp.where(reliable, delta, xp.zeros_like(delta))
    factor = xp.exp(shift - logarithm)
    right = xp.concat([grad, -delta[:, None]], axis=1) * factor[:, None]
    total = xp.astype(xp.matmul(features.T, right), xp.float64)
    slope = (slope - delta[:, None] * weights[:, -1]) * factor[:, None]
    back = _pulled_back(x, columns, slope, *indices, True)
    back = back + xp.matmul(slope[:, len(columns) :] * marks, landmarks)
    tilt = (factor * (mean - delta * mass))[:, None]
    slope = xp.matmul(xp.concat([back, tilt], axis=1), projection.T)
    return (
        xp.where(reliable[:, None], slope, xp.zeros_like(slope)),
        total,
        logarithm,
        delta,
    )


def _joined(
    one: tuple[Array, Array], other: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Log-sum-exps over two sets of keys, and means of the deltas of both."""
    (near, own), (far, partial) = one, other
    xp = array_namespace(near)
    peak = xp.where(near > far, near, far)
    left, right = xp.exp(near - peak), xp.exp(far - peak)
    whole = left + right
    return peak + xp.log(whole), (left * own + right * partial) / whole


@op("cpu")
def key_vjp(
    key: Array,
    value: Array,
    far: Array,
    center: Array,
    projection: Array,
    landmarks: Array,
    value_center: Array,
    weights: Array,
    *,
    offset: float,
    parent: Any,
    coordinate: Any,
    power: Any,
    low_precision: bool = False,  # noqa: ARG001
) -> tuple[Array, Array]:
    r"""Derivatives of ``f(key) @ weights @ [value - value_center, 1]``.

    With ``[y, t] = (key - center) @ projection`` and ``a = exp(t + |y|^2 / 2 +
    offset)`` the functions are ``a y^alpha / sqrt(alpha!)`` and ``a exp(y . p)`` at
    the rows ``p`` of ``landmarks``; keys that are ``far``, boolean ``(m,)``, have none.
    ``key`` is ``(m, d)``, ``value`` ``(m, p)``, ``weights`` ``(r + c, p + 1)``; the
    results are ``(m, d)`` and ``(m, p)``. With ``low_precision`` a kernel may round the
    factors of products to bfloat16.
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
        shifted = xp.astype(value[rows, :], dtype) - value_center
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
