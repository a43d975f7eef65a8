r"""Sweeps over the entry bound: where the rank of attention grows past n.

The theory puts the threshold at entries :math:`B = \Theta((\ln n)^{1/k})`: for smaller
ones a polynomial of small degree makes attention of order k nearly linear, for larger
ones nothing is faster than enumerating all tuples, if satisfiability is as hard as is
believed. A sweep fixes B over :math:`(\ln n)^{1/k}` and measures, for growing n, the
rank and the degree that an additive error takes. It shows what these methods need on
these inputs, and proves nothing about others.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lowerbounds._factored import (
    LARGEST_DEGREE,
    Factors,
    degree_errors,
    least_degree,
    predicted_errors,
    rank_of_degree,
)
from lowerbounds._instance import VectorInstance
from lowerbounds._spectra import numerical_ranks
from lowerbounds.satisfiability import from_cnf, random_formula
from lowerbounds.vectors import gap_inner_product, least_dimension, orthogonal_vectors
from sketching._lib.arrays import Array
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_choice, check_integer, check_number

FAMILIES = ("bounded", "gap", "planted", "satisfiability")
RATIOS = tuple(round(0.2 * 1.12**i, 4) for i in range(25))
# coordinates of gap instances over ln n, so that a correlated tuple stands out
_GAP_DIMENSION = 16


@dataclass(frozen=True, slots=True)
class ThresholdRow:
    """Rank and degree for one entry bound and one error on one instance.

    Parameters
    ----------
    order, family, n, d
        The order k of attention, the family of inputs, tokens and coordinates.
    ratio, entry_bound : float
        B over ``(ln n) ** (1 / k)``, and B.
    error : float
        The additive error, for values in [-1, 1].
    numerical_rank, numerical_rank_most : int or None
        Bounds on the numerical rank from below, which holds for every factored method,
        and from above; None where singular values were not computed.
    degree, rank : float
        The least degree of a polynomial that meets the error on these inputs,
        interpolated between whole ones, and the number of its monomials.
    predicted_degree, predicted_rank : float
        The same by the formula, for the worst inputs of this entry bound.

    Examples
    --------
    >>> from lowerbounds import threshold_sweep
    >>> (row,) = threshold_sweep(
    ...     2, sizes=[64], families=["bounded"], ratios=[1.0], errors=[0.01], rng=0
    ... )
    >>> row.numerical_rank < row.rank < row.predicted_rank
    True
    """

    order: int
    family: str
    n: int
    d: int
    ratio: float
    entry_bound: float
    error: float
    numerical_rank: int | None
    numerical_rank_most: int | None
    degree: float
    rank: float
    predicted_degree: float
    predicted_rank: float


def threshold_sweep(
    order: int = 2,
    *,
    sizes: Iterable[int] = (256, 512, 1024),
    families: Iterable[str] = FAMILIES,
    ratios: Iterable[float] = RATIOS,
    errors: Iterable[float] = (1e-1, 1e-2, 1e-3),
    dimension: float = 1.0,
    largest_spectrum: int = 4096,
    largest_bracket: int = 8192,
    queries: int = 256,
    rng: RandomSource = None,
    progress: Callable[[ThresholdRow], object] | None = None,
) -> tuple[ThresholdRow, ...]:
    r"""Sweep the entry bound, and measure the rank and degree of an additive error.

    Parameters
    ----------
    order : int
        The order of attention: 2 for pairs, 3 for tensor attention with two factors.
    sizes : iterable of int
        Tokens n. All :math:`n^k` logits are computed.
    families : iterable of str
        Of ``"bounded"`` (uniform entries), ``"gap"``, ``"planted"`` and
        ``"satisfiability"`` (random clauses of three variables at the threshold; n is
        a power of two). The vectors themselves, scaled to the entry bound; the padded
        keys of the reductions would add one column.
    ratios : iterable of float
        Values of :math:`B / (\ln n)^{1/k}`.
    errors : iterable of float
        Additive errors, for values in [-1, 1].
    dimension : float
        Coordinates over ln n in the family of bounded entries; the others need more.
    largest_spectrum : int
        All singular values are computed up to this n, unless fewer determine the rank.
    largest_bracket : int
        For larger n up to this one, order 2 alone, the numerical rank has a bracket.
    queries : int
        The polynomials' error is the largest over the first so many queries.
    rng : int, Generator or None
        The source of randomness.
    progress : callable, optional
        Called with every row as it is found.

    Returns
    -------
    tuple of ThresholdRow
        A row for each size, family, ratio and error.

    Raises
    ------
    ValueError
        If a name is unknown or a number out of range.

    Examples
    --------
    >>> from lowerbounds import threshold_sweep
    >>> rows = threshold_sweep(
    ...     3, sizes=[16], families=["bounded"], ratios=[0.5, 2.0], errors=[0.1], rng=0
    ... )
    >>> [row.rank < row.n for row in rows]
    [True, False]
    """
    order = check_integer("order", order, least=2)
    sizes = [check_integer("sizes", n, least=2) for n in sizes]
    ratios = [check_number("ratios", x, above=0) for x in ratios]
    errors = tuple(check_number("errors", x, above=0) for x in errors)
    check_number("dimension", dimension, above=0)
    families = list(families)
    for name in families:
        check_choice("families", name, FAMILIES)
    rng = as_generator(rng)
    found: list[ThresholdRow] = []
    for n in sizes:
        for name in families:
            factors = factors_of(name, order, n, dimension, rng)
            sweep = _Sweep(
                family=name,
                factors=factors,
                logit_range=factors.logit_range(),
                errors=errors,
                queries=queries,
                largest_spectrum=largest_spectrum,
                largest_bracket=largest_bracket if order == 2 else 0,
            )
            for ratio in ratios:
                for row in sweep.measure(ratio):
                    found.append(row)
                    if progress is not None:
                        progress(row)
    return tuple(found)


def factors_of(
    family: str, order: int, n: int, dimension: float, rng: np.random.Generator
) -> Factors:
    """Draw queries and keys with entries up to 1, and values that depend on keys."""
    if family == "bounded":
        d = math.ceil(dimension * math.log(n))
        query, *keys = rng.uniform(-1, 1, (order, n, d))
    else:
        instance = _instance(family, order, n, rng)
        query, *keys = (x.astype(np.float64) for x in instance.vectors)
        keys[0] = -keys[0] if instance.seeks_orthogonal else keys[0]
    d = query.shape[1]
    # random signs would average out as n grows, and any small degree would suffice
    direction = rng.standard_normal(d)
    values = tuple(_signs((key - key.mean(axis=0)) @ direction) for key in keys)
    return Factors(query, tuple(keys), values, 1 / d)


def _signs(x: Array) -> Array:
    return np.where(x < 0, -1.0, 1.0)


def _instance(
    family: str, order: int, n: int, rng: np.random.Generator
) -> VectorInstance:
    if family == "planted":
        return orthogonal_vectors(
            n, least_dimension(n, parts=order), parts=order, rng=rng
        )
    if family == "gap":
        d = _GAP_DIMENSION * math.ceil(math.log(n))
        return gap_inner_product(n, d, parts=order, rng=rng)
    if n & (n - 1):
        raise ValueError(f"sizes: expected a power of two for satisfiability, got {n}")
    return from_cnf(random_formula(order * (n.bit_length() - 1), rng=rng), order)


@dataclass(frozen=True, slots=True, eq=False)
class _Sweep:
    """One instance, with its measurements at every entry bound."""

    family: str
    factors: Factors
    logit_range: tuple[float, float]
    errors: tuple[float, ...]
    queries: int
    largest_spectrum: int
    largest_bracket: int

    def measure(self, ratio: float) -> list[ThresholdRow]:
        """Measure at one entry bound; a row for each error."""
        (n, d), order = self.factors.query.shape, len(self.factors.keys) + 1
        exponent = ratio**order * math.log(n)
        realised = degree_errors(
            self.factors, exponent, LARGEST_DEGREE, self.queries, self.logit_range
        )
        predicted = predicted_errors(exponent, LARGEST_DEGREE)
        ranks = self.numerical_ranks(exponent)
        rows = []
        for error, (low, high) in zip(self.errors, ranks, strict=True):
            degree = least_degree(realised, error)
            formula = least_degree(predicted, error)
            rows.append(
                ThresholdRow(
                    order=order,
                    family=self.family,
                    n=n,
                    d=d,
                    ratio=ratio,
                    entry_bound=exponent ** (1 / order),
                    error=error,
                    numerical_rank=low,
                    numerical_rank_most=high,
                    degree=degree,
                    rank=rank_of_degree(d, degree),
                    predicted_degree=formula,
                    predicted_rank=rank_of_degree(d, formula),
                )
            )
        return rows

    def numerical_ranks(self, exponent: float) -> Iterable[tuple[int | None, ...]]:
        """Bounds from below and above for each error; None for matrices too large."""
        if len(self.factors.query) > max(self.largest_spectrum, self.largest_bracket):
            return [(None, None)] * len(self.errors)
        return numerical_ranks(
            self.factors, exponent, self.errors, self.largest_spectrum
        )
