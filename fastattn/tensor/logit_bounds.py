r"""Bounds on the logits and values of a head of tensor attention.

A logit is :math:`s \sum_l \prod_{t=1}^{k} x_{t l}`, with the query and the keys of the
:math:`k - 1` factors as :math:`x_1, \dots, x_k`. Each coordinate may be rescaled
between them if the product of the scales is one. The keys of one factor cannot be
shifted: that would change logits by a term that depends on the keys of the other
factors. But softmax is invariant to a shift of all logits, so that their interval
``[low, high]`` need not be symmetric around 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.rounding import largest_number, smallest_number
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, array_namespace, device_of, mover, to_host
from sketching._lib.certificate import RefusalError

_BLOCK = 2048
# largest error by underflow of partial products, relative to the largest product
_NEGLIGIBLE = 1e-10
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
    half: float
    peak: float

    @staticmethod
    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def of(head: TensorHead) -> "LogitBounds":
        """Compute the bounds in one pass over the rows."""
        sides = (head.query, *head.keys)
        shares, largest = _product_ranges(sides)
        terms = _product(np.vstack([largest, np.full(largest.shape[1], head.scale)]))
        # a coordinate whose terms are zero adds nothing, also if a share is infinite
        scaled = np.where(terms != 0, shares * terms, 0.0)
        terms = np.abs(terms) * _SLACK
        logit_bound = _largest_sum(sides, largest, terms)
        slack = (_SLACK - 1) * terms.sum()
        shares, tops = _product_ranges(head.values)
        # a product may underflow, with a relative error larger than the slack
        least = np.finfo(np.float64).smallest_subnormal
        peaks = np.where(np.all(tops > 0, axis=0), _product(tops) * _SLACK + least, 0.0)
        varies = (peaks > 0) & (shares[1] > shares[0])
        half = np.where(varies, peaks * ((shares[1] - shares[0]) / 2) + least, 0.0)
        return LogitBounds(
            max(float(scaled.min(axis=0).sum() - slack), -logit_bound),
            min(float(scaled.max(axis=0).sum() + slack), logit_bound),
            logit_bound,
            terms,
            largest,
            _maps(largest, head.scale),
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


def furthest_rows(head: TensorHead, scales: Array, count: int) -> Array:
    """Indices of the ``count`` queries of largest norm after scaling coordinates."""
    xp = head.xp
    scales = xp.asarray(scales, dtype=xp.float64, device=device_of(head.query))
    squares = xp.sum((xp.astype(head.query, xp.float64) * scales) ** 2, axis=1)
    return np.argsort(to_host(squares), kind="stable")[-count:]


def balanced(head: TensorHead, logit_bounds: LogitBounds) -> TensorHead:
    """The same head in float64 with scale one, its factors balanced.

    Partial products of its entries overflow or underflow float64 only if complete
    products do, or if the factors that balance them do.

    Raises
    ------
    RefusalError
        If a factor that balances them overflows or underflows.
    """

    def scaled(arrays: tuple[Array, ...], maps: tuple[Array, ...]) -> Iterator[Array]:
        for x, factors in zip(arrays, maps, strict=True):
            move = mover(x, head.xp.float64)
            yield head.xp.astype(x, head.xp.float64) * move(factors)

    maps = _maps(_product_ranges(head.values)[1], 1.0)
    if not np.isfinite(np.concatenate([*logit_bounds.maps, *maps])).all():
        raise RefusalError(
            "query, keys and values differ too much in size to be balanced in "
            "float64: scale them so that their products stay in range"
        )
    query, *keys = scaled((head.query, *head.keys), logit_bounds.maps)
    values = tuple(scaled(head.values, maps))
    return replace(head, query=query, keys=tuple(keys), values=values, scale=1.0)


def in_range(head: TensorHead, dtype: Any) -> bool:
    """Whether products of entries, and sums of them, stay in the range of ``dtype``.

    A partial product that underflows may be multiplied by large factors later: the
    error must be negligible relative to the largest product of values.
    """
    values = head.sizes[1] * size_of(head.values)
    size = size_of((head.query, *head.keys), head.scale)
    peak = float(_product(_product_ranges(head.values)[1]).max())
    lost = smallest_number(head.xp, dtype) * values if peak > 0 else 0.0
    fits = max(size, values) < largest_number(head.xp, dtype) / 4
    return fits and lost <= _NEGLIGIBLE * peak


def lost_of_products(head: TensorHead, dtype: Any) -> float:
    """Bound the error of an output entry by underflow of partial products of values.

    A partial product that underflows in ``dtype`` may be multiplied by large factors
    later.
    """
    tiny = smallest_number(head.xp, dtype)
    return 2 * head.sizes[1] * tiny * size_of(head.values)


def lost_products(head: TensorHead, dtype: Any, size: tuple[float, float]) -> float:
    """Bound the error by underflow of products and outputs, relative to the output.

    Outputs underflow in the dtype of the query; ``size`` is their
    ``scaled_frobenius``.
    """
    peak, norm = size
    if _product_ranges(head.values)[1].min(axis=0).max() == 0:
        # all products are zero
        return 0.0
    if not (math.isfinite(peak) and peak > 0):
        return math.inf
    n, _, _, p = head.sizes
    entry = lost_of_products(head, dtype)
    entry += smallest_number(head.xp, head.query.dtype) / 2
    return entry / peak * math.sqrt(n * p) / norm


def size_of(arrays: tuple[Array, ...], scale: float = 0.0) -> float:
    """Bound on products of an entry of each array, or of some of them, and a scale."""
    xp = array_namespace(*arrays)
    largest = (max(1.0, float(xp.max(xp.abs(x)))) for x in arrays)
    return math.prod(largest) * (abs(scale) + 1)


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


def _product(x: Array) -> Array:
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


def _maps(largest: Array, scale: float) -> tuple[Array, ...]:
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
