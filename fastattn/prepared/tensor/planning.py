"""The choice of the structure of a prepared head of tensor attention."""

from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import MAX_BLOCKS, with_room
from fastattn.costs.work import exact_work, polynomial_work, seconds
from fastattn.methods.exact import Exact
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.prepared.kv_buffer import KVBuffer
from fastattn.prepared.tensor.exact import TensorExactHead
from fastattn.prepared.tensor.states import TensorStateHead
from fastattn.problem.plan import Plan
from fastattn.tensor.polynomial import (
    TensorPolynomialExpansion,
    check_basis,
    proven_expansion,
)
from fastattn.tensor.problem import TensorHead
from sketching._lib.certificate import RefusalError

# a state must be predicted to take at most this share of exact attention's time
_TIME_SHARE = 0.8
# queries on which KV buffers are certified
_SAMPLE = 16

TensorStructure = TensorExactHead | TensorStateHead


@singledispatch
def prepare_tensor_head(method: Any, *_: Any) -> TensorStructure:
    """Plan and fill a structure whose bound meets ``tol``, or raise RefusalError.

    A method is registered with a function of the method, a head, ``tol``, the guarantee
    and a random generator.
    """
    raise TypeError(
        f"method: {method!r} cannot be prepared for tensor attention: expected "
        "Auto(), Exact(), Polynomial() or None"
    )


@prepare_tensor_head.register
def _prepare_exact(
    method: Exact,
    head: TensorHead,
    _tol: float,
    _guarantee: str,
    rng: np.random.Generator,
) -> TensorStructure:
    return _exact(head, method, "requested", rng)


@prepare_tensor_head.register
def _prepare_polynomial(
    method: Polynomial,
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> TensorStructure:
    _check_guarantee(guarantee)
    if head.sizes[1] == 0:
        return _exact(head, Exact(), "no tuple to plan with", rng)
    return _filled(_state(head, tol, method, "requested"), head)


@prepare_tensor_head.register
def _prepare_cheapest(
    _method: Auto,
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> TensorStructure:
    """A state if it meets ``tol`` and is predicted to be faster, else KV buffers."""
    _check_guarantee(guarantee)
    if head.sizes[1] == 0:
        return _exact(head, Exact(), "no tuple to plan with", rng)
    try:
        found = _state(head, tol, Polynomial(), "predicted to be faster")
    except RefusalError as error:
        return _exact(head, Exact(), str(error), rng)
    share = found.plan.predicted_seconds / _exact_seconds(head)
    if share <= _TIME_SHARE:
        return _filled(found, head)
    reason = f"{found.plan.method} is predicted to take {share:.1f} times as long"
    return _exact(head, Exact(), reason, rng)


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


def _state(
    head: TensorHead, tol: float, method: Polynomial, reason: str
) -> TensorStateHead:
    """The proven polynomial of least degree, for queries up to a tenth larger."""
    check_basis(method, "proven")
    xp = head.xp
    # both: where logits have one sign, smaller queries must stay in the interval, too
    head = replace(head, query=xp.concat([head.query, with_room(head.query)]))
    expansion = proven_expansion(head, tol, method.degree, method.rank, MAX_BLOCKS)
    return TensorStateHead.of(_plan_of(head, expansion, reason), expansion, head)


def _exact(
    head: TensorHead, method: Exact, reason: str, rng: np.random.Generator
) -> TensorStructure:
    """KV buffers."""
    plan = Plan(method, 0.0, _exact_seconds(head), reason)
    buffers = tuple(map(KVBuffer.none, head.keys, head.values))
    rows = np.sort(rng.permutation(head.sizes[0])[:_SAMPLE])
    sample = head.with_rows(rows).query
    return _filled(TensorExactHead(plan, head.scale, buffers, sample), head)


def _exact_seconds(head: TensorHead) -> float:
    _, *rest = head.sizes
    return seconds(exact_work(1, *rest))


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
    return Plan(method, expansion.bound, seconds(work), reason)
