"""How far logits and values of a head of tensor attention can reach.

In a logit ``sum_l prod_s x_sl`` every coordinate may be rescaled between the factors as
long as the product of the scales is one; nothing may be subtracted from one factor, for
that leaves a term that depends on the query and the keys of the other factors. What may
be subtracted is one number from all logits: their interval need not lie around 0.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastattn._tensor_problem import TensorHead
from sketching._lib.arrays import Array, array_namespace, device_of, to_host

_BLOCK = 2048
# sums and products of a few float64 numbers were rounded, too
_SLACK = 1 + 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Bounds of a head's logits and values, from its arrays' own entries.

    Parameters
    ----------
    low, high : float
        Every logit lies between them.
    reach : float
        Bound on the sum of the absolute terms of a logit.
    terms : array, shape (d,)
        Bound on the absolute term of each coordinate.
    maps : tuple of array, shape (d,)
        What query and keys are multiplied by, so that their largest entries are alike
        in each coordinate; the product of all is the scale.
    half : float
        Half the largest range of a column of products of values.
    peak : float
        The largest absolute product of values.
    """

    low: float
    high: float
    reach: float
    terms: Array
    maps: tuple[Array, ...]
    half: float
    peak: float

    @staticmethod
    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def of(head: TensorHead) -> "Extent":
        """Look at every row once."""
        sides = (head.query, *head.keys)
        ends = [_ends(x) for x in sides]
        scaled = head.scale * _products(ends)
        largest = np.array([np.abs(x).max(axis=0) for x in ends])
        terms = abs(head.scale) * np.prod(largest, axis=0) * _SLACK
        reach = _largest_sum(sides, largest, terms)
        slack = (_SLACK - 1) * terms.sum()
        values = _products([_ends(x) for x in head.values])
        half = values.max(axis=0) / 2 - values.min(axis=0) / 2
        return Extent(
            max(float(scaled.min(axis=0).sum() - slack), -reach),
            min(float(scaled.max(axis=0).sum() + slack), reach),
            reach,
            terms,
            _maps(largest, head.scale),
            float(half.max()) * _SLACK,
            float(np.abs(values).max()) * _SLACK,
        )

    @property
    def center(self) -> float:
        """The middle of the interval of the logits."""
        return (self.low + self.high) / 2

    @property
    def bound(self) -> float:
        """Half the width of the interval of the logits."""
        return (self.high - self.low) / 2


def furthest_rows(head: TensorHead, scales: Array, count: int) -> Array:
    """Numbers of the queries whose products with ``scales`` are longest."""
    xp = head.xp
    scales = xp.asarray(scales, dtype=xp.float64, device=device_of(head.query))
    squares = xp.sum((xp.astype(head.query, xp.float64) * scales) ** 2, axis=1)
    return np.argsort(to_host(squares), kind="stable")[-count:]


def _ends(x: Array) -> Array:
    """Least and largest entry of each column, ``(2, d)``, on the host in float64."""
    xp = array_namespace(x)
    ends = [to_host(xp.min(x, axis=0)), to_host(xp.max(x, axis=0))]
    return np.array(ends, dtype=np.float64)


def _products(ends: list[Array]) -> Array:
    """Least and largest product of one entry of each interval, ``(2, d)``."""
    whole = ends[0]
    for one in ends[1:]:
        corners = (whole[:, None, :] * one[None, :, :]).reshape(4, -1)
        whole = np.stack([corners.min(axis=0), corners.max(axis=0)])
    return whole


def _largest_sum(sides: tuple[Array, ...], largest: Array, terms: Array) -> float:
    """Bound ``sum_l terms_l prod_s y_sl`` where ``y_s = |x_s| / largest_s``.

    By Hoelder's inequality it is at most the product of the weighted norms of order
    ``c`` of any ``c`` of the sides, since the others' entries are at most one.
    """
    count = len(sides)
    norms = np.array(
        [_norms(x, top, terms, count) for x, top in zip(sides, largest, strict=True)]
    )
    norms = np.sort(norms, axis=0)
    bounds = [math.prod(norms[: c + 1, c]) for c in range(count)]
    return float(min(terms.sum(), *bounds) * _SLACK)


def _norms(x: Array, largest: Array, terms: Array, count: int) -> list[float]:
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
            sums = xp.matmul(power, weight)
            most[c] = max(most[c], float(xp.max(sums)))
            power = power * y
    return [float(top) ** (1 / (c + 1)) for c, top in enumerate(most)]


def _maps(largest: Array, scale: float) -> tuple[Array, ...]:
    """Factors that balance the sides; a coordinate that is 0 on a side is left out."""
    whole = np.all(largest > 0, axis=0) & (scale != 0)
    safe = np.where(largest > 0, largest, 1.0)
    # logarithms: the product may leave the range of float64
    level = (np.log(safe).sum(axis=0) + math.log(abs(scale) or 1.0)) / len(largest)
    maps = np.where(whole, np.exp(level - np.log(safe)), 0.0)
    maps[0] *= np.sign(scale)
    return tuple(maps)
