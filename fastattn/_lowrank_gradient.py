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
    marked,
    spread,
    take,
)
from fastattn._causal_gradient import causal_slopes
from fastattn._causal_plan import leniency, lowrank_cost
from fastattn._exact_gradient import vjp_work
from fastattn._frame import Frame, Sample
from fastattn._lowrank import LowRank
from fastattn._lowrank_passes import key_slopes, query_slopes
from fastattn._problem import Head
from fastattn._sampling import hardest_rows
from fastattn._sizes import predict
from fastattn.expansions import rank_of
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError

# heads with fewer logits than this are differentiated exactly: planning costs as much
_SMALL = 1 << 24
# time of the passes of a derivative and its answer, in times of the answer alone
_PASSES = 3.1
# error of the answer over that of its derivatives, in standard deviations of a logit:
# 1/sqrt(g + 1) for Hermite polynomials up to degree g of normal logits, here g = 2
_LOST = 3.0**-0.5
# the share of what that allows which is aimed at: pilots show the answer's error only
_AIM = 0.7
# tolerances that leave room for products of eight bits
_COARSE_ENOUGH = 0.005
# share of the rows that may be done exactly because they are out of reach
_MENDED = 0.02
# tries, how far the first may miss, and what is left to the second
_TRIES = 2
_HOPELESS, _TIGHTER = 1.6, 0.7


def lowrank_slopes(
    head: Head,
    grad: Array,
    empty: LowRank,
    rng: np.random.Generator,
    enough: float = 0.0,
) -> tuple[Slopes, float]:
    """Differentiate a head over the basis of an empty structure, and check.

    The check is content with few rows where they show an error below ``enough``.

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
    n, hard = head.sizes[0], hardest_rows(head, rng)
    skip = marked(hard, head.query)
    if head.visible is None:
        slopes, state = _slopes(head, grad, empty, skip)
    else:
        slopes, state = causal_slopes(head, grad, empty, skip)
    settled = np.flatnonzero(to_host(state.normalizer) == math.inf)
    if len(settled) > _MENDED * n + len(hard):
        raise RefusalError(
            f"Polynomial(rank={empty.rank}, landmarks={empty.landmarks}) fails in "
            f"{len(settled)} of {n} rows, where its sum of weights is too small to be "
            "true: the logits reach beyond what it serves"
        )
    state = state.with_exact(settled)
    slopes = state.mended(slopes, settled)
    return slopes, state.error(slopes, settled, rng, enough)


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
    aim, structures = _AIM, first
    for _ in range(_TRIES):
        least = math.inf
        for empty in structures:
            try:
                some = replace(empty, coarse=tol >= _COARSE_ENOUGH)
                slopes, error = lowrank_slopes(head, grad, some, rng, SLACK * tol)
            except RefusalError:
                return None
            if error <= SLACK * tol:
                return slopes
            least = min(least, error)
        if not least <= _HOPELESS * SLACK * tol:
            return None
        # what the derivatives lacked says how much more to ask for
        aim *= _TIGHTER * SLACK * tol / least
        structures = worth_a_try(head, tol, rng, aim)
    return None


def worth_a_try(
    head: Head, tol: float, rng: np.random.Generator, aim: float = _AIM
) -> list[LowRank]:
    """List polynomials whose derivatives may meet ``3 * tol`` and should pay.

    Landmarks hardly ever do: they are fitted to queries, and derivatives by keys err
    about as much however many there are.
    """
    if head.logits < _SMALL:
        return []
    limit, work = WORTH * vjp_work(head, tol), lowrank_cost(head)

    def cost(rank: int, landmarks: int) -> float:
        return _PASSES * work(rank, landmarks)

    try:
        # pilots see all keys; rows that see some may err by so many times more
        factor = 1.0 if head.visible is None else leniency(head, rng)
        whole = head.unmasked()
        sample = Sample.of(whole, rng)
        deviation = math.sqrt(float(Frame.of(sample).spread.sum()))
        wanted = aim * tol * min(1.0, SLACK * _LOST * deviation)
        found = predict(whole, sample, factor * wanted, rng, cost, limit)
        structures = [x.empty for x in found if x.accepted and x.empty is not None]
        if structures:
            return [x for x in structures if not x.landmarks]
        # a degree that the answer has in part may be what the derivatives lack
        found = predict(whole, sample, factor * tol, rng, cost, limit)
        ranks = [
            _whole_degree(head.sizes[2], x.rank)
            for x in found
            if x.accepted and not x.landmarks
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
    cost = lowrank_cost(head)
    work = [cost(x.rank, x.landmarks) for x in structures]
    return _PASSES * min(work) / exact_vjp_work(head)


def _whole_degree(d: int, rank: int) -> int:
    """The number of monomials of the least degree that has so many."""
    return next(size for g in range(rank + 1) if (size := rank_of(d, g)) >= rank)


def _slopes(
    head: Head, grad: Array, empty: LowRank, hard: Array
) -> tuple[Slopes, Backward]:
    """Do as ``causal_slopes`` where rows see all keys."""
    xp, m = head.xp, head.sizes[1]
    structure, far = empty.filled(head.key, head.value)
    keys = np.flatnonzero(to_host(far))
    alone = replace(head, key=take(head.key, keys), value=take(head.value, keys))
    answer, normalizer = alone.attend()
    query, sums, normalizer, drift = query_slopes(
        head,
        grad,
        structure,
        xp.where(hard, xp.inf, normalizer),
        xp.sum(grad * answer, axis=1),
        head.scale * structure.basis.frame.center,
    )
    state = Backward(head, grad, normalizer, drift)
    key, value = key_slopes(head.key, head.value, far, structure, sums)
    if not len(keys):
        return (query, key, value), state
    more = state.exact(None, keys)
    key, value = key + spread(more[1], keys, m), value + spread(more[2], keys, m)
    return (query + more[0], key, value), state
