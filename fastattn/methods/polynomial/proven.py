"""Polynomials with an error bound for every row that is proven before they run.

If all weights have a relative error of at most ``delta``, every output has an error of
at most ``delta / (1 - delta)`` half ranges of the values. ``delta`` is the error of the
minimax polynomial on an interval with all logits (Cauchy-Schwarz after centring and
balancing), plus bounds on dropped monomials and on rounding (Alman and Song, arXiv
2302.13214).
"""

import itertools
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._ops.monomials import SUMMED_ROWS
from fastattn.certificates.accumulation import ACCUMULATION_BLOCK
from fastattn.certificates.rounding import (
    EXP,
    ValueRange,
    cut_weights,
    deviation,
    frobenius,
    gamma,
    largest_entries,
    largest_norm,
    largest_number,
    largest_row,
    once_stored,
    smallest_number,
    unit_roundoff,
    value_range,
)
from fastattn.methods.polynomial.expansions import (
    IndexSet,
    by_energy,
    rank_of,
    relative_minimax,
    total_degree,
)
from fastattn.methods.polynomial.polynomial_expansion import PolynomialExpansion
from fastattn.methods.polynomial.proven_degree import NARROWEST, least_proven
from fastattn.problem.causal_chunks import largest_chunk
from fastattn.problem.head import Head
from fastattn.problem.rows import sample_rows
from fastattn.problem.transforms import Transform, balance, center, identity
from sketching._lib.arrays import Array, place_of
from sketching._lib.certificate import RefusalError

# largest log of a key's weight: the weight and its reciprocal stay in float32's range
_LARGEST_TILT = 60.0
# fewest keys that exact attention sums before it rescales the running sums
_LEAST_BLOCK = 320


@dataclass(frozen=True, slots=True, eq=False)
class _LogitBounds:
    """Largest norms of the coordinates of a head under a transform."""

    transform: Transform
    query: float  # largest norm of u
    key: float  # largest norm of v
    query_input: float  # largest norm of q - a
    key_input: float  # largest norm of k - c

    @property
    def bound(self) -> float:
        """Bound on all ``|u . v|`` by Cauchy-Schwarz."""
        return self.query * self.key


def proven_expansion(
    head: Head,
    tol: float,
    rng: np.random.Generator,
    degree: int | None = None,
    rank: int | None = None,
    max_blocks: int | None = None,
) -> PolynomialExpansion:
    """Find the least degree and precision whose proven bound meets ``tol``.

    Parameters
    ----------
    head : Head
        One head; all rows are read once, to bound the logits.
    tol : float
        Tolerance, in units of half the range of the values.
    rng : Generator
        Draws the rows from which the transform is computed; any draw is valid.
    degree, rank : int, optional
        Degree and number of monomials, if given.
    max_blocks : int, optional
        If given, the bound also holds for other keys within the same norms: for this
        many sums over ``ACCUMULATION_BLOCK`` keys each, added in float64.

    Raises
    ------
    RefusalError
        If no degree meets ``tol``; the message has the bound of the logits and the
        degree and rank that would be needed.
    """
    logit_bounds = _tightest_bounds(head, rng)
    value_bounds = value_range(head)

    def make(degree: int, dtype: Any) -> PolynomialExpansion:
        return _expansion(
            head,
            logit_bounds,
            value_bounds,
            degree,
            dtype,
            rank=rank,
            max_blocks=max_blocks,
        )

    bound = max(logit_bounds.bound, NARROWEST)
    where = f"centred logits up to {bound:.3g}"
    limits = bound, value_bounds.half
    return least_proven(make, head, tol, limits, where, degree=degree, rank=rank)


def _tightest_bounds(head: Head, rng: np.random.Generator) -> _LogitBounds:
    """Choose the transform with the least logit bound on a sample; bound all rows."""
    query, key = sample_rows(head, rng)
    transforms = []
    for make, queries in itertools.product((center, balance), (False, True)):
        # other transforms use no squares, and may not overflow
        with suppress(RefusalError):
            transforms.append(make(query, key, head.scale, queries=queries))
    # for skewed keys, centring may increase the largest norm
    transforms.append(identity(query.shape[1], head.scale))
    best = min(
        transforms,
        key=lambda t: (
            largest_norm(query, t.query_center, t.query_map)
            * largest_norm(key, t.key_center, t.key_map)
        ),
    )
    query_length = largest_norm(head.query, best.query_center, best.query_map)
    key_length = largest_norm(head.key, best.key_center, best.key_map)
    shift = _even(query_length, key_length)
    return _LogitBounds(
        replace(
            best,
            query_map=np.ldexp(best.query_map, -shift),
            key_map=np.ldexp(best.key_map, shift),
        ),
        float(np.ldexp(query_length, -shift)),
        float(np.ldexp(key_length, shift)),
        largest_norm(head.query, best.query_center),
        largest_norm(head.key, best.key_center),
    )


def _even(one: float, other: float) -> int:
    """Exponent of the power of two that balances two norms, to avoid overflow."""
    if not all(0 < x < math.inf for x in (one, other)):
        return 0
    return round((math.log2(one) - math.log2(other)) / 2)


def _expansion(
    head: Head,
    logit_bounds: _LogitBounds,
    value_bounds: ValueRange,
    degree: int,
    dtype: Any,
    *,
    rank: int | None,
    max_blocks: int | None,
) -> PolynomialExpansion:
    """Build the expansion of one degree and precision, and bound its error."""
    bound = max(logit_bounds.bound, NARROWEST)
    coefficients, delta = relative_minimax(degree, bound)
    d = logit_bounds.transform.query_map.shape[1]
    if rank is None or rank >= rank_of(d, degree):
        index = total_degree(d, degree)
    else:
        index = by_energy(logit_bounds.transform.scales, np.abs(coefficients), rank)
        delta += _dropped(head, logit_bounds, index, coefficients)
    u = unit_roundoff(head.xp, dtype)
    exponent = _exponent_rounding(
        head, logit_bounds, u, smallest_number(head.xp, dtype)
    )
    # other kernels may sum all keys in working precision
    m = head.sizes[1] if max_blocks is None else ACCUMULATION_BLOCK
    summed = min(m, SUMMED_ROWS) + 2 if place_of(head.query) == "cpu" else m
    if max_blocks is not None:
        # rounding of each sum, of their addition in float64, and of the result
        summed += 2 + math.ceil(max_blocks * unit_roundoff(np, np.float64) / u)
    sums = _sum_rounding(logit_bounds, coefficients, degree, summed + len(index), u)
    weights = (1 + delta) * (math.exp(exponent) if exponent < 1 else math.inf) - 1
    own_sums = 0.0
    if head.prefix_lengths is not None:
        within, own_sums, part = _chunk_rounding(head, logit_bounds, u)
        weights = (1 + max(weights, within)) * (1 + part) - 1
        sums = max(sums, own_sums)
    off = weights + 2 * sums
    error = share = math.inf
    if off < 1 and not _may_overflow(head, logit_bounds, value_bounds, degree, dtype):
        error = deviation(off, value_bounds.half) + 2 * u * value_bounds.peak
        lost = _underflow(head, logit_bounds, coefficients, len(index), dtype)
        error += lost / (1 - off) * max(1.0, value_bounds.half)
        share = off + lost
        # exact attention in a chunk does not center values; then two means are merged
        error += 2 * own_sums * value_bounds.peak
        if head.prefix_lengths is not None:
            lost = head.sizes[1] * smallest_number(head.xp, dtype)
            lost += cut_weights(head.xp, dtype, head.sizes[1]) * value_bounds.peak
            error += 16 * u * value_bounds.peak + 2 * lost
        error = once_stored(head.xp, head.query.dtype, value_bounds.peak, error)
    return PolynomialExpansion(
        logit_bounds.transform,
        index,
        coefficients,
        value_bounds.value_center,
        dtype,
        error,
        share,
    )


def _may_overflow(
    head: Head,
    logit_bounds: _LogitBounds,
    value_bounds: ValueRange,
    degree: int,
    dtype: Any,
) -> bool:
    """Whether sums of monomials times values may overflow in ``dtype``.

    Includes the transform, and intermediate results of the coordinates.
    """
    t, most = logit_bounds.transform, largest_number(head.xp, dtype) / 16
    sides = _power(logit_bounds.key, degree) * _power(logit_bounds.query, degree)
    size = head.sizes[1] * math.exp(min(_tilt(logit_bounds), _LARGEST_TILT)) * sides
    size *= max(1.0, value_bounds.half, value_bounds.peak)
    inputs = max(logit_bounds.query_input, logit_bounds.key_input)
    parts = t.query_center, t.key_center, t.query_map, t.key_map, t.tilt
    return not all(
        x < most for x in (size, inputs, *(float(np.abs(y).max()) for y in parts))
    )


def _tilt(logit_bounds: _LogitBounds) -> float:
    """Bound on the log of a key's weight, ``|t| max |k - c|``."""
    return frobenius(logit_bounds.transform.tilt) * logit_bounds.key_input


def _underflow(
    head: Head, logit_bounds: _LogitBounds, coefficients: Array, rank: int, dtype: Any
) -> float:
    """Bound the effect of underflow in the sums on a mean of values within +-1.

    Every product may lose the smallest number, times the factors that follow: powers of
    the coordinates, coefficients and the weight of a key. The sum of the weights is at
    least ``exp(-bound - tilt)`` per key.
    """
    degree, d = len(coefficients) - 1, logit_bounds.transform.query_map.shape[1]
    tiny, tilt = (
        smallest_number(head.xp, dtype),
        min(_tilt(logit_bounds), _LARGEST_TILT),
    )
    sides = _power(logit_bounds.key, degree) * _power(logit_bounds.query, degree)
    # multinomial coefficients of a degree add up to a power of d
    size = float(np.polynomial.polynomial.polyval(d, np.abs(coefficients))) + rank
    steps = 2 * (3 * degree + 8)
    return tiny * steps * sides * size * math.exp(2 * tilt + logit_bounds.bound)


def _power(x: float, degree: int) -> float:
    """The largest power of ``x`` up to a degree; infinite if it overflows."""
    return math.prod([max(1.0, x)] * degree)


def _dropped(
    head: Head, logit_bounds: _LogitBounds, index: IndexSet, coefficients: Array
) -> float:
    """Bound the relative error of weights by dropped monomials.

    The term of ``alpha`` is at most ``|c| |alpha|!/alpha! prod_l a_l^alpha_l`` with
    ``a_l = max |u_l| max |v_l|``; these terms are summed over all monomials, less those
    that are used. A weight is at least ``exp(-bound)``.
    """
    t = logit_bounds.transform
    entries = largest_entries(head.query, t.query_center, t.query_map)
    entries = entries * largest_entries(head.key, t.key_center, t.key_map)
    everything, kept = index.sizes(entries, coefficients)
    # rounding of the difference of two almost equal sums
    slack = 8 * len(index) * unit_roundoff(np, np.float64) * everything
    return (max(everything - kept, 0.0) + slack) * math.exp(logit_bounds.bound)


# norms of extreme maps overflow to infinity, and the bound with them
@np.errstate(over="ignore", invalid="ignore")
def _exponent_rounding(
    head: Head, logit_bounds: _LogitBounds, u: float, tiny: float
) -> float:
    """Bound the error of a logit plus the relative error of a key's weight.

    The error of coordinates is ``gamma(d + 4)`` times the norms of input and map, plus
    underflow: ``tiny`` in each product, and in each entry of a map.
    """
    t, d = logit_bounds.transform, head.sizes[2]
    g, least = gamma(d + 4, u), 2 * d * tiny
    off_query = g * logit_bounds.query_input * frobenius(t.query_map)
    off_query += least * (1 + logit_bounds.query_input)
    off_key = g * logit_bounds.key_input * frobenius(t.key_map)
    off_key += least * (1 + logit_bounds.key_input)
    logit = (
        off_query * logit_bounds.key
        + logit_bounds.query * off_key
        + off_query * off_key
    )
    logit = math.inf if math.isnan(logit) else logit
    tilt = _tilt(logit_bounds)
    off_tilt = g * tilt + least * (1 + logit_bounds.key_input)
    # a key's weight exp(tilt) and its reciprocal must stay in the range of float32
    return logit + off_tilt + EXP * u if tilt < _LARGEST_TILT else math.inf


def _chunk_rounding(
    head: Head, logit_bounds: _LogitBounds, u: float
) -> tuple[float, float, float]:
    """Bound the rounding of the exact part of a causal row, and of merging.

    Relative errors of: weights within a chunk; their sums, both as in
    ``exact.rounding_bound`` with centred keys; and the share of a part in the merged
    output, ``exp`` of a difference of log-sum-exps, which are at most the largest logit
    plus the log of the number of keys, with a few roundings of that size.
    """
    m, d = head.sizes[1:3]
    keys = largest_chunk(m)
    # no fast kernel sums fewer keys at once
    blocks = -(-keys // _LEAST_BLOCK)
    logits = abs(head.scale) * largest_row(head.query) * logit_bounds.key_input
    exponent = (gamma(d + 2, u) + 5 * u) * logits + EXP * (blocks + 1) * u
    exponent += d * smallest_number(head.xp, head.dtype) * (1 + logit_bounds.key_input)
    sums = gamma(keys + 2 * blocks + 2, u) + u
    share = (8 * (logits + math.log(m) + 1) + 2 * EXP) * u
    if not max(exponent, share) < 1:
        return math.inf, sums, math.inf
    return math.expm1(exponent), sums, math.expm1(share)


def _sum_rounding(
    logit_bounds: _LogitBounds, coefficients: Array, degree: int, terms: int, u: float
) -> float:
    """Bound the rounding of sums over monomials and keys, relative to sums of weights.

    The error of a term is ``gamma`` times its absolute value, the absolute terms of a
    weight add up to at most ``sum_g |c_g| B^g``, and a weight is at least ``exp(-B)``.
    """
    absolute = float(
        np.polynomial.polynomial.polyval(logit_bounds.bound, np.abs(coefficients))
    )
    return gamma(2 * degree + terms + 8, u) * absolute * math.exp(logit_bounds.bound)
