"""The two passes of a low-rank softmax: key-value states, and outputs of queries.

Basis functions of a row are ``r`` polynomials and ``c`` exponentials at landmarks. The
polynomials are given by NumPy integer arrays on every device: polynomial ``j`` is the
product of its parent ``parent[j] < j`` and coordinate ``coordinate[j]``, in which it
then has degree ``power[j]``; polynomial 0 is 1.
"""

import math
from typing import Any, NamedTuple

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op

# largest exponent: a key that would exceed it is far, a query that does is an outlier
LARGEST = 60.0
# the sum of weights of a query, in units of what convexity promises, is at least
LEAST = 0.9
# no logit of the landmarks is taken beyond it
CLAMP = 80.0

_BLOCK = 4096


class Functions(NamedTuple):
    """The basis functions of a query, in the coordinates of ``projection``.

    With ``[x, s] = query @ projection - origin`` they are the orthonormal Hermite
    polynomials ``He_alpha(x)``, and ``exp(x . p - |p|^2 / 2)`` at the rows ``p`` of
    ``landmarks``. A query with ``sum(spread x^2) > 1`` is an outlier. The shapes are
    ``(d, t + 1)``, ``(t + 1,)``, ``(c, t)`` and ``(t,)``.
    """

    projection: Array
    origin: Array
    landmarks: Array
    spread: Array


@op("cpu", "gpu")
def key_sums(
    key: Array,
    value: Array,
    center: Array,
    projection: Array,
    landmarks: Array,
    value_center: Array,
    *,
    offset: float,
    longest: float,
    parent: Any,
    coordinate: Any,
    power: Any,
    low_precision: bool = False,  # noqa: ARG001
) -> tuple[Array, Array, Array]:
    r"""Sum over keys of function times weight times ``[value - value_center, 1]``.

    With ``[y, t] = (key - center) @ projection``, the weight of a key is
    ``a = exp(t + |y|^2 / 2 + offset)``, the functions are
    ``y^alpha / sqrt(alpha!)`` and ``exp(y . p)`` at the rows ``p`` of ``landmarks``.
    Keys with ``|key - center|^2 > longest``, or with exponents beyond ``LARGEST``,
    are far and left out. ``key`` is ``(m, d)``, ``value`` ``(m, p)``, ``projection``
    ``(d, t + 1)``, ``landmarks`` ``(c, t)``. With ``low_precision`` a kernel may round
    functions and values to bfloat16, but not for the sums of weights.

    Returns the sums in float64, ``(r + c, p + 1)``, the least and the largest of
    ``value - value_center``, ``(2, p)``, and which keys are far, boolean ``(m,)``.
    """
    xp = array_namespace(key, value, center, projection, landmarks, value_center)
    dtype, total, ranges, far = projection.dtype, None, [], []
    landmark_norm = (
        xp.sqrt(xp.max(xp.sum(landmarks**2, axis=1))) if landmarks.shape[0] else 0.0
    )
    for start in range(0, key.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, key.shape[0]))
        centred = xp.astype(key[rows, :], dtype) - center
        y, log_weight, largest = _weigh(
            xp.matmul(centred, projection), offset, landmark_norm
        )
        short = xp.sum(centred**2, axis=1) <= longest
        near = xp.logical_and(short, largest <= LARGEST)
        y = xp.where(near[:, None], y, xp.zeros_like(y))
        log_weight = xp.where(near, log_weight, xp.full_like(log_weight, -xp.inf))
        features = xp.concat(
            [
                _powers(y, parent, coordinate, power) * xp.exp(log_weight)[:, None],
                xp.exp(_products(y, landmarks) + log_weight[:, None]),
            ],
            axis=1,
        )
        shifted = xp.astype(value[rows, :], dtype) - value_center
        ranges += [xp.min(shifted, axis=0), xp.max(shifted, axis=0)]
        shifted = xp.concat([shifted, xp.ones_like(shifted[:, :1])], axis=1)
        part = xp.astype(xp.matmul(xp.matrix_transpose(features), shifted), xp.float64)
        total = part if total is None else total + part
        far.append(xp.logical_not(near))
    ends = xp.stack(ranges)
    return (
        total,
        xp.stack([xp.min(ends, axis=0), xp.max(ends, axis=0)]),
        xp.concat(far),
    )


@op("cpu", "gpu")
def query_means(
    query: Array,
    functions: Functions,
    weights: Array,
    far_key: Array,
    far_value: Array,
    bounds: Array,
    value_center: Array,
    *,
    parent: Any,
    coordinate: Any,
    power: Any,
) -> tuple[Array, Array]:
    r"""Weighted means of the values, and the logarithms of the sums of weights.

    With ``[x, s]`` and the basis of :class:`Functions`, the product of the functions
    with ``weights``, ``(r + c, p + 1)``, plus
    ``exp(query @ far_key^T) @ far_value`` holds weighted sums and, last, the sum of the
    weights; the mean is their quotient, cut to ``bounds``, ``(2, p)``, plus
    ``value_center``, and the logarithm has ``s`` added. A row is reliable if its sum of
    weights is above ``LEAST``, ``sum(spread x^2) <= 1`` and no exponent of a far key is
    beyond ``LARGEST``: outliers get ``value_center`` and NaN. The outputs are
    ``(n, p)`` and ``(n,)``, in the dtype of ``projection``.
    """
    projection, origin, landmarks, spread = functions
    xp = array_namespace(query, projection, weights, far_key, far_value, value_center)
    dtype, values, logarithms = projection.dtype, [], []
    half = xp.sum(landmarks**2, axis=1) / 2
    for start in range(0, query.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, query.shape[0]))
        block = xp.astype(query[rows, :], dtype)
        both = xp.matmul(block, projection) - origin
        x, shift = both[:, :-1], both[:, -1]
        reliable = xp.sum(spread * x**2, axis=1) <= 1
        x = xp.where(reliable[:, None], x, xp.zeros_like(x))
        exponents = _products(x, landmarks) - half
        most = xp.full_like(exponents, CLAMP)
        exponents = xp.where(exponents < most, exponents, most)
        features = xp.concat(
            [_hermites(x, parent, coordinate, power), xp.exp(exponents)], axis=1
        )
        sums = xp.matmul(features, weights)
        if far_key.shape[0]:
            logits = _products(block, far_key)
            reliable = xp.logical_and(reliable, xp.all(logits <= LARGEST, axis=1))
            logits = xp.where(reliable[:, None], logits, xp.zeros_like(logits))
            sums = sums + xp.matmul(xp.exp(logits), far_value)
        total = sums[:, -1]
        reliable = xp.logical_and(
            reliable, xp.logical_and(total > LEAST, xp.isfinite(total))
        )
        total = xp.where(reliable, total, xp.ones_like(total))
        mean = _cut(sums[:, :-1] / total[:, None], bounds)
        mean = xp.where(reliable[:, None], mean, xp.zeros_like(mean))
        values.append(mean + value_center)
        nothing = xp.full_like(total, xp.nan)
        logarithms.append(xp.where(reliable, xp.log(total) + shift, nothing))
    return xp.concat(values, axis=0), xp.concat(logarithms)


def _weigh(
    both: Array, offset: float, landmark_norm: Any
) -> tuple[Array, Array, Array]:
    """Coordinates and log weights of keys, and the largest exponent of any function."""
    xp = array_namespace(both)
    y, tilt = both[:, :-1], both[:, -1]
    square = xp.sum(y**2, axis=1)
    log_weight = tilt + offset + square / 2
    length = xp.sqrt(square)
    half, other = length / 2, xp.zeros_like(length) + landmark_norm
    return y, log_weight, log_weight + length * xp.where(half > other, half, other)


def _cut(x: Array, bounds: Array) -> Array:
    """Cut the columns of a matrix to the bounds, ``(2, p)``."""
    xp = array_namespace(x, bounds)
    low, high = (xp.zeros_like(x) + bounds[i, :] for i in (0, 1))
    x = xp.where(x > low, x, low)
    return xp.where(x < high, x, high)


def _products(x: Array, y: Array) -> Array:
    """Inner products of the rows of two matrices."""
    xp = array_namespace(x, y)
    return xp.matmul(x, xp.matrix_transpose(y))


def _powers(y: Array, parent: Any, coordinate: Any, power: Any) -> Array:
    """Every ``y^alpha / sqrt(alpha!)``: ``(n, r)``."""
    xp = array_namespace(y)
    columns = [xp.ones_like(y[:, 0])]
    for j in range(1, len(parent)):
        source, factor = columns[parent[j]], y[:, int(coordinate[j])]
        columns.append(source * factor / math.sqrt(power[j]))
    return xp.stack(columns, axis=1)


def _hermites(x: Array, parent: Any, coordinate: Any, power: Any) -> Array:
    """Every orthonormal Hermite polynomial: ``(n, r)``.

    ``sqrt(a) He_a = x He_(a-1) - sqrt(a - 1) He_(a-2)`` in each coordinate.
    """
    xp = array_namespace(x)
    columns = [xp.ones_like(x[:, 0])]
    for j in range(1, len(parent)):
        column = columns[parent[j]] * x[:, int(coordinate[j])]
        if power[j] > 1:
            before = columns[parent[parent[j]]]
            column = column - math.sqrt(power[j] - 1) * before
        columns.append(column / math.sqrt(power[j]))
    return xp.stack(columns, axis=1)
