"""The derivative of attention by a low rank: that of the low-rank sums themselves.

With the weights ``P`` written in functions of queries and keys, ``dS = P * (grad V^T -
drift)`` is never formed: one pass over queries, one over keys, and between them a sum
of one number for each function and value column. The derivative of a polynomial of
degree g has degree g - 1, so that derivatives by query and key err more than the answer
does. Queries that the low rank does not serve, and far keys, are exact.
"""

import math
from dataclasses import replace

import numpy as np

from fastattn._backward import (
    SLACK,
    WORTH,
    Backward,
    Slopes,
    exact_vjp_work,
    spread,
)
from fastattn._costs import lowrank_work
from fastattn._frame import Frame, Sample
from fastattn._lowrank import LowRank
from fastattn._ops.lowrank_gradient import key_vjp, query_vjp
from fastattn._problem import Head
from fastattn._recipes import run_mended
from fastattn._sampling import hardest_rows
from fastattn._sizes import predict
from fastattn.expansions import rank_of
from fastattn.polynomial import lowrank_attempt
from sketching._lib.arrays import Array, mover, to_host
from sketching._lib.certificate import RefusalError

# heads with fewer logits than this are differentiated exactly: planning costs as much
_SMALL = 1 << 24
# time of the passes of a derivative and its answer, in times of the answer alone
_PASSES = 3.5
# error of the answer over that of its derivatives, in standard deviations of a logit:
# 1/sqrt(g + 1) for Hermite polynomials up to degree g of normal logits, here g = 2
_LOST = 3.0**-0.5
# the share of what that allows which is aimed at: pilots show the answer's error only
_AIM = 0.7
# tries, how far the first may miss, and what is left to the second
_TRIES = 2
_HOPELESS, _TIGHTER = 3.0, 0.7


def lowrank_slopes(
    head: Head, grad: Array, empty: LowRank, rng: np.random.Generator
) -> tuple[Slopes, float]:
    """Differentiate a head over the basis of an empty structure, and check.

    Returns
    -------
    slopes : tuple of array
        Derivatives by query, key and value.
    error : float
        The largest of their relative Frobenius errors on sampled rows.

    Raises
    ------
    RefusalError
        If the low rank fails in too many rows, or sums overflow.
    """
    xp, m = head.xp, head.sizes[1]
    structure, far = empty.filled(head.key, head.value)
    attempt = lowrank_attempt(head, empty, math.nan, "derivative")
    attempt = replace(attempt, run=lambda some: structure.query(some.query))
    value, normalizer, settled = run_mended(head, attempt, hardest_rows(head, rng))
    drift = xp.sum(grad * xp.astype(value, grad.dtype, copy=False), axis=1)
    whole = Backward(head, grad, normalizer, drift)
    rest = whole.without(settled)
    query, key, values = whole.mended(_near(rest, structure, far), settled)
    if bool(xp.any(far)):
        keys = np.flatnonzero(to_host(far))
        extra = rest.exact(None, keys)
        query, key = query + extra[0], key + spread(extra[1], keys, m)
        values = values + spread(extra[2], keys, m)
    slopes = query, key, values
    return slopes, whole.error(slopes, settled, rng)


def slopes_if_they_pay(
    head: Head,
    grad: Array,
    tol: float,
    rng: np.random.Generator,
    first: list[LowRank],
) -> Slopes | None:
    """Differentiate by a low rank that pays and meets ``3 * tol``, if there is one.

    The ``first`` to be tried are what ``worth_a_try`` lists.
    """
    aim = _AIM
    for number in range(_TRIES):
        least = math.inf
        for empty in worth_a_try(head, tol, rng, aim) if number else first:
            try:
                slopes, error = lowrank_slopes(head, grad, empty, rng)
            except RefusalError:
                return None
            if error <= SLACK * tol:
                return slopes
            least = min(least, error)
        if not least <= _HOPELESS * SLACK * tol:
            return None
        # what the derivatives lacked says how much more to ask for
        aim *= _TIGHTER * SLACK * tol / least
    return None


def worth_a_try(
    head: Head, tol: float, rng: np.random.Generator, aim: float = _AIM
) -> list[LowRank]:
    """List low ranks whose derivatives may meet ``3 * tol`` and should pay."""
    n, m, d, p = head.sizes
    if head.visible is not None or n * m < _SMALL:
        return []
    limit = WORTH * exact_vjp_work(head)

    def cost(rank: int, landmarks: int) -> float:
        return _PASSES * lowrank_work(n, m, d, p, rank, landmarks)

    try:
        sample = Sample.of(head, rng)
        deviation = math.sqrt(float(Frame.of(sample).spread.sum()))
        wanted = aim * tol * min(1.0, SLACK * _LOST * deviation)
        found = predict(head, sample, wanted, rng, cost, limit)
        structures = [x.empty for x in found if x.accepted and x.empty is not None]
        if structures:
            return structures
        # a degree that the answer has in part may be what the derivatives lack
        found = predict(head, sample, tol, rng, cost, limit)
        ranks = [
            _whole_degree(d, x.rank) for x in found if x.accepted and not x.landmarks
        ]
        return [
            LowRank.plan(sample, rank=rank, landmarks=0, rng=rng)
            for rank in ranks
            if cost(rank, 0) <= limit
        ]
    except RefusalError:
        return []


def least_share(head: Head, structures: list[LowRank]) -> float:
    """The least share of the exact time that a low rank takes; 1 if there is none."""
    if not structures:
        return 1.0
    work = [lowrank_work(*head.sizes, x.rank, x.landmarks) for x in structures]
    return _PASSES * min(work) / exact_vjp_work(head)


def _whole_degree(d: int, rank: int) -> int:
    """The number of monomials of the least degree that has so many."""
    return next(size for g in range(rank + 1) if (size := rank_of(d, g)) >= rank)


def _near(state: Backward, structure: LowRank, far: Array) -> Slopes:
    """Differentiate what the rows make of the keys that are not far."""
    head, basis = state.head, structure.basis
    xp, frame, recipe = head.xp, basis.frame, basis.hermite.recipe
    move = mover(head.query, head.dtype)
    middle = move(structure.middle)
    query, sums = query_vjp(
        head.query,
        state.grad,
        # values are summed less their middle
        state.drift - xp.matmul(state.grad, middle),
        state.normalizer + frame.offset,
        move(frame.to_query),
        move(frame.origin),
        move(basis.landmarks),
        move(structure.weights),
        **recipe,
    )
    # the projection onto the basis is symmetric: it serves both sides
    key, value = key_vjp(
        head.key,
        head.value,
        far,
        move(frame.center),
        move(frame.to_key),
        move(basis.landmarks),
        middle,
        move(basis.project(to_host(sums))),
        offset=frame.offset,
        **recipe,
    )
    return query, key, value
