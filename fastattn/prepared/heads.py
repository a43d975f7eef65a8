"""Prepared structures of one head: a KV buffer, or a key-value state with a tail."""

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.costs.policy import POLICY
from fastattn.methods.exact import Exact
from fastattn.prepared.held_out import HeldOutQueries, pack_held_out
from fastattn.prepared.kv_buffer import KVBuffer, bytes_of
from fastattn.prepared.protocol import PreparedHead
from fastattn.prepared.states import KeyValueState, Packed, pack_state
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import merge_partials
from fastattn.problem.plan import HeadAnswer, Plan
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import Certificate, RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class ExactHead:
    """The keys and values themselves, in a buffer.

    Parameters
    ----------
    plan : Plan
        With the reason for exact attention.
    scale : float
        The factor of the logits.
    buffer : KVBuffer
        The keys and values.
    sample : array, shape (k, d)
        Queries that ``certificate`` is about.
    """

    plan: Plan
    scale: float
    buffer: KVBuffer
    sample: Array

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.buffer.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.buffer.nbytes + bytes_of(self.sample)

    def empty(self) -> "ExactHead":
        """Return the structure without keys."""
        return replace(self, buffer=self.buffer.empty())

    def insert(
        self,
        key: Array,
        value: Array,
        *,
        fold: bool = False,  # noqa: ARG002
    ) -> "ExactHead":
        """Add keys."""
        return replace(self, buffer=self.buffer.append(key, value))

    def merge(self, other: "ExactHead") -> "ExactHead":
        """Add the keys of another structure."""
        return self.insert(other.buffer.key, other.buffer.value)

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries exactly, with the bound of ``Exact()``."""
        head = Head(query, self.buffer.key, self.buffer.value, self.scale)
        method: Exact = self.plan.method
        return method.solve(head, tol, guarantee, rng, self.plan.reason)

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """The certificate of the answers to the sample of queries."""
        return self.answer(self.sample, tol, guarantee, rng).certificate

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays = {
            "key": self.buffer.key,
            "value": self.buffer.value,
            "sample": self.sample,
        }
        return {name: to_host(x) for name, x in arrays.items()}, {"scale": self.scale}


@dataclass(frozen=True, slots=True, eq=False)
class StateHead:
    """A key-value state, a tail of recent keys in a buffer, and held-out queries.

    Parameters
    ----------
    plan : Plan
        The plan.
    state : KeyValueState
        Over all keys except those of the tail.
    tail : KVBuffer
        Fewer than ``POLICY.prepared.tail`` keys.
    held_out : HeldOutQueries
        What the certificate rests on.
    """

    plan: Plan
    state: KeyValueState
    tail: KVBuffer
    held_out: HeldOutQueries

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.state.count + self.tail.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.state.nbytes + self.tail.nbytes + self.held_out.nbytes

    def empty(self) -> "StateHead":
        """Return the structure without keys."""
        tail, held_out = self.tail.empty(), self.held_out.empty()
        return StateHead(self.plan, self.state.empty(), tail, held_out)

    def insert(self, key: Array, value: Array, *, fold: bool = False) -> "StateHead":
        """Add keys: to the tail while it is short, else to the sums."""
        if not fold and self.tail.count + key.shape[0] < POLICY.prepared.tail:
            tail = self.tail.append(key, value)
            return replace(
                self, tail=tail, held_out=self.held_out.with_buffered(key, value)
            )
        folded = self._folded()
        if key.shape[0]:
            state = folded.state.insert(key, value)
            held_out = folded.held_out.with_summed(key, value)
            folded = replace(folded, state=state, held_out=held_out)
        return folded._predict_held_out()

    def merge(self, other: "StateHead") -> "StateHead":
        """Add the keys of another structure; the tails go into the state."""
        mine, theirs = self._folded(), other._folded()
        state = mine.state.merge(theirs.state)
        held_out = mine.held_out.merge(theirs.held_out)
        return replace(mine, state=state, held_out=held_out)._predict_held_out()

    def _folded(self) -> "StateHead":
        """Move the tail into the state; call ``_predict_held_out`` next."""
        if not self.tail.count:
            return self
        state = self.state.insert(self.tail.key, self.tail.value)
        return StateHead(self.plan, state, self.tail.empty(), self.held_out.fold())

    def _predict_held_out(self) -> "StateHead":
        """Update the outputs of the state for the held-out queries."""
        if not self.state.count:
            return self
        predicted = self.state.query(self.held_out.query)
        return replace(self, held_out=self.held_out.update_predictions(*predicted))

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries; refuse if held-out queries miss ``tol``, and far queries."""
        certified = self.certificate(tol, guarantee, rng)
        if not certified.error <= tol:
            raise RefusalError(
                f"{self.plan.method} misses tol={tol:g} after {self.count} keys: "
                f"{certified.error:.2e} is certified ({certified.source}); prepare "
                "anew with queries and keys like those to come, a larger rank, a "
                "larger tol, or method=Exact()"
            )
        head = Head(query, self.tail.key, self.tail.value, self.held_out.scale)
        found = head.attend()
        if self.state.count:
            value, logarithm, reliable = self.state.query(query)
            _check_near(reliable, self.plan.method)
            summed = value, logarithm
            found = merge_partials(summed, found) if self.tail.count else summed
        return HeadAnswer.under(certified, *head.finish(*found), self.plan)

    def certificate(
        self,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Certificate:
        """The certificate by held-out queries, whether or not it meets ``tol``."""
        found = self.held_out.error()
        return Certificate(found.upper, FAILURE, "relative-frobenius", found.source)

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays, values = pack_state(self.state)
        held_out, more = pack_held_out(self.held_out)
        tail = {"key": self.tail.key, "value": self.tail.value}
        arrays |= {f"tail_{name}": to_host(x) for name, x in tail.items()} | held_out
        return arrays, {**values, **more}


def _check_near(reliable: Array, method: Any) -> None:
    """Raise ``RefusalError`` if a row is not reliable: there are no keys for it."""
    far = np.flatnonzero(~to_host(reliable).astype(bool))
    if len(far):
        shown = ", ".join(map(str, far[:5])) + (", ..." if len(far) > 5 else "")
        raise RefusalError(
            f"{len(far)} of {len(reliable)} queries (rows {shown}) are too far from "
            f"those that {method} was prepared for, or its keys have changed too much, "
            "and without the keys they cannot be computed exactly: leave them out, "
            "prepare with queries like them, or use method=Exact()"
        )


def refused_share(head: StateHead) -> float:
    """Share of the held-out queries that are refused."""
    return 1 - float(head.held_out.reliable.mean())


def same_plan(one: PreparedHead, other: PreparedHead) -> bool:
    """Whether two structures have the same plan, so that they can be merged."""
    return type(one) is type(other) and _same_state(one.plan.method, one, other)


@singledispatch
def _same_state(_method: Any, one: PreparedHead, other: PreparedHead) -> bool:
    (arrays, values), (others, more) = one.empty().pack(), other.empty().pack()
    return values == more and all(
        np.array_equal(x, others[name]) for name, x in arrays.items()
    )


@_same_state.register
def _same_buffers(_method: Exact, *_: PreparedHead) -> bool:
    # keys of any two buffers can be merged
    return True
