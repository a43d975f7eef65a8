"""Which method answers a head of tensor attention, and what is certified."""

import math
from typing import Any

import numpy as np

from fastattn._costs import exact_work
from fastattn._planner import Auto
from fastattn._problem import HeadAnswer
from fastattn._sampling import FAILURE, SampledError, scaled_frobenius
from fastattn._tensor_exact import exact_plan, relative_bound, solve_exact
from fastattn._tensor_extent import Extent
from fastattn._tensor_pilot import sampled_recipe
from fastattn._tensor_polynomial import TensorRecipe, proven_recipe
from fastattn._tensor_problem import TensorHead
from fastattn._tensor_sampling import (
    certify_few_rows,
    certify_tuples,
    rows_within_budget,
)
from fastattn.exact import Exact
from fastattn.polynomial import Polynomial
from fastattn.tensor_mechanisms import TensorMethod
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# a polynomial must be predicted to take at most this share of exact attention's time
_WORTH = 0.8
# heads with less work than this are computed exactly: planning costs as much
_SMALL = 1 << 22
# nor is exact attention that would take hours begun unasked
_ENDLESS = 1e14


def solve_tensor(
    method: Any,
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> HeadAnswer:
    """Answer one head within ``tol`` by the given method.

    Raises
    ------
    RefusalError
        If the method cannot meet ``tol``.
    TypeError
        If it is none for tensor attention.
    """
    nothing = head.sizes[1] == 0 and isinstance(method, (Auto, Polynomial))
    if isinstance(method, Exact) or nothing:
        return solve_exact(head, tol, guarantee, rng, exact_plan(head, Exact()))
    if isinstance(method, Polynomial):
        recipe = _recipe(method, head, tol, guarantee, rng)
        answer = _run(head, recipe, tol, guarantee, rng)
        if guarantee == "sampled" and answer.error > tol:
            raise RefusalError(
                f"{answer.plan.method} misses tol={tol:g}: {answer.error:.2e} by "
                f"{answer.source}; raise tol, degree or rank, or use Auto()"
            )
        return answer
    if isinstance(method, Auto):
        return _solve_auto(head, tol, guarantee, rng)
    if isinstance(method, TensorMethod):
        return method.solve(head, tol, guarantee, rng)
    raise TypeError(
        f"{method} is no method for tensor attention: use Auto(), Exact() or "
        "Polynomial()"
    )


def _solve_auto(
    head: TensorHead, tol: float, guarantee: str, rng: np.random.Generator
) -> HeadAnswer:
    """Run the polynomial if that is cheaper and keeps its promise, else be exact.

    Raises
    ------
    RefusalError
        If exact attention would take hours.
    """
    work, reason = exact_work(*head.sizes), "too few tuples for planning to pay"
    if work >= _SMALL:
        try:
            recipe = _recipe(Polynomial(), head, tol, guarantee, rng)
            plan, exact = recipe.plan(head, ""), exact_plan(head, Exact())
            share = plan.predicted_seconds / exact.predicted_seconds
            reason = f"{plan.method} is predicted to take {share:.1f} times as long"
            if share <= _WORTH:
                answer = _run(head, recipe, tol, guarantee, rng)
                if answer.error <= tol or guarantee == "proven":
                    return answer
                reason = f"{plan.method} certified {answer.error:.2e}"
        except RefusalError as error:
            reason = str(error)
    if work > _ENDLESS:
        raise RefusalError(
            f"{reason}; exact attention over {head.sizes[1]} tuples for each of "
            f"{head.sizes[0]} rows would take hours: raise tol, try "
            "guarantee='proven', or ask for Exact()"
        )
    return solve_exact(head, tol, guarantee, rng, exact_plan(head, Exact(), reason))


def _recipe(
    method: Polynomial,
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> TensorRecipe:
    """Choose monomials and a polynomial for one head."""
    if method.basis == "hermite" or method.landmarks:
        raise RefusalError(
            "tensor attention has no basis fitted to queries and no landmarks: use "
            "basis='minimax' without landmarks"
        )
    if guarantee == "sampled":
        return sampled_recipe(head, method, tol, rng)
    if method.basis != "minimax":
        raise RefusalError(f"basis={method.basis!r} has no proven bound: use 'minimax'")
    return proven_recipe(head, Extent.of(head), tol, method.degree, method.rank)


def _run(
    head: TensorHead,
    recipe: TensorRecipe,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> HeadAnswer:
    """Answer by a recipe and certify that, whether or not it meets ``tol``."""
    value, normalizer, good = recipe.answer(head)
    if not bool(head.xp.all(good)):
        bad = head.sizes[0] - int(head.xp.sum(head.xp.astype(good, head.xp.int64)))
        raise RefusalError(
            f"degree {recipe.degree} gives {bad} of {head.sizes[0]} rows a sum of "
            "weights that is not positive: raise the degree, or use Exact()"
        )
    value, normalizer = head.finish(value, normalizer)
    source = (
        f"minimax polynomial of degree {recipe.degree} on the interval of all logits "
        "(Alman and Song 2023; relative error of weights)"
    )
    error, failure, norm = recipe.bound, 0.0, "max"
    if guarantee == "sampled":
        norm = "relative-frobenius"
        error = relative_bound(head, recipe.bound, *scaled_frobenius(value))
        if not error <= tol:
            found = _certify(head, recipe, value, normalizer, tol, rng)
            error, failure, source = found.upper, FAILURE, found.source
    plan = recipe.plan(head, "predicted to meet the tolerance")
    return HeadAnswer(value, normalizer, error, failure, norm, source, plan)


def _certify(
    head: TensorHead,
    recipe: TensorRecipe,
    value: Array,
    normalizer: Array,
    tol: float,
    rng: np.random.Generator,
) -> SampledError:
    """Sample tuples; where their own scatter is too large, rows, if those are few."""
    count = rows_within_budget(head)
    found = SampledError(math.inf, math.inf, "too many tuples to compute rows exactly")
    # sampled tuples would have to be those that a row sees
    if head.visible is None:
        found = certify_tuples(head, recipe, value, normalizer, rng)
    if found.upper <= tol or not count:
        return found
    return certify_few_rows(head, recipe, value, count, tol, rng)
