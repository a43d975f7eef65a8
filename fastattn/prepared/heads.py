"""What is prepared for one head: its keys, or sums and a short tail of recent keys."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.methods.exact import Exact
from fastattn.prepared.held_out import Probes, pack_probes
from fastattn.prepared.kv_buffer import Kept, bytes_of
from fastattn.prepared.protocol import PreparedHead
from fastattn.prepared.states import Packed, Sums, pack_sums
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import join
from fastattn.problem.plan import HeadAnswer, Plan
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import Certificate, RefusalError

# keys of a tail: a projection onto a basis costs too much for one key at a time
TAIL = 256


@dataclass(frozen=True, slots=True, eq=False)
class ExactHead:
    """The keys and values themselves.

    Parameters
    ----------
    plan : Plan
        Says that they are kept, and why.
    scale : float
        The factor of the logits.
    kept : Kept
        The keys and values.
    sample : array, shape (k, d)
        Queries that ``certificate`` is about.
    """

    plan: Plan
    scale: float
    kept: Kept
    sample: Array

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.kept.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.kept.nbytes + bytes_of(self.sample)

    def empty(self) -> "ExactHead":
        """Forget the keys."""
        return replace(self, kept=self.kept.empty())

    def insert(
        self,
        key: Array,
        value: Array,
        *,
        fold: bool = False,  # noqa: ARG002
    ) -> "ExactHead":
        """Add keys."""
        return replace(self, kept=self.kept.append(key, value))

    def merge(self, other: "ExactHead") -> "ExactHead":
        """Add the keys of another structure."""
        return self.insert(other.kept.key, other.kept.value)

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries exactly, with the bound of ``Exact()``."""
        head = Head(query, self.kept.key, self.kept.value, self.scale)
        method: Exact = self.plan.method
        return method.solve(head, tol, guarantee, rng, self.plan.reason)

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """What is promised of the sample of queries."""
        return self.answer(self.sample, tol, guarantee, rng).certificate

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays = {"key": self.kept.key, "value": self.kept.value, "sample": self.sample}
        return {name: to_host(x) for name, x in arrays.items()}, {"scale": self.scale}


@dataclass(frozen=True, slots=True, eq=False)
class SummedHead:
    """Sums over the keys, a tail of recent ones that is answered exactly, and probes.

    Parameters
    ----------
    plan : Plan
        What was chosen.
    sums : Sums
        Over all keys but those of the tail.
    tail : Kept
        Fewer than ``TAIL`` keys.
    probes : Probes
        What the certificate rests on.
    """

    plan: Plan
    sums: Sums
    tail: Kept
    probes: Probes

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.sums.count + self.tail.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.sums.nbytes + self.tail.nbytes + self.probes.nbytes

    def empty(self) -> "SummedHead":
        """Forget the keys."""
        tail, probes = self.tail.empty(), self.probes.empty()
        return SummedHead(self.plan, self.sums.empty(), tail, probes)

    def insert(self, key: Array, value: Array, *, fold: bool = False) -> "SummedHead":
        """Add keys: to the tail while it is short, else to the sums."""
        if not fold and self.tail.count + key.shape[0] < TAIL:
            tail = self.tail.append(key, value)
            return replace(self, tail=tail, probes=self.probes.with_kept(key, value))
        folded = self._folded()
        if key.shape[0]:
            sums = folded.sums.insert(key, value)
            probes = folded.probes.with_summed(key, value)
            folded = replace(folded, sums=sums, probes=probes)
        return folded._asked()

    def merge(self, other: "SummedHead") -> "SummedHead":
        """Add the keys of another structure; the tails go into the sums."""
        mine, theirs = self._folded(), other._folded()
        sums = mine.sums.merge(theirs.sums)
        probes = mine.probes.merge(theirs.probes)
        return replace(mine, sums=sums, probes=probes)._asked()

    def _folded(self) -> "SummedHead":
        """Move the tail into the sums; the probes are still to be asked."""
        if not self.tail.count:
            return self
        sums = self.sums.insert(self.tail.key, self.tail.value)
        return SummedHead(self.plan, sums, self.tail.empty(), self.probes.fold())

    def _asked(self) -> "SummedHead":
        """Ask the sums for their answers to the probes."""
        if not self.sums.count:
            return self
        told = self.sums.query(self.probes.query)
        return replace(self, probes=self.probes.told(*told))

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries; refuse where the probes miss ``tol``, and far queries."""
        promise = self.certificate(tol, guarantee, rng)
        if not promise.error <= tol:
            raise RefusalError(
                f"{self.plan.method} misses tol={tol:g} after {self.count} keys: "
                f"{promise.error:.2e} is certified ({promise.source}); prepare anew "
                "with queries and keys like those to come, more functions, a larger "
                "tol, or method=Exact()"
            )
        head = Head(query, self.tail.key, self.tail.value, self.probes.scale)
        found = head.attend()
        if self.sums.count:
            value, logarithm, good = self.sums.query(query)
            _check_near(good, self.plan.method)
            summed = value, logarithm
            found = join(summed, found) if self.tail.count else summed
        return HeadAnswer.under(promise, *head.finish(*found), self.plan)

    def certificate(
        self,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Certificate:
        """What the probes say now, whether or not it meets ``tol``."""
        found = self.probes.error()
        return Certificate(found.upper, FAILURE, "relative-frobenius", found.source)

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays, values = pack_sums(self.sums)
        probes, more = pack_probes(self.probes)
        tail = {"key": self.tail.key, "value": self.tail.value}
        arrays |= {f"tail_{name}": to_host(x) for name, x in tail.items()} | probes
        return arrays, {**values, **more}


def _check_near(good: Array, method: Any) -> None:
    """Raise ``RefusalError`` where a row cannot be trusted: its keys are gone."""
    far = np.flatnonzero(~to_host(good).astype(bool))
    if len(far):
        shown = ", ".join(map(str, far[:5])) + (", ..." if len(far) > 5 else "")
        raise RefusalError(
            f"{len(far)} of {len(good)} queries (rows {shown}) are too far from those "
            f"that {method} was prepared for, or its keys have changed too much, and "
            "without the keys they cannot be computed exactly: leave them out, prepare "
            "with queries like them, or use method=Exact()"
        )


def refused_share(head: SummedHead) -> float:
    """Share of the probes that are refused."""
    return 1 - float(head.probes.good.mean())


def same_plan(one: PreparedHead, other: PreparedHead) -> bool:
    """Whether keys of the two may be added up."""
    if type(one) is not type(other):
        return False
    if isinstance(one.plan.method, Exact):
        return True
    (arrays, values), (others, more) = one.empty().pack(), other.empty().pack()
    return values == more and all(
        np.array_equal(x, others[name]) for name, x in arrays.items()
    )
