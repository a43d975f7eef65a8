"""A-priori bounds on what floating-point arithmetic adds to an answer.

Standard model: ``fl(a op b) = (a op b)(1 + e)``, ``|e| <= u``; a sum of k products has
relative error ``gamma(k) = k u / (1 - k u)`` of the sum of the absolute products, in
any order (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.problem.head import Head, row_squares
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    device_of,
    to_host,
)

# relative error of exp of a float, in units of u: measured below 2, taken as 8
EXP = 8
# rows whose norms are computed at once: they stay in cache
_BLOCK = 2048


def unit_roundoff(xp: Any, dtype: Any) -> float:
    """Half the distance from 1 to the next number of ``dtype``."""
    return float(xp.finfo(dtype).eps) / 2


def gamma(terms: float, u: float) -> float:
    """Bound the relative error of ``terms`` roundings in a row; may be infinite."""
    return terms * u / (1 - terms * u) if terms * u < 1 else math.inf


def smallest_number(xp: Any, dtype: Any) -> float:
    """The smallest positive number of ``dtype``: what an underflow may lose."""
    info = xp.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps)


def cut_weights(xp: Any, dtype: Any, tuples: int) -> float:
    """What weights below the least normal number add to a mean, relative to the values.

    The fast exp clamps them there, in the sum of the weights and in that of the values.
    """
    return 4 * tuples * float(xp.finfo(dtype).smallest_normal)


def largest_number(xp: Any, dtype: Any) -> float:
    """The largest finite number of ``dtype``."""
    return float(xp.finfo(dtype).max)


def largest_norm(x: Array, center: Array, projection: Array | None = None) -> float:
    """Largest Euclidean norm of ``(row - center) @ projection``, in float64."""
    blocks = _projected(x, center, projection)
    largest = max((_longest(xp, block) for xp, block in blocks), default=0.0)
    # the squares were rounded too
    return largest * (1 + 1e-12)


def _longest(xp: Any, block: Array) -> float:
    """Largest norm of a row of float64 numbers, of any size; infinite if unknown."""
    peak = float(xp.max(xp.abs(block)))
    # NaN, of an infinity times zero, would be lost among the maxima of blocks
    if peak == 0 or not math.isfinite(peak):
        return 0.0 if peak == 0 else math.inf
    return peak * math.sqrt(float(xp.max(xp.sum((block / peak) ** 2, axis=1))))


def frobenius(x: Array) -> float:
    """Frobenius norm of a small array on the host, whatever the size of its entries."""
    # squares of entries that are small, or large, would leave the range
    return math.hypot(*np.asarray(x, np.float64).ravel().tolist()) * (1 + 1e-12)


def largest_row(x: Array, squares: Array | None = None) -> float:
    """Bound the largest norm of a row: in the dtype of computation where that holds.

    ``squares`` are those of ``row_squares``, if known.
    """
    xp, d = array_namespace(x), x.shape[1]
    info = xp.finfo(compute_dtype(xp, x.dtype))
    squares = row_squares(x) if squares is None else squares
    square = float(squares.max(initial=0.0))
    # squares that underflowed are lost in the rounding of larger ones, if there are any
    if not float(info.smallest_normal) / float(info.eps) ** 2 < square < math.inf:
        return largest_norm(x, np.zeros(d))
    return float(math.sqrt(square) * (1 + (d + 2) * float(info.eps)))


def row_norms(x: Array, squares: Array | None = None) -> Array:
    """Bound the norm of each row, on the host; infinite where squares overflow.

    ``squares`` are those of ``row_squares``, if known.
    """
    xp, d = array_namespace(x), x.shape[1]
    info = xp.finfo(compute_dtype(xp, x.dtype))
    squares = row_squares(x) if squares is None else squares
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
    """Bound the error of a number once it is rounded to ``dtype``.

    The true one is at most ``peak``, what is rounded off by ``error``. Infinite where
    it may round to infinity.
    """
    u = unit_roundoff(xp, dtype)
    # half a unit in the last place beyond the largest number rounds to that
    if not peak + error < largest_number(xp, dtype) * (1 + u / 4):
        return math.inf
    return error + u * (peak + error) + smallest_number(xp, dtype)


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Extent of the values: the unit of a proven bound.

    Parameters
    ----------
    half : float
        Half of the largest range of a column.
    peak : float
        The largest absolute value.
    value_center : array, shape (p,)
        Mid-range of each column, on the host in float64.
    """

    half: float
    peak: float
    value_center: Array


def value_range(head: Head) -> ValueRange:
    """Measure the values of a head."""
    xp = head.xp
    low = to_host(xp.min(head.value, axis=0)).astype(np.float64)
    high = to_host(xp.max(head.value, axis=0)).astype(np.float64)
    peak = max(float(np.abs(low).max()), float(np.abs(high).max()))
    half = float(half_range(low, high).max())
    return ValueRange(half, peak, np.where(low < high, low / 2 + high / 2, low))


def half_range(low: Array, high: Array) -> Array:
    """Half of ``high - low`` in float64, zero only where they are equal."""
    # halves first: the range of two large numbers may not be one
    half = high / 2 - low / 2
    # the half of the smallest number is none
    least = np.finfo(np.float64).smallest_subnormal
    return np.where(low < high, np.maximum(half, least), 0.0)


def deviation(delta: float, half: float) -> float:
    """Change of a weighted mean of values when weights are off by ``delta``.

    ``|out' - out| <= delta / (1 - delta) * sum_j a_j |v_j - out|``, and the mean
    absolute deviation of a bounded variable is at most half its range. Infinite where
    ``delta`` is one or more, or unknown: weights may then be of any sign.
    """
    return delta / (1 - delta) * half if delta < 1 else math.inf


def mean_deviation(delta: float, half: float) -> float:
    """Change of a mean with weights that are positive, however wrong they are.

    No mean leaves the range of the values: what cannot be bounded by ``deviation`` is
    the whole of it.
    """
    return min(deviation(delta, half), 2 * half)
