"""The choice of the structure of a prepared head of tensor attention."""

from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import MAX_BLOCKS, with_room
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work, polynomial_work
from fastattn.methods.exact import Exact
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.prepared.kv_buffer import KVBuffer
from fastattn.prepared.tensor.exact import TensorExactHead
from fastattn.prepared.tensor.states import TensorStateHead
from fastattn.problem.plan import Plan, Task
from fastattn.tensor.polynomial import (
    TensorPolynomialExpansion,
    check_basis,
    proven_expansion,
)
from fastattn.tensor.problem import TensorHead
from sketching._lib.certificate import RefusalError

TensorStructure = TensorExactHead | TensorStateHead


@singledispatch
def prepare_tensor_head(method: Any, *_: Any) -> TensorStructure:
    """Plan and fill a structure whose bound meets ``tol``, or raise RefusalError.

    A method is registered with a function of the method and a ``Task``.
    """
    raise TypeError(
        f"method: {method!r} cannot be prepared for tensor attention: expected "
        "Auto(), Exact(), Polynomial() or None"
    )


@prepare_tensor_head.register
def _prepare_exact(
    method: Exact,
    task: Task[TensorHead],
) -> TensorStructure:
    return _exact(task, method, "requested")


@prepare_tensor_head.register
def _prepare_polynomial(
    method: Polynomial,
    task: Task[TensorHead],
) -> TensorStructure:
    _check_guarantee(task.guarantee)
    if task.head.sizes[1] == 0:
        return _exact(task, Exact(), "no tuple to plan with")
    return _filled(_state(task, method, "requested"), task.head)


@prepare_tensor_head.register
def _prepare_cheapest(
    _method: Auto,
    task: Task[TensorHead],
) -> TensorStructure:
    """A state if it meets ``tol`` and is predicted to be faster, else KV buffers."""
    _check_guarantee(task.guarantee)
    if task.head.sizes[1] == 0:
        return _exact(task, Exact(), "no tuple to plan with")
    try:
        found = _state(task, Polynomial(), "predicted to be faster")
    except RefusalError as error:
        return _exact(task, Exact(), str(error))
    share = found.plan.work / _exact_work(task.head)
    if share <= POLICY.time_share:
        return _filled(found, task.head)
    reason = f"{found.plan.method} is predicted to take {share:.1f} times as long"
    return _exact(task, Exact(), reason)


def _check_guarantee(guarantee: str) -> None:
    """Raise ``RefusalError`` for states with a sampled certificate."""
    if guarantee == "sampled":
        raise RefusalError(
            "guarantee='sampled' would need exact outputs of held-out queries, which "
            "cannot be updated: a new key of one factor makes tuples with all keys of "
            "the other factors, which a state does not have. Use guarantee='proven', "
            "or method=Exact()"
        )


def _filled(structure: TensorStructure, head: TensorHead) -> TensorStructure:
    """The structure with all keys and values."""
    for s, (key, value) in enumerate(zip(head.keys, head.values, strict=True)):
        structure = structure.insert_into(s, key, value)
    return structure


def _state(task: Task[TensorHead], method: Polynomial, reason: str) -> TensorStateHead:
    """The proven polynomial of least degree, for queries up to a tenth larger."""
    check_basis(method, "proven")
    head, xp = task.head, task.head.xp
    # both: where logits have one sign, smaller queries must stay in the interval, too
    head = replace(head, query=xp.concat([head.query, with_room(head.query)]))
    expansion = proven_expansion(head, task.tol, method.degree, method.rank, MAX_BLOCKS)
    return TensorStateHead.of(_plan_of(head, expansion, reason), expansion, head)


def _exact(task: Task[TensorHead], method: Exact, reason: str) -> TensorStructure:
    """KV buffers."""
    head = task.head
    plan = Plan(method, 0.0, _exact_work(head), reason)
    buffers = tuple(map(KVBuffer.none, head.keys, head.values))
    rows = np.sort(task.rng.permutation(head.sizes[0])[: POLICY.tensor.held])
    sample = head.with_rows(rows).query
    return _filled(TensorExactHead(plan, head.scale, buffers, sample), head)


def _exact_work(head: TensorHead) -> float:
    _, *rest = head.sizes
    return exact_work(1, *rest)


def _plan_of(
    head: TensorHead, expansion: TensorPolynomialExpansion, reason: str
) -> Plan:
    """The plan of an expansion, with the cost of one query."""
    rank: Any = len(expansion.index)
    _, _, d, p = head.sizes
    work = polynomial_work(1, 0, d, p, rank)
    if expansion.dtype == head.xp.float64 != head.dtype:
        work *= 2
    method = Polynomial(degree=expansion.degree, rank=rank)
    return Plan(method, expansion.bound, work, reason)
