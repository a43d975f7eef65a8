r"""The polynomial method for tensor attention, with worst-case bounds.

With a polynomial :math:`p(x) = \sum_g c_g x^g` that approximates exp on the interval of
the logits, :math:`p(\sum_l q_l k_l k'_l) = \sum_\alpha c_{|\alpha|}
\frac{|\alpha|!}{\alpha!} q^\alpha k^\alpha k'^\alpha`. The sum over all tuples of keys
of a monomial times :math:`v \circ v'` is the Hadamard product of sums over the keys of
each factor (Alman and Song, arXiv 2310.04064).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fastattn._ops.monomials import SUMMED_ROWS, means, moments
from fastattn._ops.tensor_prefixes import prefix_means
from fastattn.certificates.accumulation import ACCUMULATION_BLOCK
from fastattn.certificates.rounding import (
    deviation,
    gamma,
    largest_number,
    smallest_number,
    unit_roundoff,
)
from fastattn.costs.work import polynomial_work
from fastattn.methods.polynomial.expansions import (
    IndexSet,
    by_energy,
    rank_of,
    relative_minimax,
    total_degree,
)
from fastattn.methods.polynomial.method import Polynomial
from fastattn.methods.polynomial.proven_degree import NARROWEST, least_proven
from fastattn.problem.plan import Plan
from fastattn.tensor.exact import stored
from fastattn.tensor.logit_bounds import LogitBounds
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, array_namespace, mover, place_of
from sketching._lib.certificate import RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class TensorPolynomialExpansion:
    """Coordinates, monomials and coefficients of a polynomial tensor softmax.

    Parameters
    ----------
    maps : tuple of array, shape (d,)
        Factors of the coordinates of query and keys.
    index : IndexSet
        The monomials.
    coefficients : array, shape (g + 1,)
        Of the polynomial that approximates ``exp(logit - center)``, lowest first.
    center : float
        Midpoint of the interval of the logits, which is added to the log-sum-exps.
    dtype : dtype
        Precision of the sums.
    bound : float
        Proven bound on the largest absolute error; infinite if there is none.
    low, high : float
        Bounds on all logits; the polynomial may be fitted to a smaller interval.
    predicted : float
        Relative error on a sample; NaN without a sample.
    """

    maps: tuple[Array, ...]
    index: IndexSet
    coefficients: Array
    center: float
    dtype: Any
    bound: float
    low: float
    high: float
    predicted: float = math.nan

    @staticmethod
    def over(
        logit_bounds: LogitBounds,
        index: IndexSet,
        coefficients: Array,
        dtype: Any,
        bound: float,
    ) -> "TensorPolynomialExpansion":
        """An expansion on the interval, and in the coordinates, of ``logit_bounds``."""
        interval = logit_bounds.low, logit_bounds.high
        return TensorPolynomialExpansion(
            logit_bounds.maps,
            index,
            coefficients,
            logit_bounds.center,
            dtype,
            bound,
            *interval,
        )

    @property
    def degree(self) -> int:
        """The largest degree of a monomial."""
        return int(self.index.degree.max())

    def plan(self, head: TensorHead, reason: str) -> Plan:
        """The plan of the expansion: method, predicted error and cost."""
        n, _, d, p = head.sizes
        rank = len(self.index)
        method = Polynomial(degree=self.degree, rank=rank)
        work = polynomial_work(n, sum(head.lengths), d, p, rank)
        if self.dtype == head.xp.float64 != head.dtype:
            work *= 2
        if head.prefix_lengths is not None:
            # prefixes are summed without BLAS
            work *= 2 * head.order
        # prefer the error on a sample: the bound is a worst case, in another norm
        error = self.bound if math.isnan(self.predicted) else self.predicted
        error = error if math.isfinite(error) else math.nan
        return Plan(method, error, work, reason)

    def answer(self, head: TensorHead) -> tuple[Array, Array, Array]:
        """Outputs, log-sum-exps, and a mask of rows with a positive sum of weights."""
        if head.prefix_lengths is not None:
            return self._causal_answer(head, head.prefix_lengths)
        factors = zip(head.keys, head.values, strict=True)
        parts = (
            self.sums(s, key, value) / key.shape[0]
            for s, (key, value) in enumerate(factors)
        )
        value, logarithm, reliable = self.query(head.query, parts)
        return value, logarithm + math.log(head.sizes[1]), reliable

    def sums(self, factor: int, key: Array, value: Array) -> Array:
        """Sum monomials times values over keys of one factor: ``(r, p + 1)``."""
        move = mover(key, self.dtype)
        origin, value_center = (move(np.zeros(x.shape[1])) for x in (key, value))
        diagonal = move(np.diag(self.maps[factor + 1]))
        options = {"parent": self.index.parent, "coordinate": self.index.coordinate}
        return moments(key, value, origin, diagonal, origin, value_center, **options)

    def query(self, query: Array, parts: Iterable[Array]) -> tuple[Array, Array, Array]:
        """Answer from means over the keys of each factor of monomials times values.

        The log-sum-exps are those of mean weights. Means, because a product of many
        sums might overflow.
        """
        xp, move = array_namespace(query), mover(query, self.dtype)
        whole = move(self.index.weights(self.coefficients))[:, None]
        for part in parts:
            whole = whole * part
        value, total = means(
            query,
            move(np.zeros(query.shape[1])),
            move(np.diag(self.maps[0])),
            whole,
            move(np.zeros(whole.shape[1] - 1)),
            parent=self.index.parent,
            coordinate=self.index.coordinate,
        )
        reliable = xp.logical_and(total > 0, xp.isfinite(total))
        logarithm = xp.log(xp.where(reliable, total, xp.ones_like(total))) + self.center
        return (
            value,
            xp.where(reliable, logarithm, xp.full_like(total, xp.nan)),
            reliable,
        )

    def _causal_answer(
        self, head: TensorHead, prefix_lengths: tuple[Array, ...]
    ) -> tuple[Array, Array, Array]:
        """Answer rows with prefix lengths; zeros where a prefix is empty."""
        xp, cast = head.xp, head.xp.astype
        move = mover(head.query, self.dtype)
        value, total = prefix_means(
            cast(head.query, self.dtype, copy=False),
            tuple(cast(x, self.dtype, copy=False) for x in head.keys),
            tuple(cast(x, self.dtype, copy=False) for x in head.values),
            tuple(move(x) for x in self.maps),
            mover(head.query, xp.float64)(self.index.weights(self.coefficients)),
            prefix_lengths,
            parent=self.index.parent,
            coordinate=self.index.coordinate,
        )
        blind = prefix_lengths[0] == 0
        for seen in prefix_lengths[1:]:
            blind = xp.logical_or(blind, seen == 0)
        positive = xp.logical_and(total > 0, xp.isfinite(total))
        logarithm = xp.log(xp.where(positive, total, xp.ones_like(total))) + self.center
        logarithm = xp.where(positive, logarithm, xp.full_like(total, xp.nan))
        logarithm = xp.where(blind, xp.full_like(total, -xp.inf), logarithm)
        return value, logarithm, xp.logical_or(positive, blind)


def check_basis(method: Polynomial, guarantee: str) -> None:
    """Raise ``RefusalError`` for a basis that tensor attention does not have."""
    if method.fits_a_basis:
        raise RefusalError(
            "tensor attention has no basis fitted to queries and no landmarks: use "
            "basis='minimax' without landmarks"
        )
    if guarantee == "proven" and method.basis != "minimax":
        raise RefusalError(f"basis={method.basis!r} has no proven bound: use 'minimax'")


def proven_expansion(
    head: TensorHead,
    tol: float,
    degree: int | None = None,
    rank: int | None = None,
    max_blocks: int | None = None,
) -> TensorPolynomialExpansion:
    """Find the least degree and precision whose proven bound meets ``tol``.

    With ``max_blocks`` the bound holds for other keys within the same bounds, too: for
    up to ``max_blocks`` sums over ``ACCUMULATION_BLOCK`` keys of each factor, which are
    added in float64.

    Raises
    ------
    RefusalError
        If there is none; with the interval of the logits, the degree and the rank.
    """
    bounds = head.logit_bounds

    def make(degree: int, dtype: Any) -> TensorPolynomialExpansion:
        return bounded_expansion(head, degree, rank, dtype, max_blocks)

    where = f"logits between {bounds.low:.3g} and {bounds.high:.3g}"
    limits = max(bounds.bound, NARROWEST), bounds.half
    return least_proven(make, head, tol, limits, where, degree=degree, rank=rank)


def bounded_expansion(
    head: TensorHead,
    degree: int,
    rank: int | None,
    dtype: Any,
    max_blocks: int | None = None,
) -> TensorPolynomialExpansion:
    """The expansion of one degree and precision, with a proven error bound."""
    logit_bounds, d = head.logit_bounds, head.sizes[2]
    bound = max(logit_bounds.bound, NARROWEST)
    coefficients, delta = relative_minimax(degree, bound)
    coefficients = shifted(coefficients, logit_bounds.center)
    index = index_set(logit_bounds, coefficients, rank)
    if len(index) < rank_of(d, degree):
        delta += _dropped(logit_bounds, index, coefficients)
    lengths = (
        head.lengths if max_blocks is None else (ACCUMULATION_BLOCK,) * len(head.keys)
    )
    terms = sum(lengths)
    if place_of(head.query) == "cpu":
        # the kernel adds its blocks in float64
        terms = sum(min(m, SUMMED_ROWS) + 2 for m in lengths)
    if max_blocks is not None:
        # each block is rounded once; their sum in float64 is rounded, too
        own = unit_roundoff(np, np.float64) / unit_roundoff(head.xp, dtype)
        terms += (2 + math.ceil(max_blocks * own)) * len(lengths)
    error = math.inf
    absolute = _absolute(logit_bounds, coefficients)
    if _fits(head, max(lengths) * absolute, degree, dtype):
        terms += (degree + 2) * head.order * 2 + len(index) + 8
        error = _error(head, absolute, delta, terms, dtype)
    return TensorPolynomialExpansion.over(
        logit_bounds, index, coefficients, dtype, error
    )


def index_set(
    logit_bounds: LogitBounds, coefficients: Array, rank: int | None
) -> IndexSet:
    """All monomials, or the ``rank`` with the largest bounds on their terms."""
    d, degree = len(logit_bounds.terms), len(coefficients) - 1
    if rank is None or rank >= rank_of(d, degree):
        return total_degree(d, degree)
    return by_energy(logit_bounds.terms, np.abs(coefficients), rank)


def shifted(coefficients: Array, center: float) -> Array:
    """Coefficients of ``p(x - center)`` in powers of x."""
    # in exact fractions: large terms cancel where the center is far from 0
    found = [Fraction(float(c)) for c in coefficients]
    for start in range(len(found) - 1):
        for i in reversed(range(start, len(found) - 1)):
            found[i] -= Fraction(center) * found[i + 1]
    try:
        return np.array([float(c) for c in found])
    except OverflowError:
        # the center is so far from 0 that no bound is finite
        return np.full(len(found), np.inf)


def _dropped(logit_bounds: LogitBounds, index: IndexSet, coefficients: Array) -> float:
    """Relative error of dropping monomials: the bound of all less that of the rest.

    The term of ``alpha`` is at most ``|c| |alpha|!/alpha! prod_l terms_l^alpha_l``.
    """
    total, rest = index.sizes(logit_bounds.terms, coefficients)
    return max(total - rest, 0.0) * math.exp(logit_bounds.bound)


def _absolute(logit_bounds: LogitBounds, coefficients: Array) -> float:
    """Bound on the sum of absolute terms of a weight: ``sum_g |c_g| logit_bound^g``."""
    size = np.abs(coefficients)
    return float(np.polynomial.polynomial.polyval(logit_bounds.logit_bound, size))


def _error(
    head: TensorHead,
    absolute: float,
    delta: float,
    terms: int,
    dtype: Any,
) -> float:
    """Bound on the largest error of a row, by approximation and by rounding.

    Each computed term has a relative error of at most ``gamma``, the absolute terms of
    a weight add up to at most ``absolute``, and the weight is at least
    ``(1 - delta) exp(-bound)``, with the relative error ``delta`` of the polynomial.
    """
    logit_bounds = head.logit_bounds
    if logit_bounds.peak == 0:
        return 0.0
    u = unit_roundoff(head.xp, dtype)
    sums = gamma(terms, u) * absolute * math.exp(logit_bounds.bound)
    off = delta + sums
    if not off < 1:
        return math.inf
    error = deviation(delta, logit_bounds.half)
    error += (2 * sums / (1 - off) + 2 * u) * logit_bounds.peak
    return stored(head, error)


def _fits(
    head: TensorHead,
    absolute: float,
    degree: int,
    dtype: Any,
) -> bool:
    """Whether all sums of monomials times values are in the range of ``dtype``.

    ``absolute`` bounds the sum of the absolute terms of all weights of a factor. Values
    far below one could underflow in products with small monomials, and are rejected.
    """
    xp, logit_bounds = head.xp, head.logit_bounds
    least = smallest_number(xp, dtype) * 1e20
    most = largest_number(xp, dtype) / 16
    tops = [float(top) for top in logit_bounds.largest_values.max(axis=1)]
    if any(0 < top < least for top in (logit_bounds.half, *tops)):
        return False
    # balanced sides have equal largest entries, up to powers of two
    side = max(1.0, float(logit_bounds.terms.max())) * 2.0 ** (head.order - 1)
    size = absolute * math.prod(max(1.0, top) for top in tops) * side**degree
    maps = np.abs(np.concatenate(logit_bounds.maps))
    if any(maps[maps > 0] < least):
        return False
    return bool(max(size, maps.max()) < most)
