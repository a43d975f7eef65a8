"""The rule that picks a method for each head."""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.sampled import Looks
from fastattn.costs.work import exact_work, seconds
from fastattn.methods.exact import Exact
from fastattn.methods.lowrank.causal_cost import leniency, lowrank_cost
from fastattn.methods.lowrank.rank_search import predict
from fastattn.methods.lowrank.whitening import Sample
from fastattn.methods.multipole.method import Multipole, multipole_attempt
from fastattn.methods.polynomial.method import (
    Polynomial,
    answer_of,
    attempt_of,
    lowrank_attempt,
)
from fastattn.methods.polynomial.proven import proven_recipe
from fastattn.methods.quantized import Quantized, quantized_attempt, why_not
from fastattn.problem.head import Head
from fastattn.problem.plan import Attempt, Candidate, HeadAnswer, Plan
from fastattn.problem.row_statistics import logit_variance
from sketching._lib.certificate import RefusalError

# a method must be predicted to take at most this share of exact attention's time; of
# that of products of eight bits, which need next to no planning, where they serve: low
# ranks, and clusters
_WORTH = 0.8
_WORTH_MORE = 0.5, 0.9
# heads with fewer logits than this are computed exactly: planning costs as much. With
# fewer than the second number even products of eight bits gain less than their check
_SMALL, _TINY = 1 << 24, 1 << 21
# with fewer logits clusters are not tried: a refusal would cost too much; nor are they
# up to the second number where a low rank serves
_LARGE, _LARGEST = 1 << 26, 1 << 28
# where products of eight bits serve, low ranks are tried if the variance of the logits
# times this is no more than their number, clusters if times that it is at least so
# much: the smaller a head, the clearer it must be that another search will pay
_CALM, _SHARP = 5 << 25, 1 << 30
# logits of a larger variance, judged roughly, are not worth fitting a basis to
_RESTLESS = 6.0
# nor are clusters tried where a low rank takes less than this share of exact
# attention's time
_QUICK = 0.15
# errors as small as this leave room for sums over keys of products of eight bits, which
# add a twentieth to it
_COARSE_SUMS = 0.009
# answers that may miss their certificate before the head is computed exactly, and where
# one serves to make the next
_TRIES, _TRIES_AGAIN = 2, 3


@dataclass(frozen=True, slots=True)
class Auto:
    """Give each head the cheapest method that meets the tolerance, or exact attention.

    Notes
    -----
    With ``guarantee="sampled"`` a few rows tell whether products of eight bits are good
    enough, where the processor has them. Small structures over a sample of the keys
    predict how many polynomials or landmarks a head needs; where those do not pay,
    clusters of the keys are tried on sampled rows. The cheapest that is predicted to
    meet the tolerance in clearly less work than exact attention runs and is checked on
    fresh rows; if it misses, a larger one gets a chance, then eight bits, then exact
    attention. Causal heads are planned alike, but for what their first rows, which are
    exact, allow. With ``"proven"`` the least proven polynomial runs if it is cheaper
    than exact attention.

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
        """Say what is considered; the first that is accepted would run."""
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
        """Run the first accepted candidate whose answer keeps its certificate."""
        reason = _why_exact(head, guarantee)
        if reason is not None:
            return Exact().solve(head, tol, guarantee, rng, reason)
        reason, aim = "nothing cheaper meets the tolerance", 1.0
        # all answers that are tried share one chance of failure
        attempt, more, looks = None, 1.0, Looks()
        rounded = _rounded(head, tol, guarantee, rng)
        for number in range(_TRIES_AGAIN):
            try:
                if attempt is not None and attempt.again:
                    attempt = attempt.again(more)
                elif number == _TRIES:
                    break
                else:
                    attempt = _first(
                        _considered(head, tol, aim, guarantee, rng, rounded)
                    )
                if attempt is None:
                    break
                answer = answer_of(head, attempt, tol, rng, looks)
            except RefusalError as error:
                reason = str(error)
                rounded = [] if attempt and attempt.rounding else rounded
                break
            if guarantee == "proven" or answer.error <= tol:
                return answer
            reason = (
                f"{attempt.plan.method} certified {answer.error:.2e} where "
                f"{attempt.plan.predicted_error:.2e} was predicted"
            )
            if attempt.rounding:
                # the same rounding would err alike
                rounded = []
                break
            # what was certified says how much more to ask for
            more = 0.9 * tol / answer.error
            aim *= more
        last = _first(rounded)
        if last is not None:
            last = replace(last, plan=replace(last.plan, reason=reason))
            with suppress(RefusalError):
                answer = answer_of(head, last, tol, rng, looks)
                if answer.error <= tol:
                    return answer
        return Exact().solve(head, tol, guarantee, rng, reason)


def _first(considered: Iterable[tuple[Attempt | None, Candidate]]) -> Attempt | None:
    """The first attempt that was accepted."""
    return next((x for x, c in considered if x and c.accepted), None)


def _why_exact(head: Head, guarantee: str) -> str | None:
    """Say why a head goes to exact attention without planning, if it does."""
    least = _SMALL
    if guarantee == "sampled" and not why_not(head):
        least = _TINY
    if head.logits >= least:
        return None
    n, m, _, _ = head.sizes
    logits = f"{n} x {m}" if head.visible is None else head.logits
    return f"{logits} logits are too few for planning to pay"


def _considered(
    head: Head,
    tol: float,
    aim: float,
    guarantee: str,
    rng: np.random.Generator,
    rounded: list[tuple[Attempt | None, Candidate]],
) -> Iterator[tuple[Attempt | None, Candidate]]:
    """Yield attempts with the verdict on each; None where there is nothing to run."""
    if guarantee == "proven":
        # a bound needs no room for its own sampling
        return _proven(head, tol, rng)
    if head.logits < _SMALL:
        return iter(rounded)
    return _sampled(head, aim * tol, rng, rounded)


def _rounded(
    head: Head, tol: float, guarantee: str, rng: np.random.Generator
) -> list[tuple[Attempt | None, Candidate]]:
    """Products of eight bits, where they are to be had at all."""
    if guarantee == "proven" or why_not(head):
        return []
    try:
        # a stream of its own: other choices must not depend on the processor
        attempt = quantized_attempt(
            head, tol, rng.spawn(1)[0], "predicted to meet the tolerance"
        )
    except RefusalError as error:
        return [_refused(Quantized(), str(error))]
    return [(attempt, Candidate(attempt.plan, accepted=True))]


def _proven(
    head: Head, tol: float, rng: np.random.Generator
) -> Iterator[tuple[Attempt | None, Candidate]]:
    """The least polynomial that is proven to meet the tolerance, if it pays."""
    try:
        recipe = proven_recipe(head, tol, rng)
    except RefusalError as error:
        yield _refused(Polynomial(), str(error))
        return
    attempt = attempt_of(head, recipe, "minimax", "proven")
    ratio = attempt.plan.predicted_seconds / Exact().plan(head).predicted_seconds
    if ratio <= _WORTH:
        yield attempt, Candidate(attempt.plan, accepted=True)
        return
    reason = f"predicted to take {ratio:.1f} times as long as Exact()"
    yield None, Candidate(replace(attempt.plan, reason=reason), accepted=False)


def _sampled(
    head: Head,
    wanted: float,
    rng: np.random.Generator,
    rounded: list[tuple[Attempt | None, Candidate]],
) -> Iterator[tuple[Attempt | None, Candidate]]:
    """What is predicted to meet the tolerance, the cheapest first."""
    exact = exact_work(*head.sizes, logits=head.logits)
    unit = Exact().plan(head).predicted_seconds / exact
    least, worth, sharp = exact, (_WORTH, _WORTH), True
    # a stream of its own: what else is drawn must not depend on it
    variance = logit_variance(head, rng.spawn(1)[0])
    calm = variance <= _RESTLESS
    reason = f"the variance of the logits is {variance:.1f}"
    if _first(rounded) is not None:
        (least,), worth = _works(rounded, unit), _WORTH_MORE
        reason += f", and eight bits serve: {head.logits} logits do not pay a search"
        calm = calm and variance * _CALM <= head.logits
        sharp = variance * head.logits >= _SHARP
    if calm:
        tried = list(_lowrank(head, wanted, rng, worth[0] * least))
    else:
        tried = [_refused(Polynomial(basis="hermite"), reason)]
    works = _works(tried, unit)
    if not sharp:
        tried.append(_refused(Multipole(), reason))
    elif _clusters_may_pay(head, tried) and min(works, default=exact) > _QUICK * exact:
        limit = min([worth[1] * least, *(_WORTH * work for work in works)])
        found = _multipole(head, wanted, rng, limit)
        tried.insert(0 if found[1].accepted else len(tried), found)
    yield from (x for x in tried if x[1].accepted)
    yield from rounded
    yield from (x for x in tried if not x[1].accepted)


def _refused(method: Any, reason: str) -> tuple[None, Candidate]:
    """A method that is not tried, and why."""
    return None, Candidate(Plan(method, math.nan, math.nan, reason), accepted=False)


def _works(tried: list[tuple[Attempt | None, Candidate]], unit: float) -> list[float]:
    """Work of what was accepted, where a multiply-add takes ``unit`` seconds."""
    return [c.plan.predicted_seconds / unit for _, c in tried if c.accepted]


def _clusters_may_pay(
    head: Head,
    tried: list[tuple[Attempt | None, Candidate]],
) -> bool:
    """Whether the chance that clusters serve is worth what their refusal costs."""
    if head.logits >= _LARGEST:
        return True
    # each rectangle of a causal head is smaller
    if head.logits < _LARGE or head.visible is not None:
        return False
    return not any(candidate.accepted for _, candidate in tried)


def _multipole(
    head: Head, wanted: float, rng: np.random.Generator, limit: float
) -> tuple[Attempt | None, Candidate]:
    """Near keys and far clusters, if they are predicted to cost less than the limit."""
    reason = "predicted to meet the tolerance"
    try:
        attempt = multipole_attempt(head, wanted, rng, limit=limit, reason=reason)
    except RefusalError as error:
        return _refused(Multipole(), str(error))
    return attempt, Candidate(attempt.plan, accepted=True)


def _lowrank(
    head: Head, wanted: float, rng: np.random.Generator, limit: float
) -> Iterator[tuple[Attempt | None, Candidate]]:
    """Low ranks that are predicted to meet the tolerance, the cheapest first."""
    # pilots see all keys; rows that see some may err by so many times more
    factor = 1.0 if head.visible is None else leniency(head, rng)
    whole = head.unmasked()
    try:
        predictions = predict(
            whole,
            Sample.of(whole, rng),
            factor * wanted,
            rng,
            lowrank_cost(head),
            limit,
        )
    except RefusalError as error:
        yield _refused(Polynomial(basis="hermite"), str(error))
        return
    for found in predictions:
        if found.empty is None:
            method = Polynomial(
                rank=found.rank, landmarks=found.landmarks, basis="hermite"
            )
            plan = Plan(method, math.nan, seconds(found.cost), found.reason)
            yield None, Candidate(plan, accepted=False)
            continue
        reason = found.reason or "predicted to meet the tolerance"
        empty = found.empty
        if not found.landmarks:
            # what corrects landmarks would magnify the rounding
            empty = replace(empty, coarse=wanted >= _COARSE_SUMS)
        attempt = lowrank_attempt(head, empty, found.error / factor, reason)
        yield attempt, Candidate(attempt.plan, found.accepted)
