r"""Gradients of low-rank attention.

With weights :math:`P_{ij} \propto \phi(q_i) \cdot \phi(k_j)`, the matrix :math:`dS = P
\circ (G V^\top - \delta 1^\top)` is never formed: there is one pass over the queries
and one over the keys, and between them sums of shape :math:`(r, p + 1)`. The derivative
of a polynomial of degree :math:`g` has degree :math:`g - 1`, so that the gradients of
queries and keys have larger relative errors than the output. Rows that the low rank
cannot approximate, and far keys, are exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.gradients.backward import SLACK, exact_vjp_work
from fastattn.gradients.exact import vjp_work
from fastattn.gradients.first_chunk import first_chunk
from fastattn.gradients.lowrank_causal import causal_vjp
from fastattn.gradients.lowrank_passes import whole_vjp
from fastattn.methods.lowrank.causal_cost import (
    causal_tolerance_factor,
    chunk_work,
    lowrank_cost,
)
from fastattn.methods.lowrank.rank_search import search_ranks
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.methods.polynomial.expansions import rank_of
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head
from fastattn.problem.row_statistics import high_variance_rows
from fastattn.problem.rows import row_mask
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class VjpCandidate:
    """A low-rank basis for the gradients, without keys.

    ``first`` is the number of keys of the first chunk of a causal head; None for the
    default.
    """

    empty: LowRank
    first: int | None = None

    def work(self, head: Head, tol: float) -> float:
        """Predicted work, in units of ``exact_vjp_work``."""
        return _cost(head, tol, self.first)(self.empty.rank, self.empty.landmarks)


def _cost(
    head: Head, tol: float, first: int | None = None
) -> Callable[[int, int], float]:
    """The work of the gradients as a function of rank and number of landmarks."""
    policy = POLICY.gradients
    cost, more = lowrank_cost(head, first), 0.0
    if head.prefix_lengths is not None:
        exact = chunk_work(head, first)[1]
        slower = vjp_work(head, tol) / exact_work(*head.sizes, logits=head.logits)
        more = (slower - policy.passes) * exact + policy.second_try
    return lambda rank, landmarks: policy.passes * cost(rank, landmarks) + more


def lowrank_vjp(
    head: Head,
    grad: Array,
    empty: LowRank,
    rng: np.random.Generator,
    enough: float = 0.0,
    first: int | None = None,
) -> tuple[Gradients, float]:
    """Low-rank gradients of a head, with an estimate of their error.

    Parameters
    ----------
    head, grad : Head, array of shape (n, p)
        The head, and the gradient of the loss with respect to its output.
    empty : LowRank
        The basis, without keys.
    rng : Generator
        Source of the samples.
    enough : float
        An error below which a smaller sample suffices.
    first : int or None
        Number of keys of the first chunk of a causal head; None for the default.

    Returns
    -------
    gradients : tuple of array
        With respect to query, key and value.
    error : float
        The largest of their relative Frobenius errors on sampled rows.

    Raises
    ------
    RefusalError
        If the low rank fails in too many rows, or sums overflow.
    """
    n, outlier_rows = head.sizes[0], high_variance_rows(head, rng)
    skip = row_mask(outlier_rows, head.query)
    if head.prefix_lengths is None:
        gradients, state = whole_vjp(head, grad, empty, skip)
        error_profile = gradients
    else:
        gradients, state, error_profile = causal_vjp(head, grad, empty, skip, first)
    exact_rows = np.flatnonzero(to_host(state.normalizer) == math.inf)
    if len(exact_rows) > POLICY.gradients.most_recomputed * n + len(outlier_rows):
        raise RefusalError(
            f"Polynomial(rank={empty.rank}, landmarks={empty.landmarks}) fails in "
            f"{len(exact_rows)} of {n} rows, where its sum of weights is below a lower "
            "bound: their logits are too large for this rank"
        )
    state = state.with_exact(exact_rows)
    gradients = state.with_recomputed(gradients, exact_rows)
    return gradients, state.error(gradients, exact_rows, rng, enough, error_profile)


def lowrank_vjp_if_faster(
    head: Head,
    grad: Array,
    tol: float,
    rng: np.random.Generator,
    first: list[VjpCandidate],
) -> Gradients | None:
    """Low-rank gradients if these are faster and meet ``3 * tol``, else None.

    ``first`` are the candidates that ``worth_a_try`` lists.
    """
    policy = POLICY.gradients
    aim, candidates = policy.aim, first
    for _ in range(policy.tries):
        least = math.inf
        for candidate in candidates:
            try:
                some = replace(
                    candidate.empty, low_precision=tol >= policy.low_precision_tol
                )
                gradients, error = lowrank_vjp(
                    head, grad, some, rng, SLACK * tol, candidate.first
                )
            except RefusalError:
                return None
            if error <= SLACK * tol:
                return gradients
            least = min(least, error)
        if not least <= policy.hopeless * SLACK * tol:
            return None
        # tighten by the factor by which the gradients missed
        aim *= policy.tighter * SLACK * tol / least
        candidates = worth_a_try(head, grad, tol, rng, aim)
    return None


def worth_a_try(
    head: Head,
    grad: Array,
    tol: float,
    rng: np.random.Generator,
    aim: float | None = None,
) -> list[VjpCandidate]:
    """List low ranks predicted to be faster, with gradients that meet ``3 * tol``.

    Landmarks are listed only after a long first chunk of a causal head: gradients of
    keys have a relative error near one half however many landmarks there are
    (``first_chunk``).
    """
    policy = POLICY.gradients
    if head.logits < policy.few_logits:
        return []
    aim = policy.aim if aim is None else aim
    limit, cost = POLICY.time_share * vjp_work(head, tol), _cost(head, tol)

    try:
        whole = head.unmasked()
        sample = PlanningSample.of(whole, rng)
        whitening = Whitening.fit(sample)
        variance = float(whitening.spread.sum())
        if not variance <= POLICY.low_rank.largest_variance:
            return []
        search = partial(search_ranks, whitening=whitening, landmarks=False)
        # pilot runs have no causal mask, under which errors are larger by this factor
        factor = (
            1.0 if head.prefix_lengths is None else causal_tolerance_factor(head, rng)
        )
        wanted = aim * tol * min(1.0, SLACK * policy.order_loss * math.sqrt(variance))
        (found,) = search(whole, sample, factor * wanted, rng, cost, limit)
        if found.accepted and found.empty is not None:
            return [VjpCandidate(found.empty)]
        if head.prefix_lengths is not None and head.logits >= policy.many_logits:
            marks = LowRank.plan(sample, rank=1, landmarks=policy.landmarks, rng=rng)
            careful = policy.careful * aim * SLACK * tol
            longer = VjpCandidate(marks, first_chunk(head, grad, marks, careful, rng))
            if longer.first is not None and longer.work(head, tol) <= limit:
                return [longer]
        # the gradients may need all monomials of a degree that the output has in part
        (found,) = search(whole, sample, factor * tol, rng, cost, limit)
        rank = _whole_degree(head.sizes[2], found.rank)
        if not found.accepted or cost(rank, 0) > limit:
            return []
        return [VjpCandidate(LowRank.plan(sample, rank=rank, landmarks=0, rng=rng))]
    except RefusalError:
        return []


def least_share(head: Head, tol: float, candidates: list[VjpCandidate]) -> float:
    """The least time of low-rank or bfloat16 gradients, as a share of exact ones."""
    work = [vjp_work(head, tol), *(x.work(head, tol) for x in candidates)]
    return min(work) / exact_vjp_work(head)


def _whole_degree(d: int, rank: int) -> int:
    """The number of monomials of the least degree that has so many."""
    return next(size for g in range(rank + 1) if (size := rank_of(d, g)) >= rank)
