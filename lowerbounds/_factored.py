"""The degree, and so the rank, that polynomials need for a softmax matrix.

A method that computes ``U (W^T V)`` with r columns answers as if the softmax matrix had
rank r. Polynomials of degree g in d coordinates are such a method with
``r = C(d + g, g)``: their answers are computed here from the logits, without U and W.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lowerbounds._tuples import logits_of, products_of
from sketching._lib.arrays import Array

# logits that exist at once
_BLOCK = 1 << 23
LARGEST_DEGREE = 40


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Queries, keys and values whose largest absolute entry is 1, and the scale."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    scale: float

    @property
    def tuples(self) -> int:
        """The number of tuples of keys."""
        return math.prod(len(key) for key in self.keys)

    def logits(self, query: Array) -> Array:
        """Logits of the given queries and all tuples, in C order."""
        return logits_of(self.scale * query, self.keys)

    def blocks(self) -> Iterator[Array]:
        """Logits of all queries and of blocks of tuples, one block after the other."""
        query, first, rest = self.scale * self.query, self.keys[0], self.keys[1:]
        each = len(query) * self.tuples // len(first)
        step = max(1, _BLOCK // each)
        for start in range(0, len(first), step):
            yield logits_of(query, (first[start : start + step], *rest))

    def logit_range(self) -> tuple[float, float]:
        """The least and the largest logit."""
        ends = [(float(x.min()), float(x.max())) for x in self.blocks()]
        return min(low for low, _ in ends), max(high for _, high in ends)


def polynomial_outputs(
    logits: Array, worth: Array, low: float, high: float, degree: int
) -> Array:
    """Answers of truncated Chebyshev expansions of exp, a row for each degree.

    ``logits`` lie between ``low`` and ``high``; ``worth`` has the value of each tuple.
    """
    sums, found = np.zeros((2, len(logits))), []
    for coefficient, term in expansion(logits, low, high, degree):
        sums += coefficient * np.stack([term @ worth, term.sum(axis=1)])
        # weights that sum to zero give no answer at this degree
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(sums[0] / sums[1])
    return np.array(found)


def expansion(
    logits: Array, low: float, high: float, degree: int
) -> Iterator[tuple[float, Array]]:
    """Coefficients and terms of the Chebyshev expansion of exp over an interval.

    They are in units of the exponential at the upper end.
    """
    from scipy.special import ive

    half = max((high - low) / 2, 1e-12)
    t = (logits - (low + high) / 2) / half
    before, now = np.ones_like(t), t
    for i, coefficient in enumerate(ive(np.arange(degree + 1), half)):
        yield (2 if i else 1) * float(coefficient), before
        before, now = now, 2 * t * now - before


def degree_errors(
    factors: Factors,
    exponent: float,
    degree: int,
    rows: int,
    logit_range: tuple[float, float],
) -> Array:
    """Largest error of the polynomials of each degree, over some queries.

    ``logit_range`` is that of all logits, before the factor ``exponent``.
    """
    low, high = exponent * logit_range[0], exponent * logit_range[1]
    worth, error = products_of(factors.values), np.zeros(degree + 1)
    step = max(1, _BLOCK // factors.tuples)
    for start in range(0, min(rows, len(factors.query)), step):
        query = factors.query[start : min(start + step, rows)]
        logits = exponent * factors.logits(query)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        truth = (weights @ worth) / weights.sum(axis=1)
        off = np.abs(polynomial_outputs(logits, worth, low, high, degree) - truth)
        error = np.maximum(error, np.where(np.isnan(off), np.inf, off).max(axis=1))
    return error


def predicted_errors(half_width: float, degree: int) -> Array:
    r"""Bound the additive error of each degree for values in [-1, 1].

    Twice the relative error of the expansion, which on an interval of this half width
    is at most :math:`e^b \sum_{i > g} 2 I_i(b)`.
    """
    from scipy.special import ive

    # terms beyond fall faster than geometrically
    terms = 2 * ive(np.arange(degree + 200), half_width)
    tails = np.cumsum(terms[::-1])[::-1][1 : degree + 2]
    with np.errstate(over="ignore"):
        return 2 * np.exp(2 * half_width) * tails


def least_degree(errors: Array, error: float) -> float:
    """Degree from which on errors are at most ``error``, interpolated."""
    above = np.flatnonzero(errors > error)
    if len(above) == 0:
        return 0.0
    last = int(above[-1])
    if last + 1 == len(errors):
        return math.inf
    # infinity and 0 have no logarithm to interpolate
    upper, lower = errors[last], errors[last + 1]
    if not (math.isfinite(upper) and lower > 0):
        return last + 1.0
    return last + math.log(upper / error) / math.log(upper / lower)


def rank_of_degree(d: int, degree: float) -> float:
    """Number of monomials of ``d`` coordinates up to a degree, whole or not."""
    if math.isinf(degree):
        return math.inf
    log_rank = (
        math.lgamma(d + degree + 1) - math.lgamma(d + 1) - math.lgamma(degree + 1)
    )
    return math.exp(log_rank)
