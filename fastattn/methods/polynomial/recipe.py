"""A low-rank softmax with every choice made, and how it is run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.certificates.log_errors import log_errors
from fastattn.certificates.rounding import frobenius
from fastattn.methods.lowrank.prefixes import moments_by_prefixes
from fastattn.methods.polynomial.expansions import (
    LARGEST_DEGREE,
    IndexSet,
    rank_of,
    relative_minimax,
    taylor,
)
from fastattn.methods.polynomial.moments import Moments
from fastattn.problem.head import Candidate, Head, Plan, host_rows
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, device_of
from sketching._lib.certificate import RefusalError

# more monomials than this are refused: exact attention is cheaper by far
LARGEST_RANK = 1 << 16
# rows that transforms and statistics are made from
SAMPLE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """Coordinates, monomials and coefficients of a polynomial softmax.

    Parameters
    ----------
    transform : Transform
        Coordinates of queries and keys.
    index : IndexSet
        The monomials.
    coefficients : array, shape (g + 1,)
        Coefficients of the polynomial, lowest first.
    middle : array, shape (p,)
        What is subtracted from the values.
    dtype : dtype
        Precision of the sums.
    bound : float
        Proven bound on the largest absolute error; infinite where none is claimed.
    off : float
        The same on the relative error of each row's sum of weights.
    """

    transform: Transform
    index: IndexSet
    coefficients: Array
    middle: Array
    dtype: Any
    bound: float
    off: float = math.inf

    def answer(self, head: Head) -> tuple[Array, Array, Array]:
        """Sum the monomials over the keys and answer the queries."""
        if head.visible is not None:
            return moments_by_prefixes(head, self.moments, self.coefficients)
        return self.moments(head).query(head.query, self.coefficients)

    def log_errors(self, head: Head, logarithm: Array) -> Array | None:
        """Bound the error of each row's log-sum-exp; None where nothing is claimed."""
        if not self.off < 1:
            return None
        center = abs(head.scale) * frobenius(self.transform.key_center)
        weights = -math.log1p(-self.off)
        return log_errors(head, logarithm, weights, self.dtype, center)

    def moments(self, head: Head) -> Moments:
        """Sum the monomials over the keys of a head."""
        return Moments.of(
            head.key,
            head.value,
            self.transform,
            self.index,
            self.middle,
            head.scale,
            self.dtype,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """A method with every choice made, ready to answer the queries of its head.

    Parameters
    ----------
    plan : Plan
        What will run.
    run : callable
        From a head to values, log-sum-exps, whether each row can be trusted and, where
        the method knows, how the squares of the rows' errors are guessed to compare.
    bound : float
        Proven bound on the largest absolute error; infinite where none is claimed.
    again : callable, optional
        From a factor to an attempt with that many times the error.
    limit : float
        The same where it is not the certificate, which is to be relative to the answer,
        but may serve to make it.
    rounding : callable, optional
        From a head to the deviation of the error of each row's logits, where all are
        rounded; another attempt of the same kind would then err alike.
    log_errors : callable, optional
        From a head and its log-sum-exps to bounds on their errors.
    """

    plan: Plan
    run: Callable[[Head], tuple[Array, ...]]
    bound: float
    again: "Callable[[float], Attempt] | None" = None
    limit: float = math.inf
    rounding: Callable[[Head], Array] | None = None
    log_errors: Callable[[Head, Array], Array | None] | None = None


def run_proven(head: Head, attempt: Attempt) -> tuple[Array, Array]:
    """Answer all queries by the attempt alone: for a bound that covers every row."""
    value, normalizer, good, *_ = attempt.run(head)
    if not bool(head.xp.all(good)):
        raise RefusalError(
            "a sum of weights is not positive although the bound says so: the inputs "
            "are too extreme for this precision; use Exact()"
        )
    return head.finish(value, normalizer)


def candidate_of(method: Any, plan: Callable[[], Plan]) -> Candidate:
    """Say what a method plans to run, or why it would be refused."""
    try:
        return Candidate(plan(), accepted=True)
    except RefusalError as error:
        return Candidate(Plan(method, math.nan, math.nan, str(error)), accepted=False)


def mend(
    head: Head, value: Array, normalizer: Array, rows: Array, dtype: Any = None
) -> tuple[Array, Array]:
    """Replace the rows of the given numbers by exact ones, computed in ``dtype``."""
    xp, n = head.xp, head.sizes[0]
    # special tokens come as many equal rows
    first, copies = _distinct(head, rows)
    exact, logarithm = head.with_rows(first).attend(dtype)
    copies = xp.asarray(copies, device=device_of(value))
    exact, logarithm = (xp.take(x, copies, axis=0) for x in (exact, logarithm))
    exact = xp.astype(exact, value.dtype, copy=False)
    logarithm = xp.astype(logarithm, normalizer.dtype, copy=False)
    if head.has_fast_body:
        value[rows], normalizer[rows] = exact, logarithm
        return value, normalizer
    # array libraries agree on take, not on writing: gather from old rows and new ones
    source = np.arange(n)
    source[rows] = n + np.arange(len(rows))
    take = xp.asarray(source, device=device_of(value))
    return (
        xp.take(xp.concat([value, exact]), take, axis=0),
        xp.take(xp.concat([normalizer, logarithm]), take, axis=0),
    )


def _distinct(head: Head, rows: Array) -> tuple[Array, Array]:
    """Numbers of rows that differ, and for each of ``rows`` which of them it equals."""
    if head.visible is not None:
        return rows, np.arange(len(rows))
    _, first, copies = np.unique(
        host_rows(head.query, rows), axis=0, return_index=True, return_inverse=True
    )
    return rows[first], copies.reshape(-1)


def sample_rows(
    head: Head, rng: np.random.Generator, size: int = SAMPLE
) -> tuple[Array, Array]:
    """Return up to so many random queries and keys on the host."""
    n, m, _, _ = head.sizes
    return (
        host_rows(head.query, _draw(n, size, rng)),
        host_rows(head.key, _draw(m, size, rng)),
    )


def _draw(count: int, size: int, rng: np.random.Generator) -> Array:
    """Row numbers of a sample without replacement, in order."""
    if count <= size:
        return np.arange(count)
    return np.sort(rng.choice(count, size=size, replace=False))


def check_rank(d: int, degree: int, rank: int | None) -> None:
    """Raise ``RefusalError`` if the monomials would be too many to sum."""
    if degree > LARGEST_DEGREE:
        raise RefusalError(
            f"degree {degree} is above {LARGEST_DEGREE}, where float64 ends"
        )
    needed = rank_of(d, degree)
    if (needed if rank is None else min(rank, needed)) > LARGEST_RANK:
        raise RefusalError(
            f"degree {degree} in {d} coordinates needs {needed} monomials, more than "
            f"{LARGEST_RANK}: lower the degree, give rank=, or use Exact()"
        )


def coefficients_of(basis: str, degree: int, bound: float) -> Array:
    """Coefficients of a polynomial of exp that needs no sample of logits."""
    if basis == "taylor":
        return taylor(degree)
    return relative_minimax(degree, max(bound, 1e-3))[0]
