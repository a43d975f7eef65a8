r"""Bounds on the logits and values of a head of tensor attention.

A logit is :math:`s \sum_l \prod_{t=1}^{k} x_{t l}`, with the query and the keys of the
:math:`k - 1` factors as :math:`x_1, \dots, x_k`. Each coordinate may be rescaled
between them if the product of the scales is one. The keys of one factor cannot be
shifted: that would change logits by a term that depends on the keys of the other
factors. But softmax is invariant to a shift of all logits, so that their interval
``[low, high]`` need not be symmetric around 0.
"""

import math
from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array, array_namespace, device_of, to_host

_BLOCK = 2048
# covers the rounding of sums and products of a few float64 numbers
_SLACK = 1 + 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class LogitBounds:
    """Bounds on the logits and values of a head, from the entries of its arrays.

    Parameters
    ----------
    low, high : float
        Bounds on all logits.
    logit_bound : float
        Bound on the sum of the absolute terms of a logit.
    terms : array, shape (d,)
        Bound on the absolute term of each coordinate.
    largest : array, shape (k, d)
        The largest absolute coordinates of queries and keys.
    maps : tuple of array, shape (d,)
        Factors of query and keys that make their largest entries equal in each
        coordinate, up to a power of two; the product of all is the scale.
    largest_values : array, shape (k - 1, p)
        The largest absolute values of each factor.
    half : float
        Half the largest range of a column of products of values.
    peak : float
        The largest absolute product of values.
    """

    low: float
    high: float
    logit_bound: float
    terms: Array
    largest: Array
    maps: tuple[Array, ...]
    largest_values: Array
    half: float
    peak: float

    @staticmethod
    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def of(
        sides: tuple[Array, ...], values: tuple[Array, ...], scale: float
    ) -> "LogitBounds":
        """Compute the bounds of query and keys in one pass over the rows."""
        shares, largest = _product_ranges(sides)
        terms = product(np.vstack([largest, np.full(largest.shape[1], scale)]))
        # a coordinate whose terms are zero adds nothing, also if a share is infinite
        scaled = np.where(terms != 0, shares * terms, 0.0)
        terms = np.abs(terms) * _SLACK
        logit_bound = _largest_sum(sides, largest, terms)
        slack = (_SLACK - 1) * terms.sum()
        shares, tops = _product_ranges(values)
        # a product may underflow, with a relative error larger than the slack
        least = np.finfo(np.float64).smallest_subnormal
        peaks = np.where(np.all(tops > 0, axis=0), product(tops) * _SLACK + least, 0.0)
        varies = (peaks > 0) & (shares[1] > shares[0])
        half = np.where(varies, peaks * ((shares[1] - shares[0]) / 2) + least, 0.0)
        return LogitBounds(
            max(float(scaled.min(axis=0).sum() - slack), -logit_bound),
            min(float(scaled.max(axis=0).sum() + slack), logit_bound),
            logit_bound,
            terms,
            largest,
            maps_of(largest, scale),
            tops,
            float(half.max()) * _SLACK,
            float(peaks.max()) * _SLACK,
        )

    @property
    def center(self) -> float:
        """The midpoint of the interval of the logits."""
        return (self.low + self.high) / 2

    @property
    def bound(self) -> float:
        """Half the width of the interval of the logits."""
        return (self.high - self.low) / 2


def _product_ranges(sides: tuple[Array, ...]) -> tuple[Array, Array]:
    """Ranges of the products of columns, ``(2, d)``, and largest entries, ``(k, d)``.

    The ranges are relative to the product of the largest entries, whose partial
    products may be out of the range of float64.
    """
    shares, largest = np.ones((1, 1)), []
    for x in sides:
        xp = array_namespace(x)
        ends = np.array([to_host(xp.min(x, axis=0)), to_host(xp.max(x, axis=0))])
        ends = ends.astype(np.float64)
        largest.append(np.abs(ends).max(axis=0))
        own = ends / np.where(largest[-1] > 0, largest[-1], 1.0)
        corners = (shares[:, None, :] * own[None, :, :]).reshape(-1, own.shape[1])
        shares = np.stack([corners.min(axis=0), corners.max(axis=0)])
    return shares, np.array(largest)


def product(x: Array) -> Array:
    """Products over the rows; partial products may be out of range."""
    mantissa, exponent = np.frexp(x)
    product: Array = np.ldexp(np.prod(mantissa, axis=0), exponent.sum(axis=0))
    return product


def _largest_sum(sides: tuple[Array, ...], largest: Array, terms: Array) -> float:
    """Bound ``sum_l terms_l prod_s y_sl`` where ``y_s = |x_s| / largest_s``.

    By Hoelder's inequality it is at most the product of the weighted norms of order
    ``c`` of any ``c`` of the sides, since all entries of the other sides are at most
    one.
    """
    count = len(sides)
    norms = np.array(
        [row_norms(x, top, terms, count) for x, top in zip(sides, largest, strict=True)]
    )
    norms = np.sort(norms, axis=0)
    bounds = [math.prod(norms[: c + 1, c]) for c in range(count)]
    return float(min(terms.sum(), *bounds) * _SLACK)


def row_norms(x: Array, largest: Array, terms: Array, count: int) -> list[float]:
    """Largest weighted norm of a row, ``(sum_l w_l y_l^c)^(1/c)`` for c = 1, 2, ..."""
    xp = array_namespace(x)
    where = {"dtype": xp.float64, "device": device_of(x)}
    unit = xp.asarray(np.where(largest > 0, largest, 1.0), **where)
    weight = xp.asarray(terms, **where)
    most = np.zeros(count)
    for start in range(0, x.shape[0], _BLOCK):
        block = x[start : min(start + _BLOCK, x.shape[0]), :]
        y = xp.abs(xp.astype(block, xp.float64)) / unit
        power = y
        for c in range(count):
            top = float(xp.max(xp.matmul(power, weight)))
            # max() would drop NaN, which comes from infinity times zero
            most[c] = max(most[c], math.inf if math.isnan(top) else top)
            power = power * y
    return [float(top) ** (1 / (c + 1)) for c, top in enumerate(most)]


def maps_of(largest: Array, scale: float) -> tuple[Array, ...]:
    """Factors that balance the sides; zero for a coordinate that is 0 on a side.

    They are powers of two, which do not round; that of the first side is multiplied by
    the scale.
    """
    whole = np.all(largest > 0, axis=0) & (scale != 0)
    sizes = np.log2(np.where(largest > 0, largest, 1.0))
    level = (sizes.sum(axis=0) + math.log2(abs(scale) or 1.0)) / len(largest)
    powers = np.rint(level - sizes[1:]).astype(int)
    maps = np.ldexp(
        np.vstack([scale * whole, *[whole * 1.0] * len(powers)]),
        np.vstack([-powers.sum(axis=0), *powers]),
    )
    # a factor that underflows to zero would drop its coordinate
    return tuple(np.where(whole & (maps == 0), np.inf, maps))
