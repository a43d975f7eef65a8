"""The choice of a method for a head of tensor attention, and its certificate."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import SampledError
from fastattn.costs.work import exact_work
from fastattn.methods.exact import Exact
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.problem.plan import Candidate, HeadAnswer, Plan
from fastattn.tensor.degree_search import apriori_expansion, sampled_expansion
from fastattn.tensor.exact import exact_plan, relative_bound, solve_exact
from fastattn.tensor.mechanisms import TensorMethod
from fastattn.tensor.overflow import balanced, in_range
from fastattn.tensor.polynomial import (
    TensorPolynomialExpansion,
    check_basis,
    proven_expansion,
)
from fastattn.tensor.problem import TensorHead
from fastattn.tensor.sampled import (
    certify_few_rows,
    certify_tuples,
    rows_within_budget,
)
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# a polynomial must be predicted to take at most this share of exact attention's time
_TIME_SHARE = 0.8
# heads with less work than this are computed exactly: planning costs as much
_LITTLE_WORK = 1 << 22
_FEW = "too few tuples: planning costs more than it saves"
# Auto() refuses exact attention with more work than this: it would take hours
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
        If it is no method for tensor attention.
    """
    if isinstance(method, TensorMethod):
        return method.solve(head, tol, guarantee, rng)
    head = _within_range(head)
    no_tuples = head.sizes[1] == 0 and isinstance(method, (Auto, Polynomial))
    if isinstance(method, Exact) or no_tuples:
        return solve_exact(head, tol, guarantee, rng, exact_plan(head, Exact()))
    if isinstance(method, Polynomial):
        expansion = _expansion(method, head, tol, guarantee, rng)
        answer = _run(head, expansion, tol, guarantee, rng)
        if guarantee == "sampled" and answer.error > tol:
            raise RefusalError(
                f"{answer.plan.method} misses tol={tol:g}: {answer.error:.2e} by "
                f"{answer.source}; raise tol, degree or rank, or use Auto()"
            )
        return answer
    if isinstance(method, Auto):
        return _solve_auto(head, tol, guarantee, rng)
    raise TypeError(_no_method(method))


def _within_range(head: TensorHead) -> TensorHead:
    """Balance a head if partial products of its entries may overflow float64.

    Raises
    ------
    RefusalError
        If complete products may overflow, too.
    """
    if head.sizes[1] == 0 or in_range(head, head.xp.float64):
        return head
    if head.query.dtype == head.xp.float64:
        head = balanced(head)
        if in_range(head, head.xp.float64):
            return head
    raise RefusalError(
        "products of entries may leave the range of float64: scale query, keys and "
        "values down"
    )


def _solve_auto(
    head: TensorHead, tol: float, guarantee: str, rng: np.random.Generator
) -> HeadAnswer:
    """Run the polynomial if it is faster and meets ``tol``, else exact attention.

    Raises
    ------
    RefusalError
        If exact attention would take hours.
    """
    if exact_work(*head.sizes) < _LITTLE_WORK:
        return solve_exact(head, tol, guarantee, rng, exact_plan(head, Exact(), _FEW))
    expansion, plan = _considered(head, tol, guarantee, rng)
    reason = plan.reason
    if expansion is not None:
        try:
            answer = _run(head, expansion, tol, guarantee, rng)
            if answer.error <= tol or guarantee == "proven":
                return answer
            reason = f"{plan.method} certified {answer.error:.2e}"
        except RefusalError as error:
            reason = str(error)
    if exact_work(*head.sizes) > _ENDLESS:
        raise RefusalError(f"{reason}; {_endless(head)}")
    return solve_exact(head, tol, guarantee, rng, exact_plan(head, Exact(), reason))


def _considered(
    head: TensorHead, tol: float, guarantee: str, rng: np.random.Generator
) -> tuple[TensorPolynomialExpansion | None, Plan]:
    """The expansion, None if it is not to run, and its plan with the reason."""
    try:
        expansion = _expansion(Polynomial(), head, tol, guarantee, rng)
    except RefusalError as error:
        return None, Plan(Polynomial(), math.nan, math.nan, str(error))
    plan = expansion.plan(head, "predicted to meet the tolerance")
    share = plan.predicted_seconds / exact_plan(head, Exact()).predicted_seconds
    if share <= _TIME_SHARE:
        return expansion, plan
    reason = f"{plan.method} is predicted to take {share:.1f} times as long"
    return None, replace(plan, reason=reason)


def _endless(head: TensorHead) -> str:
    return (
        f"exact attention over {head.sizes[1]} tuples for each of {head.sizes[0]} rows "
        "would take hours: raise tol, try guarantee='proven', or pass method=Exact()"
    )


def tensor_candidates(
    method: Any,
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> Iterator[Candidate]:
    """Yield the candidates for one head; the first that is accepted would run."""
    if isinstance(method, TensorMethod):
        yield Candidate(method.plan(head), accepted=True)
        return
    head = _within_range(head)
    no_tuples = head.sizes[1] == 0 and isinstance(method, (Auto, Polynomial))
    if isinstance(method, Exact) or no_tuples:
        yield Candidate(exact_plan(head, Exact()), accepted=True)
        return
    if isinstance(method, Polynomial):
        try:
            expansion = _expansion(method, head, tol, guarantee, rng)
        except RefusalError as error:
            plan = Plan(method, math.nan, math.nan, str(error))
            yield Candidate(plan, accepted=False)
        else:
            yield Candidate(expansion.plan(head, "requested"), accepted=True)
        return
    if not isinstance(method, Auto):
        raise TypeError(_no_method(method))
    if exact_work(*head.sizes) < _LITTLE_WORK:
        yield Candidate(exact_plan(head, Exact(), _FEW), accepted=True)
        return
    found, plan = _considered(head, tol, guarantee, rng)
    yield Candidate(plan, accepted=found is not None)
    endless = exact_work(*head.sizes) > _ENDLESS
    reason = _endless(head) if endless else "nothing cheaper meets the tolerance"
    yield Candidate(exact_plan(head, Exact(), reason), accepted=not endless)


def _no_method(method: Any) -> str:
    return (
        f"{method} is no method for tensor attention: use Auto(), Exact() or "
        "Polynomial()"
    )


def _expansion(
    method: Polynomial,
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> TensorPolynomialExpansion:
    """Choose monomials and a polynomial for one head."""
    check_basis(method, guarantee)
    if guarantee == "sampled":
        found = apriori_expansion(head, tol) if method == Polynomial() else None
        return sampled_expansion(head, method, tol, rng) if found is None else found
    return proven_expansion(head, tol, method.degree, method.rank)


def _run(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> HeadAnswer:
    """Answer by an expansion and certify it, whether or not it meets ``tol``."""
    value, normalizer, reliable = expansion.answer(head)
    if not bool(head.xp.all(reliable)):
        bad = head.sizes[0] - int(head.xp.sum(head.xp.astype(reliable, head.xp.int64)))
        raise RefusalError(
            f"degree {expansion.degree} gives {bad} of {head.sizes[0]} rows a sum of "
            "weights that is not positive: raise the degree, or use Exact()"
        )
    value, normalizer = head.finish(value, normalizer)
    source = (
        f"minimax polynomial of degree {expansion.degree} on the interval of all "
        "logits (Alman and Song 2023; relative error of weights)"
    )
    error, failure, norm = expansion.bound, 0.0, "max"
    if guarantee == "sampled":
        norm = "relative-frobenius"
        error = relative_bound(head, expansion.bound, value)
        source += "; a bound on every entry, relative to the answer's norm"
        if not error <= tol:
            found = _certify(head, expansion, value, normalizer, tol, rng)
            error, failure, source = found.upper, FAILURE, found.source
    plan = expansion.plan(head, "predicted to meet the tolerance")
    return HeadAnswer(value, normalizer, error, failure, norm, source, plan)


def _certify(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    normalizer: Array,
    tol: float,
    rng: np.random.Generator,
) -> SampledError:
    """Certify by sampled tuples or, if these miss ``tol``, by exact rows if cheap."""
    count = rows_within_budget(head)
    found = SampledError(math.inf, math.inf, "too many tuples to compute rows exactly")
    # under a causal mask the tuples of each row would have to be sampled
    if head.prefix_lengths is None:
        found = certify_tuples(head, expansion, value, normalizer, rng)
    if found.upper <= tol or not count:
        return found
    return certify_few_rows(head, expansion, value, count, tol, rng)
