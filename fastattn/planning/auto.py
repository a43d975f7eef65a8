"""Auto: the choice of a method for each head."""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.sampled import SharedSampling
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.methods.exact import Exact
from fastattn.methods.lowrank.causal_cost import causal_tolerance_factor, lowrank_cost
from fastattn.methods.lowrank.rank_search import search_ranks
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.multipole.method import Multipole, configured_multipole
from fastattn.methods.polynomial.method import (
    Polynomial,
    answer_of,
    configured_lowrank,
    configured_polynomial,
)
from fastattn.methods.polynomial.proven import proven_expansion
from fastattn.methods.quantized import Quantized, configured_quantized, why_not
from fastattn.problem.head import Head
from fastattn.problem.plan import Candidate, ConfiguredMethod, HeadAnswer, Plan
from fastattn.problem.row_statistics import logit_variance
from sketching._lib.certificate import RefusalError


@dataclass(frozen=True, slots=True)
class Auto:
    """Use the fastest method that meets the tolerance, or exact attention, per head.

    Notes
    -----
    With ``guarantee="sampled"`` a pilot run on a few rows decides whether int8/bfloat16
    matmuls meet the tolerance, where the processor has them. Pilot runs of low ranks on
    a sample of the keys predict how many polynomials or landmarks a head needs; where
    these are not faster, clusters of the keys are tried on sampled rows. The cheapest
    method that is predicted to meet the tolerance within its budget, a share of the
    work of exact attention, runs and is certified on fresh rows. If the certificate
    misses the tolerance, a method runs again with a smaller target error, then
    int8/bfloat16 matmuls run, then exact attention. Causal heads are planned in the
    same way, with another tolerance for rows after the first chunk, which is exact.
    With ``"proven"`` the polynomial of least proven degree runs if it is cheaper than
    exact attention.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Auto, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 64, 16))
    >>> approximate(query, key, value, method=Auto()).plan.method
    Exact(block=None)
    """

    def candidates(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[Candidate]:
        """Yield the methods that are considered; the first accepted one would run."""
        reason = _why_exact(head, guarantee)
        if reason is None:
            rounded = _rounded(head, tol, guarantee, rng)
            considered = _considered(head, tol, 1.0, guarantee, rng, rounded)
            yield from (candidate for _, candidate in considered)
        plan = Exact().plan(head, reason or "nothing cheaper meets the tolerance")
        yield Candidate(plan, accepted=True)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run accepted candidates until a certificate meets the tolerance."""
        reason = _why_exact(head, guarantee)
        if reason is not None:
            return Exact().solve(head, tol, guarantee, rng, reason)
        reason, aim = "nothing cheaper meets the tolerance", 1.0
        # all runs share one failure probability
        configured, more, shared = None, 1.0, SharedSampling()
        rounded = _rounded(head, tol, guarantee, rng)
        for number in range(POLICY.auto.tries_again):
            try:
                if configured is not None and configured.retighten:
                    configured = configured.retighten(more)
                elif number == POLICY.auto.tries:
                    break
                else:
                    configured = _first(
                        _considered(head, tol, aim, guarantee, rng, rounded)
                    )
                if configured is None:
                    break
                answer = answer_of(head, configured, tol, rng, shared)
            except RefusalError as error:
                reason = str(error)
                rounded = [] if configured and configured.rounding else rounded
                break
            if guarantee == "proven" or answer.error <= tol:
                return answer
            reason = (
                f"{configured.plan.method} certified {answer.error:.2e} where "
                f"{configured.plan.predicted_error:.2e} was predicted"
            )
            if configured.rounding:
                # the rounding would be the same
                rounded = []
                break
            # scale the target by how far the certificate missed the tolerance
            more = 0.9 * tol / answer.error
            aim *= more
        last = _first(rounded)
        if last is not None:
            last = replace(last, plan=replace(last.plan, reason=reason))
            with suppress(RefusalError):
                answer = answer_of(head, last, tol, rng, shared)
                if answer.error <= tol:
                    return answer
        return Exact().solve(head, tol, guarantee, rng, reason)


def _first(
    considered: Iterable[tuple[ConfiguredMethod | None, Candidate]],
) -> ConfiguredMethod | None:
    """The first configured method that is accepted."""
    return next((x for x, c in considered if x and c.accepted), None)


def _why_exact(head: Head, guarantee: str) -> str | None:
    """Return why a head is computed exactly without planning; None if it is not."""
    least = POLICY.auto.few_logits
    if guarantee == "sampled" and not why_not(head):
        least = POLICY.auto.fewest_logits
    if head.logits >= least:
        return None
    n, m, _, _ = head.sizes
    logits = f"{n} x {m}" if head.prefix_lengths is None else head.logits
    return f"{logits} logits are too few: planning costs more than it saves"


def _considered(
    head: Head,
    tol: float,
    aim: float,
    guarantee: str,
    rng: np.random.Generator,
    rounded: list[tuple[ConfiguredMethod | None, Candidate]],
) -> Iterator[tuple[ConfiguredMethod | None, Candidate]]:
    """Yield configured methods, None if there is nothing to run, and candidates."""
    if guarantee == "proven":
        # a proven bound has no sampling margin: the full tolerance
        return _proven(head, tol, rng)
    if head.logits < POLICY.auto.few_logits:
        return iter(rounded)
    return _sampled(head, aim * tol, rng, rounded)


def _rounded(
    head: Head, tol: float, guarantee: str, rng: np.random.Generator
) -> list[tuple[ConfiguredMethod | None, Candidate]]:
    """int8/bfloat16 matmuls, if the head and the processor support them."""
    if guarantee == "proven" or why_not(head):
        return []
    try:
        # its own random stream: other choices must not depend on the processor
        configured = configured_quantized(
            head, tol, rng.spawn(1)[0], "predicted to meet the tolerance"
        )
    except RefusalError as error:
        return [_refused(Quantized(), str(error))]
    return [(configured, Candidate(configured.plan, accepted=True))]


def _proven(
    head: Head, tol: float, rng: np.random.Generator
) -> Iterator[tuple[ConfiguredMethod | None, Candidate]]:
    """The polynomial of least degree proven to meet the tolerance, if it is faster."""
    try:
        expansion = proven_expansion(head, tol, rng)
    except RefusalError as error:
        yield _refused(Polynomial(), str(error))
        return
    configured = configured_polynomial(head, expansion, "minimax", "proven")
    ratio = configured.plan.work / Exact().plan(head).work
    if ratio <= POLICY.time_share:
        yield configured, Candidate(configured.plan, accepted=True)
        return
    reason = f"predicted to take {ratio:.1f} times as long as Exact()"
    yield None, Candidate(replace(configured.plan, reason=reason), accepted=False)


def _sampled(
    head: Head,
    wanted: float,
    rng: np.random.Generator,
    rounded: list[tuple[ConfiguredMethod | None, Candidate]],
) -> Iterator[tuple[ConfiguredMethod | None, Candidate]]:
    """Methods that are predicted to meet the tolerance, the cheapest first."""
    policy = POLICY.auto
    exact = exact_work(*head.sizes, logits=head.logits)
    least, shares, is_high_variance = (
        exact,
        (POLICY.time_share, POLICY.time_share),
        True,
    )
    # its own random stream: other draws must not depend on it
    variance = logit_variance(head, rng.spawn(1)[0])
    is_low_variance = variance <= policy.low_variance
    reason = f"the logit variance is {variance:.1f}"
    if _first(rounded) is not None:
        (least,), shares = _works(rounded), policy.rounded_time_shares
        reason += (
            f"; 8-bit matmuls suffice, and at {head.logits} logits a search costs more "
            "than it saves"
        )
        is_low_variance = (
            is_low_variance and variance * policy.low_variance_logits <= head.logits
        )
        is_high_variance = variance * head.logits >= policy.high_variance_logits
    if is_low_variance:
        tried = list(_lowrank(head, wanted, rng, shares[0] * least))
    else:
        tried = [_refused(Polynomial(basis="hermite"), reason)]
    works = _works(tried)
    if not is_high_variance:
        tried.append(_refused(Multipole(), reason))
    elif (
        _clusters_may_pay(head, tried)
        and min(works, default=exact) > POLICY.multipole.quick_share * exact
    ):
        limit = min([shares[1] * least, *(POLICY.time_share * work for work in works)])
        found = _multipole(head, wanted, rng, limit)
        tried.insert(0 if found[1].accepted else len(tried), found)
    yield from (x for x in tried if x[1].accepted)
    yield from rounded
    yield from (x for x in tried if not x[1].accepted)


def _refused(method: Any, reason: str) -> tuple[None, Candidate]:
    """A method that is not tried, with the reason."""
    return None, Candidate(Plan(method, math.nan, math.nan, reason), accepted=False)


def _works(
    tried: list[tuple[ConfiguredMethod | None, Candidate]],
) -> list[float]:
    """Work of the accepted methods."""
    return [c.plan.work for _, c in tried if c.accepted]


def _clusters_may_pay(
    head: Head,
    tried: list[tuple[ConfiguredMethod | None, Candidate]],
) -> bool:
    """Whether clusters are likely enough to be faster to risk an expensive refusal."""
    if head.logits >= POLICY.auto.always_clusters:
        return True
    # the rectangles of a causal head are smaller still
    if head.logits < POLICY.multipole.few_logits or head.prefix_lengths is not None:
        return False
    return not any(candidate.accepted for _, candidate in tried)


def _multipole(
    head: Head, wanted: float, rng: np.random.Generator, limit: float
) -> tuple[ConfiguredMethod | None, Candidate]:
    """The multipole method, if its predicted work is within the budget ``limit``."""
    reason = "predicted to meet the tolerance"
    try:
        configured = configured_multipole(head, wanted, rng, limit=limit, reason=reason)
    except RefusalError as error:
        return _refused(Multipole(), str(error))
    return configured, Candidate(configured.plan, accepted=True)


def _lowrank(
    head: Head, wanted: float, rng: np.random.Generator, limit: float
) -> Iterator[tuple[ConfiguredMethod | None, Candidate]]:
    """Low ranks, as ``search_ranks`` orders them."""
    # pilot runs use all keys; rows over prefixes may have another error
    factor = 1.0 if head.prefix_lengths is None else causal_tolerance_factor(head, rng)
    whole = head.unmasked()
    try:
        estimates = search_ranks(
            whole,
            PlanningSample.of(whole, rng),
            factor * wanted,
            rng,
            lowrank_cost(head),
            limit,
        )
    except RefusalError as error:
        yield _refused(Polynomial(basis="hermite"), str(error))
        return
    for found in estimates:
        if found.empty is None:
            method = Polynomial(
                rank=found.rank, landmarks=found.landmarks, basis="hermite"
            )
            plan = Plan(method, math.nan, found.cost, found.reason)
            yield None, Candidate(plan, accepted=False)
            continue
        reason = found.reason or "predicted to meet the tolerance"
        empty = found.empty
        if not found.landmarks:
            # the projection onto landmarks would amplify the rounding
            empty = replace(
                empty, low_precision=wanted >= POLICY.auto.low_precision_sums
            )
        configured = configured_lowrank(head, empty, found.error / factor, reason)
        yield configured, Candidate(configured.plan, found.accepted)
