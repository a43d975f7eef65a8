"""The choice of the structure of a prepared head, and its first insertion."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import MAX_BLOCKS, with_room
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work, lowrank_work, polynomial_work
from fastattn.methods.exact import Exact
from fastattn.methods.lowrank.rank_search import RankEstimate, search_ranks
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.multipole.method import Multipole
from fastattn.methods.polynomial.method import Polynomial
from fastattn.methods.polynomial.polynomial_expansion import PolynomialExpansion
from fastattn.planning.auto import Auto
from fastattn.prepared.clusters.head import MultipoleHead
from fastattn.prepared.heads import ExactHead, StateHead, refused_share
from fastattn.prepared.held_out import MARGIN, MARGINS, HeldOutQueries, QuerySplit
from fastattn.prepared.kv_buffer import KVBuffer
from fastattn.prepared.protocol import PreparedHead
from fastattn.prepared.proven import ProvenHead
from fastattn.prepared.states import KeyValueState, LowRankState, MonomialState
from fastattn.problem.head import Head
from fastattn.problem.plan import Plan
from sketching._lib.arrays import Array, device_of
from sketching._lib.certificate import RefusalError

_NO_KEY = "no key to plan with"

Fill = Callable[[PreparedHead], PreparedHead]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """The task of one head, and a way to fill the planned structure.

    Parameters
    ----------
    head : Head
        Queries like those to come; the keys and values, or a sample of them.
    fill : callable
        Inserts the keys and values into an empty structure.
    count : int
        Number of keys.
    tol : float
        The tolerance.
    guarantee : str
        "sampled" or "proven".
    """

    head: Head
    fill: Fill
    count: int
    tol: float
    guarantee: str


@singledispatch
def prepare_head(method: Any, *_: Any) -> PreparedHead:
    """Plan and fill a structure that meets the tolerance, or raise RefusalError.

    A method is registered with a function of the method, a :class:`Request` and a
    random generator.
    """
    raise TypeError(
        f"method: {method!r} cannot be prepared: expected Auto(), Exact(), "
        "Multipole(), Polynomial() or None"
    )


@prepare_head.register
def _prepare_exact(
    method: Exact, request: Request, rng: np.random.Generator
) -> PreparedHead:
    return _exact(request, method, "requested", rng)


@prepare_head.register
def _prepare_polynomial(
    method: Polynomial, request: Request, rng: np.random.Generator
) -> PreparedHead:
    if request.count == 0:
        return _exact(request, Exact(), _NO_KEY, rng)
    if request.guarantee == "proven":
        return request.fill(_proven(request, method, rng))
    return _polynomial(request, method, rng)


@prepare_head.register
def _prepare_multipole(
    method: Multipole, request: Request, rng: np.random.Generator
) -> PreparedHead:
    if request.count == 0:
        return _exact(request, Exact(), _NO_KEY, rng)
    # the given queries stand for those to come
    configured = method.configure(request.head, request.tol, request.guarantee, rng)
    head, sample = request.head, _sample(request.head, rng)
    empty = MultipoleHead.of(configured.plan, head, sample, request.tol, rng)
    return request.fill(empty)


@prepare_head.register
def _prepare_cheapest(
    _method: Auto, request: Request, rng: np.random.Generator
) -> PreparedHead:
    """The cheapest state that meets the tolerance, else a KV buffer."""
    if request.count == 0:
        return _exact(request, Exact(), _NO_KEY, rng)
    reason = "nothing cheaper meets the tolerance"
    if request.guarantee == "proven":
        try:
            empty = _proven(request, Polynomial(), rng)
            share = empty.plan.work / _exact_work(request)
            if share <= POLICY.time_share:
                return request.fill(empty)
            reason = f"{empty.plan.method} takes {share:.1f} times as long"
        except RefusalError as error:
            reason = str(error)
        return _exact(request, Exact(), reason, rng)
    split = QuerySplit.of(request.head, rng)
    head, aim = replace(request.head, query=split.rest), request.tol
    for margin in MARGINS:
        if request.head.sizes[0] < POLICY.prepared.fewest_queries:
            reason = f"{request.head.sizes[0]} queries are too few to plan with"
            break
        found = _rank_estimate(request, head, aim, rng)
        if found.empty is None or not found.accepted:
            reason = found.reason
            break
        plan = _lowrank_plan(
            head, found.rank, found.landmarks, found.error,
            "predicted to meet the tolerance",
        )  # fmt: skip
        filled = _filled(request, plan, LowRankState(found.empty), split, margin)
        upper, refused = filled.held_out.error().upper, refused_share(filled)
        if upper <= request.tol and not refused:
            return filled
        reason = f"{plan.method} certified {upper:.2e} and refused {refused:.0%}"
        # tighten by the error that the next sampling round would certify
        again = replace(filled.held_out, margin=MARGINS[-1]).error().upper
        if refused or not math.isfinite(again):
            break
        aim *= POLICY.prepared.retarget * request.tol / again
    return _exact(request, Exact(), reason, rng)


def _sample(head: Head, rng: np.random.Generator) -> Array:
    """Queries for the ``certificate`` of a structure that has its keys."""
    return head.with_rows(
        np.sort(rng.permutation(head.sizes[0])[: POLICY.prepared.held_out])
    ).query


def _exact(
    request: Request, method: Exact, reason: str, rng: np.random.Generator
) -> PreparedHead:
    """A KV buffer with all keys."""
    head = request.head
    plan = Plan(method, 0.0, _exact_work(request), reason)
    buffer = KVBuffer.none(head.key, head.value)
    return request.fill(ExactHead(plan, head.scale, buffer, _sample(head, rng)))


def _proven(
    request: Request, method: Polynomial, rng: np.random.Generator
) -> ProvenHead:
    """The proven polynomial of least degree, for queries up to a tenth larger."""
    head = replace(request.head, query=with_room(request.head.query))
    expansion = method.expansion(head, request.tol, "proven", rng, MAX_BLOCKS)
    return ProvenHead.of(
        _plan_of(head, expansion, "minimax", "requested"), expansion, head
    )


def _polynomial(
    request: Request, method: Polynomial, rng: np.random.Generator
) -> StateHead:
    """The state of the given method; raise RefusalError if it misses the tolerance."""
    policy = POLICY.prepared
    split = QuerySplit.of(request.head, rng)
    head = replace(request.head, query=split.rest)
    if request.head.sizes[0] < policy.fewest_queries:
        raise RefusalError(
            f"queries: {request.head.sizes[0]} are too few to plan with and to certify "
            f"by: give {policy.fewest_queries} or more, or use Exact()"
        )
    state: KeyValueState
    if method.fits_a_basis:
        empty = method.structure(head, rng)
        state = LowRankState(empty)
        plan = _lowrank_plan(head, empty.rank, empty.landmarks, math.nan, "requested")
    else:
        expansion = method.expansion(head, request.tol, "sampled", rng)
        state = MonomialState.of(expansion, head.scale)
        plan = _plan_of(head, expansion, method.basis, "requested")
    found = _filled(request, plan, state, split, MARGIN)
    error, refused = found.held_out.error(), refused_share(found)
    if refused > policy.refused:
        raise RefusalError(
            f"{plan.method} refuses {refused:.0%} of the held-out queries, whose "
            "logits are too large for it: use Exact() or Auto()"
        )
    if error.upper > request.tol:
        raise RefusalError(
            f"{plan.method} misses tol={request.tol:g}: {error.upper:.2e} is certified "
            f"({error.source}); raise tol, degree or rank, or use Auto()"
        )
    estimate = plan.predicted_error
    estimate = error.estimate if math.isnan(estimate) else estimate
    return replace(found, plan=replace(plan, predicted_error=estimate))


def _rank_estimate(
    request: Request, head: Head, aim: float, rng: np.random.Generator
) -> RankEstimate:
    """The cheapest low rank, or the best one with the reason why it is refused."""
    _, _, d, p = head.sizes
    xp, rows = head.xp, np.arange(POLICY.prepared.queries) % head.sizes[0]
    # the rank is chosen for the cost of a query, however few queries are given
    many = xp.take(head.query, xp.asarray(rows, device=device_of(head.query)), axis=0)
    try:
        found = search_ranks(
            replace(head, query=many),
            PlanningSample.of(head, rng),
            aim,
            rng,
            lambda rank, landmarks: lowrank_work(1, 0, d, p, rank, landmarks),
            POLICY.time_share * _exact_work(request),
        )
    except RefusalError as error:
        return RankEstimate(1, 0, math.inf, math.inf, str(error), None)
    return found[0]


def _filled(
    request: Request,
    plan: Plan,
    state: KeyValueState,
    split: QuerySplit,
    margin: float,
) -> StateHead:
    """A state with all keys and values, and its held-out queries."""
    head = request.head
    p = head.sizes[3]
    found = request.fill(
        StateHead(
            plan,
            state,
            KVBuffer.none(head.key, head.value),
            HeldOutQueries.of(split, p, head.scale, request.tol, margin),
        )
    )
    assert isinstance(found, StateHead)
    return found


def _exact_work(request: Request) -> float:
    _, _, d, p = request.head.sizes
    return exact_work(1, request.count, d, p)


def _plan_of(
    head: Head, expansion: PolynomialExpansion, basis: str, reason: str
) -> Plan:
    """The plan of a polynomial expansion, with the cost of one query."""
    _, _, d, p = head.sizes
    rank, degree = len(expansion.index), int(expansion.index.degree.max())
    method = Polynomial(degree=degree, rank=rank, basis=basis)
    work = polynomial_work(1, 0, d, p, rank)
    if expansion.dtype == head.xp.float64 != head.dtype:
        work *= 2
    error = math.nan if math.isinf(expansion.bound) else expansion.bound
    return Plan(method, error, work, reason)


def _lowrank_plan(
    head: Head, rank: int, landmarks: int, error: float, reason: str
) -> Plan:
    """The plan of a low-rank basis, with the cost of one query."""
    _, _, d, p = head.sizes
    method = Polynomial(rank=rank, landmarks=landmarks, basis="hermite")
    work = lowrank_work(1, 0, d, p, rank, landmarks)
    return Plan(method, error, work, reason)
