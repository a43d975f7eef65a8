"""A-priori bounds on the rounding errors of floating-point arithmetic.

Standard model: ``fl(a op b) = (a op b)(1 + e)``, ``|e| <= u``; a sum of k products has
relative error ``gamma(k) = k u / (1 - k u)`` of the sum of the absolute products, in
any order (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.problem.head import Head
from fastattn.problem.row_lengths import row_lengths
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    device_of,
    to_host,
)

# relative error of exp of a float, in units of u: measured below 2, taken as 8
EXP = 8
# rows whose norms are computed at once, so that they stay in cache
_BLOCK = 2048


def unit_roundoff(xp: Any, dtype: Any) -> float:
    """Half the distance from 1 to the next number of ``dtype``."""
    return float(xp.finfo(dtype).eps) / 2


def gamma(terms: float, u: float) -> float:
    """Bound the relative error of ``k`` roundings: ``k u / (1 - k u)``, or infinite."""
    return terms * u / (1 - terms * u) if terms * u < 1 else math.inf


def smallest_number(xp: Any, dtype: Any) -> float:
    """The smallest positive number of ``dtype``: the largest error of an underflow."""
    info = xp.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps)


def cut_weights(xp: Any, dtype: Any, tuples: int) -> float:
    """Bound the error of a mean by tiny weights, relative to the largest value.

    The fast exp clamps weights at the least normal number, which changes the sum of the
    weights and the weighted sum of the values.
    """
    return 4 * tuples * float(xp.finfo(dtype).smallest_normal)


def largest_number(xp: Any, dtype: Any) -> float:
    """The largest finite number of ``dtype``."""
    return float(xp.finfo(dtype).max)


def largest_norm(x: Array, center: Array, projection: Array | None = None) -> float:
    """Largest Euclidean norm of ``(row - center) @ projection``, in float64."""
    blocks = _projected(x, center, projection)
    largest = max((_longest(xp, block) for xp, block in blocks), default=0.0)
    # includes the rounding of the squares
    return largest * (1 + 1e-12)


def _longest(xp: Any, block: Array) -> float:
    """Largest norm of the rows, without overflow; infinite if one is not finite."""
    peak = float(xp.max(xp.abs(block)))
    # a NaN (infinity times zero) would be lost in the maximum over blocks
    if peak == 0 or not math.isfinite(peak):
        return 0.0 if peak == 0 else math.inf
    return peak * math.sqrt(float(xp.max(xp.sum((block / peak) ** 2, axis=1))))


def frobenius(x: Array) -> float:
    """Frobenius norm of a small array on the host, whatever the size of its entries."""
    # squares of tiny or huge entries would underflow or overflow
    return math.hypot(*np.asarray(x, np.float64).ravel().tolist()) * (1 + 1e-12)


def largest_row(x: Array, squares: Array | None = None) -> float:
    """Bound the largest norm of a row; in float64 only where squares leave the range.

    ``squares`` are the results of ``row_lengths``, if known.
    """
    xp, d = array_namespace(x), x.shape[1]
    info = xp.finfo(compute_dtype(xp, x.dtype))
    squares = row_lengths(x) if squares is None else squares
    square = float(squares.max(initial=0.0))
    # squares that underflow are below the rounding error of a sum that is large enough
    if not float(info.smallest_normal) / float(info.eps) ** 2 < square < math.inf:
        return largest_norm(x, np.zeros(d))
    return float(math.sqrt(square) * (1 + (d + 2) * float(info.eps)))


def row_norms(x: Array, squares: Array | None = None) -> Array:
    """Bound the norm of each row, on the host; infinite where squares overflow.

    ``squares`` are the results of ``row_lengths``, if known.
    """
    xp, d = array_namespace(x), x.shape[1]
    info = xp.finfo(compute_dtype(xp, x.dtype))
    squares = row_lengths(x) if squares is None else squares
    # squares that underflow are each less than the least normal number
    lost = math.sqrt(d * float(info.smallest_normal))
    return np.sqrt(squares) * (1 + (d + 2) * float(info.eps)) + lost


def largest_entries(x: Array, center: Array, projection: Array) -> Array:
    """Largest absolute value of each column of ``(x - center) @ projection``."""
    peaks = [
        to_host(xp.max(xp.abs(block), axis=0))
        for xp, block in _projected(x, center, projection)
    ]
    return np.max(peaks, axis=0) * (1 + 1e-12)


def _projected(
    x: Array, center: Array, projection: Array | None
) -> Iterator[tuple[Any, Array]]:
    """Yield ``(x - center) @ projection`` in float64, a block of rows at a time."""
    xp = array_namespace(x)
    where = {"dtype": xp.float64, "device": device_of(x)}
    shift = xp.asarray(center, **where)
    matrix = None if projection is None else xp.asarray(projection, **where)
    for start in range(0, x.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, x.shape[0]))
        block = xp.astype(x[rows, :], xp.float64) - shift
        yield xp, block if matrix is None else xp.matmul(block, matrix)


def once_stored(xp: Any, dtype: Any, peak: float, error: float) -> float:
    """Bound the error of a computed number after it is rounded to ``dtype``.

    The exact number is at most ``peak``, and the computed one has an error of at most
    ``error``. Infinite where it may round to infinity.
    """
    u = unit_roundoff(xp, dtype)
    # numbers up to half a unit in the last place above the largest one round to it
    if not peak + error < largest_number(xp, dtype) * (1 + u / 4):
        return math.inf
    return error + u * (peak + error) + smallest_number(xp, dtype)


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Range of the values: the unit of proven bounds.

    Parameters
    ----------
    half : float
        Half of the largest range (maximum minus minimum) of a column.
    peak : float
        The largest absolute value.
    value_center : array, shape (p,)
        Mean of minimum and maximum of each column, on the host in float64.
    """

    half: float
    peak: float
    value_center: Array


def value_range(head: Head) -> ValueRange:
    """Compute the range of the values of a head."""
    xp = head.xp
    low = to_host(xp.min(head.value, axis=0)).astype(np.float64)
    high = to_host(xp.max(head.value, axis=0)).astype(np.float64)
    peak = max(float(np.abs(low).max()), float(np.abs(high).max()))
    half = float(half_range(low, high).max())
    return ValueRange(half, peak, np.where(low < high, low / 2 + high / 2, low))


def half_range(low: Array, high: Array) -> Array:
    """Half of ``high - low`` in float64, zero only where they are equal."""
    # halves first: the difference of two large numbers may overflow
    half = high / 2 - low / 2
    # half of the smallest number underflows to zero
    least = np.finfo(np.float64).smallest_subnormal
    return np.where(low < high, np.maximum(half, least), 0.0)


def deviation(delta: float, half: float) -> float:
    """Bound the change of a weighted mean if weights have a relative error ``delta``.

    ``|out' - out| <= delta / (1 - delta) * sum_j P_j |v_j - out|``, and the mean
    absolute deviation of a bounded variable is at most ``half``, half its range.
    Infinite where ``delta`` is one or more, or NaN: weights may then have any sign.
    """
    return delta / (1 - delta) * half if delta < 1 else math.inf


def mean_deviation(delta: float, half: float) -> float:
    """Bound the change of a weighted mean whose weights are known to be positive.

    Such a mean stays in the range of the values, so that the change is at most
    ``2 * half`` where ``deviation`` gives no smaller bound.
    """
    return min(deviation(delta, half), 2 * half)
