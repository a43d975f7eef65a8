"""The least degree and precision of a polynomial with a proven bound.

For pairs of a query and a key, and for tuples of keys.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastattn.methods.polynomial.expansions import (
    LARGEST_BOUND,
    LARGEST_DEGREE,
    least_degree,
    rank_of,
)
from fastattn.methods.polynomial.polynomial_expansion import check_rank
from fastattn.problem.head import AttentionHead
from sketching._lib.certificate import RefusalError

# least half width of the interval of the logits
NARROWEST = 1e-3


class _Bounded(Protocol):
    """An expansion with a bound on its error."""

    @property
    def bound(self) -> float: ...


_Bound = TypeVar("_Bound", bound=_Bounded)


def least_proven(
    make: Callable[[int, Any], _Bound],
    head: AttentionHead,
    tol: float,
    limits: tuple[float, float],
    where: str,
    *,
    degree: int | None,
    rank: int | None,
) -> _Bound:
    """Find the least degree and precision whose proven bound meets ``tol``.

    Parameters
    ----------
    make : callable
        The expansion of a degree in a dtype, with its bound.
    head : AttentionHead
        The head; only its sizes and dtypes are used.
    tol : float
        Tolerance, in units of half the range of the values.
    limits : pair of float
        Half the width of the interval of the logits, and half the range of the values.
    where : str
        Names the interval in refusals.
    degree, rank : int, optional
        Degree and number of monomials, if given.

    Raises
    ------
    RefusalError
        If there is none; with the interval, the degree and the rank.
    """
    bound, half = limits
    if not bound <= LARGEST_BOUND:
        raise RefusalError(
            f"{where} are wider than +-{LARGEST_BOUND:g}: no degree up to "
            f"{LARGEST_DEGREE} suffices; scale the inputs down, or use Exact()"
        )
    first = least_degree(bound, tol / (1 + tol)) if degree is None else degree
    if first is None:
        raise RefusalError(
            f"tol={tol:g} needs a degree above {LARGEST_DEGREE} for {where}: raise "
            "tol, scale the inputs down, or use Exact()"
        )
    last = min(first + 2, LARGEST_DEGREE) if degree is None else degree
    best, d = math.inf, head.sizes[2]
    for g in range(first, last + 1):
        check_rank(d, g, rank)
        for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
            expansion = make(g, dtype)
            constant = half == 0 and math.isfinite(expansion.bound)
            if expansion.bound <= tol * half or constant:
                return expansion
            best = min(best, expansion.bound)
    raise RefusalError(
        f"tol={tol:g} cannot be proven: {where}, degree {last}, rank "
        f"{rank or rank_of(d, last)} are proven to {best:.1e} where the half range of "
        f"the values is {half:.1e}; raise tol, degree or rank, or use Exact()"
    )
