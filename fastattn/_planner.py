"""The rule that picks a method for each head."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fastattn._costs import exact_work, polynomial_work
from fastattn._fitted import fitted_recipes
from fastattn._probe import Probe
from fastattn._problem import Candidate, Head, HeadAnswer, Plan
from fastattn._proven import proven_recipe
from fastattn._recipes import Recipe
from fastattn.exact import Exact
from fastattn.polynomial import Polynomial, answer_of, plan_of
from sketching._lib.certificate import RefusalError

# a prediction must undercut the tolerance by this factor, because the certificate
# adds a margin for its own sampling
_SAFETY = 0.75
# a method must be predicted to take at most this share of exact attention's time
_WORTH = 0.8
# heads with fewer logits than this are computed exactly: planning costs as much
_SMALL = 1 << 23
# monomials that fitted polynomials have at the most
_LARGEST_FITTED = 8192
# answers that may miss their certificate before the head is computed exactly
_TRIES = 2


@dataclass(frozen=True, slots=True)
class Auto:
    """Give each head the cheapest method that meets the tolerance, or exact attention.

    Notes
    -----
    With ``guarantee="sampled"`` a sample of rows and keys predicts the error of
    polynomials of growing rank, and a cost model of the machine their time. The first
    that is predicted to meet the tolerance in clearly less time than exact attention
    runs and is checked on fresh rows; if it misses, a larger one gets a chance, then
    exact attention. With ``"proven"`` the least proven polynomial runs if it is cheaper
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
        for _, candidate in self._considered(head, tol, guarantee, rng):
            yield candidate

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the first accepted candidate whose answer keeps its certificate."""
        reason, tries = None, 0
        for recipe, candidate in self._considered(head, tol, guarantee, rng):
            if not candidate.accepted:
                continue
            if recipe is None or tries == _TRIES:
                reason = reason or candidate.plan.reason
                break
            tries += 1
            try:
                answer = answer_of(head, recipe, candidate.plan, tol, guarantee, rng)
            except RefusalError as error:
                reason = str(error)
                continue
            if guarantee == "proven" or answer.error <= tol:
                return answer
            reason = (
                f"{candidate.plan.method} certified {answer.error:.2e} "
                f"where {candidate.plan.predicted_error:.2e} was predicted"
            )
        return Exact().solve(head, tol, guarantee, rng, reason or "asked for")

    def _considered(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[tuple[Recipe | None, Candidate]]:
        """Yield recipes with the verdict on each; None stands for exact attention."""
        reason = _why_exact(head)
        if reason is None and guarantee == "proven":
            yield from _proven(head, tol, rng)
        elif reason is None:
            yield from _sampled(head, tol, rng)
        plan = Exact().plan(head, reason or "nothing cheaper meets the tolerance")
        yield None, Candidate(plan, accepted=True)


def _why_exact(head: Head) -> str | None:
    """Say why a head goes to exact attention without planning, if it does."""
    n, m, _, _ = head.sizes
    if head.visible is not None:
        return "is_causal=True is served by exact attention"
    if n * m < _SMALL:
        return f"{n} x {m} logits are too few for planning to pay"
    return None


def _proven(
    head: Head, tol: float, rng: np.random.Generator
) -> Iterator[tuple[Recipe | None, Candidate]]:
    """The least polynomial that is proven to meet the tolerance, if it pays."""
    try:
        recipe = proven_recipe(head, tol, rng)
    except RefusalError as error:
        plan = Plan(Polynomial(), math.nan, math.nan, str(error))
        yield None, Candidate(plan, accepted=False)
        return
    plan = plan_of(head, recipe, "minimax", "proven")
    yield recipe, _judge_time(head, plan)


def _sampled(
    head: Head, tol: float, rng: np.random.Generator
) -> Iterator[tuple[Recipe | None, Candidate]]:
    """Polynomials of growing rank while they are worth their time."""
    largest = _largest_rank(head)
    if largest < 2:
        return
    probe = Probe.of(head, rng)
    recipes = fitted_recipes(
        head, probe, rng, largest_rank=largest, wanted=_SAFETY * tol
    )
    for recipe in recipes:
        plan = plan_of(head, recipe, "fitted", "predicted to meet the tolerance")
        if recipe.predicted_error <= _SAFETY * tol:
            yield recipe, _judge_time(head, plan)
        else:
            reason = f"predicted error above {_SAFETY:g} tol"
            yield recipe, Candidate(replace(plan, reason=reason), accepted=False)


def _largest_rank(head: Head) -> int:
    """Monomials whose predicted time is the most that is worth it."""
    sizes = head.sizes
    one = polynomial_work(*sizes, 1) - polynomial_work(*sizes, 0)
    most = _WORTH * exact_work(*sizes) - polynomial_work(*sizes, 0)
    return int(min(most / one, _LARGEST_FITTED))


def _judge_time(head: Head, plan: Plan) -> Candidate:
    """Accept a plan if it is predicted to be clearly faster than exact attention."""
    ratio = plan.predicted_seconds / Exact().plan(head).predicted_seconds
    if ratio <= _WORTH:
        return Candidate(plan, accepted=True)
    return Candidate(
        replace(plan, reason=f"predicted to take {ratio:.1f} times as long as Exact"),
        accepted=False,
    )
