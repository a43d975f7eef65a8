"""A low-rank softmax with every choice made, and how it is run."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._moments import Moments
from fastattn._problem import Head, host_rows
from fastattn.expansions import IndexSet, rank_of, relative_minimax, taylor
from fastattn.transforms import Transform
from sketching._lib.arrays import Array, device_of, to_host
from sketching._lib.certificate import RefusalError

# more monomials than this are refused: exact attention is cheaper by far
LARGEST_RANK = 1 << 16
# rows that transforms and statistics are made from
SAMPLE = 4096
# share of rows that may be computed exactly because their denominator failed
_MENDED = 0.02


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
    predicted_error : float
        Relative Frobenius error expected from a sample; NaN where not predicted.
    """

    transform: Transform
    index: IndexSet
    coefficients: Array
    middle: Array
    dtype: Any
    bound: float
    predicted_error: float

    def prepare(self, head: Head) -> Moments:
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


def run(head: Head, recipe: Recipe, prepared: Moments) -> tuple[Array, Array]:
    """Answer all queries; a few rows with failed denominators are computed exactly.

    Raises
    ------
    RefusalError
        If the denominators of more than two per cent of the rows fail.
    """
    xp, n = head.xp, head.sizes[0]
    value, normalizer, positive = prepared.query(head.query, recipe.coefficients)
    failed = n - int(xp.sum(xp.astype(positive, xp.int64)))
    if failed > _MENDED * n:
        raise RefusalError(
            f"the polynomial's sum of weights is not positive in {failed} of {n} rows: "
            "the logits reach beyond the interval that its degree serves"
        )
    if failed:
        value, normalizer = _mend(head, value, normalizer, to_host(positive))
    return head.finish(value, normalizer)


def _mend(
    head: Head, value: Array, normalizer: Array, positive: Array
) -> tuple[Array, Array]:
    """Replace the rows that are not ``positive`` by exact ones."""
    xp = head.xp
    rows = np.flatnonzero(~positive)
    exact, logarithm = head.with_rows(rows).attend()
    # gather from old rows and new ones: array libraries agree on take, not on writing
    source = np.arange(len(positive))
    source[rows] = len(positive) + np.arange(len(rows))
    take = xp.asarray(source, device=device_of(value))
    exact = xp.astype(exact, value.dtype, copy=False)
    logarithm = xp.astype(logarithm, normalizer.dtype, copy=False)
    return (
        xp.take(xp.concat([value, exact]), take, axis=0),
        xp.take(xp.concat([normalizer, logarithm]), take, axis=0),
    )


def sample_rows(head: Head, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return up to 4096 random queries and keys on the host."""
    n, m, _, _ = head.sizes
    return (
        host_rows(head.query, _draw(n, SAMPLE, rng)),
        host_rows(head.key, _draw(m, SAMPLE, rng)),
    )


def _draw(count: int, size: int, rng: np.random.Generator) -> Array:
    """Row numbers of a sample without replacement, in order."""
    if count <= size:
        return np.arange(count)
    return np.sort(rng.choice(count, size=size, replace=False))


def check_rank(d: int, degree: int, rank: int | None) -> None:
    """Raise ``RefusalError`` if the monomials would be too many to sum."""
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
