"""KV buffers of the factors of tensor attention, and insertion into factors."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.prepared.kv_buffer import KVBuffer, bytes_of
from fastattn.prepared.rows import Rows
from fastattn.prepared.states import Packed
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.tensor.exact import exact_plan, solve_exact
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, mover, to_host
from sketching._lib.certificate import Certificate


@dataclass(frozen=True, slots=True, eq=False)
class TensorExactHead:
    """The keys and values of every factor.

    Parameters
    ----------
    plan : Plan
        With the reason for exact attention.
    scale : float
        The factor of the logits.
    buffers : tuple of KVBuffer
        The keys and values.
    sample : array, shape (k, d)
        Queries that ``certificate`` is about.
    """

    plan: Plan
    scale: float
    buffers: tuple[KVBuffer, ...]
    sample: Array

    @property
    def count(self) -> Any:
        """Number of keys of each factor."""
        return tuple(x.count for x in self.buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(x.nbytes for x in self.buffers) + bytes_of(self.sample)

    def empty(self) -> "TensorExactHead":
        """Return the structure without keys."""
        return replace(self, buffers=tuple(x.empty() for x in self.buffers))

    def insert_into(self, factor: int, key: Array, value: Array) -> "TensorExactHead":
        """Add keys to one factor."""
        buffers = list(self.buffers)
        buffers[factor] = buffers[factor].append(key, value)
        return replace(self, buffers=tuple(buffers))

    def merge(self, other: "TensorExactHead") -> "TensorExactHead":
        """Add the keys of another structure, factor by factor."""
        merged = self
        for s, buffer in enumerate(other.buffers):
            merged = merged.insert_into(s, buffer.key, buffer.value)
        return merged

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries exactly, with the bound of ``Exact()``."""
        keys, values = (
            tuple(getattr(x, name) for x in self.buffers) for name in ("key", "value")
        )
        head = TensorHead(query, keys, values, self.scale)
        plan = exact_plan(head, self.plan.method, self.plan.reason)
        return solve_exact(head, tol, guarantee, rng, plan)

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """The certificate of the answers to the sample of queries."""
        return self.answer(self.sample, tol, guarantee, rng).certificate

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays = {"sample": to_host(self.sample)}
        for s, buffers in enumerate(self.buffers):
            arrays[f"key_{s}"] = to_host(buffers.key)
            arrays[f"value_{s}"] = to_host(buffers.value)
        return arrays, {"scale": self.scale, "factors": len(self.buffers)}

    @staticmethod
    def unpack(
        plan: Plan, arrays: dict[str, Array], values: dict[str, Any], like: Array
    ) -> "TensorExactHead":
        """Undo ``pack``."""
        move = mover(like, like.dtype)
        buffers = []
        for s in range(values["factors"]):
            key, value = move(arrays[f"key_{s}"]), move(arrays[f"value_{s}"])
            buffers.append(KVBuffer(key, value, key.shape[0]))
        sample = move(arrays["sample"])
        return TensorExactHead(plan, float(values["scale"]), tuple(buffers), sample)


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """One factor of a structure, with the ``insert`` of a pairwise structure."""

    head: Any
    factor: int

    def insert(self, key: Array, value: Array, *, fold: bool) -> "_Factor":  # noqa: ARG002
        """Add keys."""
        return replace(self, head=self.head.insert_into(self.factor, key, value))


def insert_factors(head: Any, rows: dict[int, Rows]) -> Any:
    """Add rows to the factors with the given indices."""
    for s, own in rows.items():
        grown: Any = own.insert_into(_Factor(head, s), fold=False)  # type: ignore[arg-type]
        head = grown.head
    return head
