r"""Errors of an ensemble of sketches in the worst direction, for adaptive queries.

The length of a unit vector under L sketches of m rows is 1 plus normal deviations of
variance 1 / (2 m), plus the increase that an adversary gains by choosing the direction.
By Gordon's comparison the squares of these increases sum to at most :math:`(\sqrt k +
\tau)^2 / m`, with :math:`k` the dimension; all on one sketch, or evenly on all of them,
that is the law of extreme eigenvalues. So the number of sketches that one direction can
push beyond eps is at most the number that this sum covers, starting with those closest
to eps. A median of sampled sketches fails if more than half of the sample are among
them.
"""

import functools
import math
from statistics import NormalDist

import numpy as np

from sketching._lib.arrays import Array

# tau: the law holds but for a probability of about a fiftieth, with a margin
_DEVIATIONS = 2.0


@functools.lru_cache(maxsize=1024)
def misled(sketches: int, rows: int, k: int, eps: float) -> int:
    """How many sketches one direction can push beyond ``1 + eps``, or ``1 - eps``."""
    away = eps * math.sqrt(2 * rows) - _order_statistics(sketches)
    price = np.cumsum(np.maximum(away, 0) ** 2)
    return int(np.searchsorted(price, 2 * (math.sqrt(k) + _DEVIATIONS) ** 2, "right"))


def needed(rows: int, k: int, eps: float, share: float) -> int | None:
    """How many sketches keep the misled ones below a share; None if none do."""
    normal, away = NormalDist(), eps * math.sqrt(2 * rows)
    start = normal.inv_cdf(1 - share)
    if away <= start:
        return None

    def price(t: float) -> float:
        """An integral up to t of the squared increase, times the density."""
        return (away**2 + 1) * normal.cdf(t) + (2 * away - t) * normal.pdf(t)

    each = price(away) - price(start)
    return math.ceil(2 * (math.sqrt(k) + _DEVIATIONS) ** 2 / each)


@functools.lru_cache(maxsize=1024)
def median_failure(rows: int, sampled: int, eps: float) -> float:
    """Probability that the median of sketches is off by more than a factor 1 +- eps.

    The length of a sketch is about normal, of variance ``1 / (2 rows)``.
    """
    one_side = math.erfc(eps * math.sqrt(rows)) / 2
    return 2 * _binomial_tail(sampled, one_side)


@functools.lru_cache(maxsize=1024)
def worst_failure(sketches: int, rows: int, sampled: int, k: int, eps: float) -> float:
    """Probability that a median is off by more than eps, in the worst direction."""
    bad, half = misled(sketches, rows, k, eps), sampled // 2 + 1
    if sampled > sketches:
        # drawn with replacement
        return min(1.0, 2 * _binomial_tail(sampled, bad / sketches))
    ways = sum(
        math.comb(bad, j) * math.comb(sketches - bad, sampled - j)
        for j in range(half, sampled + 1)
    )
    return min(1.0, 2 * ways / math.comb(sketches, sampled))


@functools.lru_cache(maxsize=1024)
def worst_error(
    sketches: int, rows: int, sampled: int, k: int, failure: float
) -> float:
    """Return the least eps that the worst direction exceeds that rarely."""
    low, high = 0.0, 1.0
    while worst_failure(sketches, rows, sampled, k, high) > failure:
        low, high = high, 2 * high
    for _ in range(30):
        midpoint = (low + high) / 2
        if worst_failure(sketches, rows, sampled, k, midpoint) > failure:
            low = midpoint
        else:
            high = midpoint
    return high


def _binomial_tail(count: int, share: float) -> float:
    """Probability that more than half of an odd number are of a share."""
    return sum(
        math.comb(count, j) * share**j * (1 - share) ** (count - j)
        for j in range(count // 2 + 1, count + 1)
    )


@functools.lru_cache(maxsize=64)
def _order_statistics(count: int) -> Array:
    """Typical largest, second, ... of normal numbers (Blom's positions)."""
    normal = NormalDist()
    places = (np.arange(1, count + 1) - 0.375) / (count + 0.25)
    return np.array([normal.inv_cdf(1 - p) for p in places])
