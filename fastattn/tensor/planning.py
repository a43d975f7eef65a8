"""The choice of a method for a head of tensor attention, and its certificate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import SampledError
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.methods.exact import Exact
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.problem.plan import Candidate, HeadAnswer, Method, Plan, Task
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
from fastattn.tensor.sampled import certify_few_rows, certify_tuples, rows_within_budget
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

_FEW = "too few tuples: planning costs more than it saves"


class Option(NamedTuple):
    """A way to answer one head; without ``run`` it is refused, as the plan says.

    ``run`` takes the reasons against the options before it, for the plan of the answer.
    """

    plan: Plan
    run: Callable[[str], HeadAnswer] | None = None


def solve_tensor(
    method: Method,
    task: Task[TensorHead],
) -> HeadAnswer:
    """Answer one head within ``tol`` by the first option that succeeds.

    Raises
    ------
    RefusalError
        If the method cannot meet ``tol``.
    TypeError
        If it is no method for tensor attention.
    """
    against = []
    for plan, run in tensor_options(method, task):
        if run is None:
            against.append(plan.reason)
            continue
        try:
            return run("; ".join(against))
        except RefusalError as error:
            against.append(str(error))
    raise RefusalError("; ".join(against))


def tensor_candidates(
    method: Method,
    task: Task[TensorHead],
) -> tuple[Candidate, ...]:
    """The candidates for one head; the first that is accepted would run."""
    options = tensor_options(method, task)
    return tuple(Candidate(plan, accepted=run is not None) for plan, run in options)


@singledispatch
def tensor_options(method: Any, *_: Any) -> Iterator[Option]:
    """Yield the ways to answer a head by a method, the first choice first.

    A method is registered with a function of the arguments of :func:`solve_tensor`.
    """
    raise TypeError(
        f"{method} is no method for tensor attention: use Auto(), Exact() or "
        "Polynomial()"
    )


@tensor_options.register
def _of_tensor_method(
    method: TensorMethod,
    task: Task[TensorHead],
) -> Iterator[Option]:
    yield Option(method.plan(task.head), lambda _: method.solve(*task))


@tensor_options.register
def _of_exact(
    _method: Exact,
    task: Task[TensorHead],
) -> Iterator[Option]:
    yield _exact(_within_range(task))


@tensor_options.register
def _of_polynomial(
    method: Polynomial,
    task: Task[TensorHead],
) -> Iterator[Option]:
    task = _within_range(task)
    if task.head.sizes[1]:
        yield _polynomial(method, task, is_requested=True)
    else:
        yield _exact(task)


@tensor_options.register
def _of_auto(
    _method: Auto,
    task: Task[TensorHead],
) -> Iterator[Option]:
    """The polynomial if it is faster and meets ``tol``, else exact attention."""
    task = _within_range(task)
    head, exact = task.head, _exact(task)
    if head.sizes[1] == 0:
        yield exact
        return
    if exact_work(*head.sizes) < POLICY.tensor.little_work:
        yield _exact(task, _FEW)
        return
    option = _polynomial(Polynomial(), task)
    share = option.plan.work / exact.plan.work
    if option.run and not share <= POLICY.time_share:
        reason = f"{option.plan.method} is predicted to take {share:.1f} times as long"
        option = Option(replace(option.plan, reason=reason))
    yield option
    if exact_work(*head.sizes) > POLICY.tensor.endless:
        yield Option(replace(exact.plan, reason=_endless(head)))
    else:
        reason = "nothing cheaper meets the tolerance"
        yield _exact(task, reason)


def _exact(
    task: Task[TensorHead],
    reason: str = "requested",
) -> Option:
    """Exact attention; what was against other options becomes the plan's reason."""

    def run(against: str) -> HeadAnswer:
        plan = exact_plan(task.head, Exact(), against or reason)
        return solve_exact(*task, plan)

    return Option(exact_plan(task.head, Exact(), reason), run)


def _polynomial(
    method: Polynomial,
    task: Task[TensorHead],
    *,
    is_requested: bool = False,
) -> Option:
    """Attention by an expansion, if one is found; run, it is refused if it misses."""
    try:
        expansion = _expansion(method, task)
    except RefusalError as error:
        return Option(Plan(method, math.nan, math.nan, str(error)))

    def run(_against: str) -> HeadAnswer:
        answer = _run(task, expansion)
        if task.guarantee == "sampled" and not answer.error <= task.tol:
            advice = "; raise tol, degree or rank, or use Auto()" * is_requested
            raise RefusalError(
                f"{answer.plan.method} misses tol={task.tol:g}: {answer.error:.2e} by "
                f"{answer.source}{advice}"
            )
        return answer

    reason = "requested" if is_requested else "predicted to meet the tolerance"
    return Option(expansion.plan(task.head, reason), run)


def _within_range(task: Task[TensorHead]) -> Task[TensorHead]:
    """Balance a head if partial products of its entries may overflow float64.

    Raises
    ------
    RefusalError
        If complete products may overflow, too.
    """
    head = task.head
    if head.sizes[1] == 0 or in_range(head, head.xp.float64):
        return task
    if head.query.dtype == head.xp.float64:
        head = balanced(head)
        if in_range(head, head.xp.float64):
            return task._replace(head=head)
    raise RefusalError(
        "products of entries may leave the range of float64: scale query, keys and "
        "values down"
    )


def _endless(head: TensorHead) -> str:
    return (
        f"exact attention over {head.sizes[1]} tuples for each of {head.sizes[0]} rows "
        "would take hours: raise tol, try guarantee='proven', or pass method=Exact()"
    )


def _expansion(
    method: Polynomial,
    task: Task[TensorHead],
) -> TensorPolynomialExpansion:
    """Choose monomials and a polynomial for one head."""
    head, tol, guarantee, rng = task
    check_basis(method, guarantee)
    if guarantee == "sampled":
        found = apriori_expansion(head, tol) if method == Polynomial() else None
        return sampled_expansion(head, method, tol, rng) if found is None else found
    return proven_expansion(head, tol, method.degree, method.rank)


def _run(task: Task[TensorHead], expansion: TensorPolynomialExpansion) -> HeadAnswer:
    """Answer by an expansion and certify it, whether or not it meets ``tol``."""
    head, tol, guarantee, rng = task
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
