"""Auto: the choice of a method for each head."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastattn.certificates.sampled import SharedSampling
from fastattn.costs.policy import POLICY
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
from fastattn.planning.gates import (
    CLUSTER_GATES,
    LOW_RANK_GATES,
    Facts,
    enough_logits,
    refusal,
)
from fastattn.problem.head import Head
from fastattn.problem.plan import Candidate, ConfiguredMethod, HeadAnswer, Plan
from fastattn.problem.row_statistics import logit_variance
from sketching._lib.certificate import RefusalError

_PREDICTED = "predicted to meet the tolerance"
_NOTHING_CHEAPER = "nothing cheaper meets the tolerance"


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
        reason = enough_logits(head, rounded=_can_round(head, guarantee))
        if not reason:
            search = _Search.of(head, tol, guarantee, rng)
            yield from (candidate for _, candidate in search.considered(1.0))
        plan = Exact().plan(head, reason or _NOTHING_CHEAPER)
        yield Candidate(plan, accepted=True)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run accepted candidates until a certificate meets the tolerance."""
        reason = enough_logits(head, rounded=_can_round(head, guarantee))
        if reason:
            return Exact().solve(head, tol, guarantee, rng, reason)
        runs = _Runs(_Search.of(head, tol, guarantee, rng))
        # all runs share one failure probability
        shared = SharedSampling()
        for configured in runs:
            try:
                answer = answer_of(head, configured, tol, rng, shared)
            except RefusalError as error:
                runs.reason = str(error)
                continue
            if guarantee == "proven" or answer.error <= tol:
                return answer
            runs.missed(configured, answer.error)
        return Exact().solve(head, tol, guarantee, rng, runs.reason)


# a method that may run, None if there is nothing to run, and what explain says of it
_Considered = tuple[ConfiguredMethod | None, Candidate]


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """The search for methods of one head; ``rounded`` holds int8/bfloat16 matmuls."""

    head: Head
    tol: float
    guarantee: str
    rng: np.random.Generator
    rounded: list[_Considered]

    @staticmethod
    def of(
        head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> "_Search":
        """Try int8/bfloat16 matmuls first: they need almost no planning."""
        rounded = []
        if _can_round(head, guarantee):
            # its own random stream: other choices must not depend on the processor
            make = partial(configured_quantized, head, tol, rng.spawn(1)[0], _PREDICTED)
            rounded = [_accepted_or_refused(Quantized(), make)]
        return _Search(head, tol, guarantee, rng, rounded)

    def considered(self, aim: float) -> Iterator[_Considered]:
        """Methods for ``aim`` times the tolerance, accepted and cheap ones first."""
        if self.guarantee == "proven":
            # a proven bound has no sampling margin: the full tolerance
            return _proven(self.head, self.tol, self.rng)
        if self.head.logits < POLICY.auto.few_logits:
            return iter(self.rounded)
        return self._sampled(aim * self.tol)

    def _sampled(self, wanted: float) -> Iterator[_Considered]:
        head, rng, policy = self.head, self.rng, POLICY
        (rounded,) = _works(self.rounded) or (None,)
        # its own random stream: other draws must not depend on it
        facts = Facts(head, logit_variance(head, rng.spawn(1)[0]), rounded)
        shares = policy.time_share, policy.time_share
        least = facts.exact
        if rounded is not None:
            least, shares = rounded, policy.auto.rounded_time_shares
        reason = refusal(LOW_RANK_GATES, facts)
        if reason:
            tried = [_refused(Polynomial(basis="hermite"), reason)]
        else:
            tried = list(_lowrank(head, wanted, rng, shares[0] * least))
        facts = replace(facts, low_ranks=_works(tried))
        reason = refusal(CLUSTER_GATES, facts)
        if reason:
            tried.append(_refused(Multipole(), reason))
        else:
            budgets = [policy.time_share * work for work in facts.low_ranks]
            limit = min([shares[1] * least, *budgets])
            make = partial(
                configured_multipole, head, wanted, rng, limit=limit, reason=_PREDICTED
            )
            found = _accepted_or_refused(Multipole(), make)
            tried.insert(0 if found[1].accepted else len(tried), found)
        yield from (x for x in tried if x[1].accepted)
        yield from self.rounded
        yield from (x for x in tried if not x[1].accepted)


@dataclass(slots=True, eq=False)
class _Runs:
    """Methods that run one after another, each after the one before has failed.

    ``reason`` says how the last one failed, and ``factor`` by how much its target error
    must shrink; None where a smaller target does not help.
    """

    search: _Search
    reason: str = _NOTHING_CHEAPER
    factor: float | None = None

    def __iter__(self) -> Iterator[ConfiguredMethod]:
        """The best method of a search, again with smaller errors, then rounded ones."""
        policy, configured, aim = POLICY.auto, None, 1.0
        for number in range(policy.tries_again):
            configured = self._next(configured, aim, number < policy.tries)
            if configured is None:
                break
            self.factor = None
            yield configured
            if self.factor is None:
                break
            aim *= self.factor
        last = _first(self.search.rounded)
        # its rounding would be the same a second time
        if last is not None and not (configured and configured.rounding):
            yield replace(last, plan=replace(last.plan, reason=self.reason))

    def missed(self, configured: ConfiguredMethod, error: float) -> None:
        """Note that a certificate missed the tolerance."""
        self.reason = (
            f"{configured.plan.method} certified {error:.2e} where "
            f"{configured.plan.predicted_error:.2e} was predicted"
        )
        if not configured.rounding:
            self.factor = POLICY.retarget * self.search.tol / error

    def _next(
        self, before: ConfiguredMethod | None, aim: float, again: bool
    ) -> ConfiguredMethod | None:
        """The method before with a smaller error, else that of a new search."""
        try:
            if before is not None and before.retighten and self.factor is not None:
                return before.retighten(self.factor)
            return _first(self.search.considered(aim)) if again else None
        except RefusalError as error:
            self.reason = str(error)
            return None


def _first(considered: Iterable[_Considered]) -> ConfiguredMethod | None:
    """The first configured method that is accepted."""
    return next((x for x, c in considered if x and c.accepted), None)


def _works(considered: Iterable[_Considered]) -> tuple[float, ...]:
    """Work of the accepted methods."""
    return tuple(c.plan.work for _, c in considered if c.accepted)


def _can_round(head: Head, guarantee: str) -> bool:
    """Whether int8/bfloat16 matmuls may serve a head, on this processor."""
    return guarantee == "sampled" and not why_not(head)


def _refused(method: Any, reason: str) -> _Considered:
    """A method that does not run, with the reason."""
    return None, Candidate(Plan(method, math.nan, math.nan, reason), accepted=False)


def _accepted_or_refused(
    method: Any, make: Callable[[], ConfiguredMethod]
) -> _Considered:
    """What ``make`` configures, or the reason of its refusal."""
    try:
        configured = make()
    except RefusalError as error:
        return _refused(method, str(error))
    return configured, Candidate(configured.plan, accepted=True)


def _proven(head: Head, tol: float, rng: np.random.Generator) -> Iterator[_Considered]:
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


def _lowrank(
    head: Head, wanted: float, rng: np.random.Generator, limit: float
) -> Iterator[_Considered]:
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
        reason = found.reason or _PREDICTED
        empty = found.empty
        if not found.landmarks:
            # the projection onto landmarks would amplify the rounding
            empty = replace(
                empty, low_precision=wanted >= POLICY.auto.low_precision_sums
            )
        configured = configured_lowrank(head, empty, found.error / factor, reason)
        yield configured, Candidate(configured.plan, found.accepted)
