"""The choice of the structure of a prepared head of tensor attention."""

from dataclasses import replace
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
from fastattn.problem.plan import Method, Plan
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


def prepare_tensor_head(
    head: TensorHead,
    tol: float,
    guarantee: str,
    method: Method,
    rng: np.random.Generator,
) -> TensorStructure:
    """Plan and fill a structure whose bound meets ``tol``, or raise RefusalError.

    ``Auto()`` falls back to KV buffers.
    """
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
        return _exact(head, method, "requested", rng)
    if not isinstance(method, (Auto, Polynomial)):
        raise TypeError(
            f"method: {method!r} cannot be prepared for tensor attention: expected "
            "Auto(), Exact(), Polynomial() or None"
        )
    if guarantee == "sampled":
        raise RefusalError(
            "guarantee='sampled' would need exact outputs of held-out queries, which "
            "cannot be updated: a new key of one factor makes tuples with all keys of "
            "the other factors, which a state does not have. Use guarantee='proven', "
            "or method=Exact()"
        )
    if head.sizes[1] == 0:
        return _exact(head, Exact(), "no tuple to plan with", rng)
    if isinstance(method, Polynomial):
        return _state(head, tol, method, "requested")
    try:
        found = _state(head, tol, Polynomial(), "predicted to be faster")
    except RefusalError as error:
        return _exact(head, Exact(), str(error), rng)
    share = found.plan.predicted_seconds / _exact_seconds(head)
    if share <= _TIME_SHARE:
        return found
    reason = f"{found.plan.method} is predicted to take {share:.1f} times as long"
    return _exact(head, Exact(), reason, rng)


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
) -> TensorExactHead:
    """Empty KV buffers."""
    plan = Plan(method, 0.0, _exact_seconds(head), reason)
    buffers = tuple(map(KVBuffer.none, head.keys, head.values))
    rows = np.sort(rng.permutation(head.sizes[0])[:_SAMPLE])
    return TensorExactHead(plan, head.scale, buffers, head.with_rows(rows).query)


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
