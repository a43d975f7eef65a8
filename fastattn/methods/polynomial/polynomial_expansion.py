"""A polynomial expansion of softmax: coordinates, monomials, coefficients."""

import math
from dataclasses import dataclass
from typing import Any

from fastattn._ops.monomials import moments
from fastattn.certificates.log_errors import log_errors
from fastattn.certificates.rounding import frobenius
from fastattn.methods.polynomial.expansions import (
    LARGEST_DEGREE,
    IndexSet,
    rank_of,
    relative_minimax,
    taylor,
)
from fastattn.methods.polynomial.moments import Moments
from fastattn.methods.polynomial.prefixes import moments_by_prefixes
from fastattn.problem.head import Head
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, mover
from sketching._lib.certificate import RefusalError

# largest number of monomials: beyond it exact attention is much cheaper
LARGEST_RANK = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class PolynomialExpansion:
    """Coordinates, monomials and coefficients of a polynomial softmax.

    Parameters
    ----------
    transform : Transform
        Coordinates of queries and keys.
    index : IndexSet
        The monomials.
    coefficients : array, shape (g + 1,)
        Coefficients of the polynomial, lowest first.
    value_center : array, shape (p,)
        Subtracted from the values.
    dtype : dtype
        Precision of the sums.
    bound : float
        Proven bound on the largest absolute error; infinite where none is claimed.
    off : float
        Proven bound on the relative error of every row's sum of weights; infinite
        where there is none.
    """

    transform: Transform
    index: IndexSet
    coefficients: Array
    value_center: Array
    dtype: Any
    bound: float
    off: float = math.inf

    def answer(self, head: Head) -> tuple[Array, Array, Array]:
        """Sum the monomials over the keys, and compute the output of the queries."""
        if head.prefix_lengths is not None:
            return moments_by_prefixes(head, self.moments, self.coefficients)
        return self.moments(head).query(head.query, self.coefficients)

    def log_errors(self, head: Head, logarithm: Array) -> Array | None:
        """Bound the error of each row's log-sum-exp; None where there is no bound."""
        if not self.off < 1:
            return None
        center = abs(head.scale) * frobenius(self.transform.key_center)
        weights = -math.log1p(-self.off)
        return log_errors(head, logarithm, weights, self.dtype, center)

    def moments(self, head: Head) -> Moments:
        """Sum the monomials over the keys of a head."""
        return self.moments_of(head.key, head.value, head.scale)

    def moments_of(self, key: Array, value: Array, scale: float) -> Moments:
        """Sum the monomials over keys, at least one, times the values."""
        transform, index = self.transform, self.index
        move = mover(key, self.dtype)
        sums = moments(
            key,
            value,
            move(transform.key_center),
            move(transform.key_map),
            move(transform.tilt),
            move(self.value_center),
            parent=index.parent,
            coordinate=index.coordinate,
        )
        return Moments(transform, index, self.value_center, scale, sums)


def check_rank(d: int, degree: int, rank: int | None) -> None:
    """Raise ``RefusalError`` if there would be too many monomials."""
    if degree > LARGEST_DEGREE:
        raise RefusalError(
            f"degree {degree} is above {LARGEST_DEGREE}, the limit of float64"
        )
    needed = rank_of(d, degree)
    if (needed if rank is None else min(rank, needed)) > LARGEST_RANK:
        raise RefusalError(
            f"degree {degree} in {d} coordinates needs {needed} monomials, more than "
            f"{LARGEST_RANK}: lower the degree, give rank=, or use Exact()"
        )


def coefficients_of(basis: str, degree: int, bound: float) -> Array:
    """Coefficients of the Taylor or minimax polynomial up to ``bound``."""
    if basis == "taylor":
        return taylor(degree)
    return relative_minimax(degree, max(bound, 1e-3))[0]
