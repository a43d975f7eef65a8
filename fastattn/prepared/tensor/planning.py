"""Which structure a head of tensor attention gets when it is prepared."""

from dataclasses import replace
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import PIECES, with_room
from fastattn.costs.work import exact_work, polynomial_work, seconds
from fastattn.methods.exact import Exact
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.prepared.kv_buffer import Kept
from fastattn.prepared.tensor.exact import TensorExactHead
from fastattn.prepared.tensor.states import TensorSumsHead
from fastattn.problem.plan import Method, Plan
from fastattn.tensor.logit_bounds import Extent
from fastattn.tensor.polynomial import TensorRecipe, check_basis, proven_recipe
from fastattn.tensor.problem import TensorHead
from sketching._lib.certificate import RefusalError

# sums must be predicted to take at most this share of exact attention's time
_WORTH = 0.8
# queries of the sample that kept keys are certified on
_SAMPLE = 16

TensorStructure = TensorExactHead | TensorSumsHead


def prepare_tensor_head(
    head: TensorHead,
    tol: float,
    guarantee: str,
    method: Method,
    rng: np.random.Generator,
) -> TensorStructure:
    """Plan and fill a structure whose bound meets ``tol``; refuse, or keep the keys."""
    structure = _planned(head, tol, guarantee, method, rng)
    for s, (key, value) in enumerate(zip(head.keys, head.values, strict=True)):
        structure = structure.insert_into(s, key, value)
    return structure


def _planned(
    head: TensorHead,
    tol: float,
    guarantee: str,
    method: Method,
    rng: np.random.Generator,
) -> TensorStructure:
    """A structure without keys."""
    if isinstance(method, Exact):
        return _exact(head, method, "asked for", rng)
    if not isinstance(method, (Auto, Polynomial)):
        raise TypeError(
            f"method: {method!r} cannot be prepared for tensor attention: expected "
            "Auto(), Exact(), Polynomial() or None"
        )
    if guarantee == "sampled":
        raise RefusalError(
            "guarantee='sampled' would need exact answers of probes, which cannot be "
            "kept up to date: a new key of one factor meets all keys of the others, "
            "which are gone. Use guarantee='proven', or method=Exact()"
        )
    if head.sizes[1] == 0:
        return _exact(head, Exact(), "no tuple to plan with", rng)
    if isinstance(method, Polynomial):
        return _sums(head, tol, method, "asked for")
    try:
        found = _sums(head, tol, Polynomial(), "predicted to be quicker")
    except RefusalError as error:
        return _exact(head, Exact(), str(error), rng)
    share = found.plan.predicted_seconds / _exact_seconds(head)
    if share <= _WORTH:
        return found
    reason = f"{found.plan.method} is predicted to take {share:.1f} times as long"
    return _exact(head, Exact(), reason, rng)


def _sums(
    head: TensorHead, tol: float, method: Polynomial, reason: str
) -> TensorSumsHead:
    """The least proven polynomial, with some room for larger queries."""
    check_basis(method, "proven")
    xp = head.xp
    # of one sign, the smaller queries stay within the interval
    head = replace(head, query=xp.concat([head.query, with_room(head.query)]))
    extent = Extent.of(head)
    recipe = proven_recipe(head, extent, tol, method.degree, method.rank, PIECES)
    return TensorSumsHead.of(_plan_of(head, recipe, reason), recipe, head, extent)


def _exact(
    head: TensorHead, method: Exact, reason: str, rng: np.random.Generator
) -> TensorExactHead:
    """Keep the keys; without them yet."""
    plan = Plan(method, 0.0, _exact_seconds(head), reason)
    kept = tuple(map(Kept.none, head.keys, head.values))
    rows = np.sort(rng.permutation(head.sizes[0])[:_SAMPLE])
    return TensorExactHead(plan, head.scale, kept, head.with_rows(rows).query)


def _exact_seconds(head: TensorHead) -> float:
    _, *rest = head.sizes
    return seconds(exact_work(1, *rest))


def _plan_of(head: TensorHead, recipe: TensorRecipe, reason: str) -> Plan:
    """Describe the recipe by the method that it makes concrete, with a query's cost."""
    rank: Any = len(recipe.index)
    _, _, d, p = head.sizes
    work = polynomial_work(1, 0, d, p, rank)
    if recipe.dtype == head.xp.float64 != head.dtype:
        work *= 2
    method = Polynomial(degree=recipe.degree, rank=rank)
    return Plan(method, recipe.bound, seconds(work), reason)
