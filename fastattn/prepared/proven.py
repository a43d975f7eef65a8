"""A head with a proven bound: its queries, keys and values must stay within extents."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import accumulation_blocks, count_blocks
from fastattn.certificates.rounding import largest_entries, largest_norm
from fastattn.methods.polynomial.recipe import PolynomialExpansion
from fastattn.prepared.states import MonomialState, Packed, pack_state
from fastattn.problem.head import Head
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, to_host
from sketching._lib.certificate import Certificate, RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class RowBounds:
    """How far rows reach under one side of a transform.

    Parameters
    ----------
    center, projection : array, shapes (d,), (d, r)
        Coordinates are ``(row - center) @ projection``.
    length, raw : float
        Largest norm of the coordinates, and of ``row - center``.
    entries : array, shape (r,)
        Largest size of each coordinate.
    """

    center: Array
    projection: Array
    length: float
    raw: float
    entries: Array

    @staticmethod
    def of(x: Array, center: Array, projection: Array) -> "RowBounds":
        """Measure rows, at least one."""
        return RowBounds(
            center,
            projection,
            largest_norm(x, center, projection),
            largest_norm(x, center),
            largest_entries(x, center, projection),
        )

    def check(self, name: str, x: Array) -> None:
        """Raise ``RefusalError`` where a row is beyond the extents."""
        found = RowBounds.of(x, self.center, self.projection)
        ratio = max(
            _share(found.length, self.length),
            _share(found.raw, self.raw),
            *map(_share, found.entries, self.entries),
        )
        if not ratio <= 1:
            raise RefusalError(
                f"{name}: rows reach {ratio:.3g} times as far as those that the bound "
                "was proven for: prepare with rows that reach as far, or use "
                "guarantee='sampled' or method=Exact()"
            )


def _share(found: float, allowed: float) -> float:
    """How many times as far; zero allows zero."""
    if found <= allowed:
        return 0.0
    share = found / allowed if allowed > 0 else math.inf
    # NaN would be lost in a maximum
    return math.inf if math.isnan(share) else share


@dataclass(frozen=True, slots=True, eq=False)
class ProvenHead:
    """Sums of monomials with the extents that their bound was proven for.

    Parameters
    ----------
    plan : Plan
        What was chosen.
    state : MonomialState
        Over all keys.
    query, key : RowBounds
        What queries and keys must stay within.
    low, high : array, shape (p,)
        What values must stay within.
    accumulation_blocks : int
        Sums that were added up.
    """

    plan: Plan
    state: MonomialState
    query: RowBounds
    key: RowBounds
    low: Array
    high: Array
    blocks: int = 0

    @staticmethod
    def of(plan: Plan, expansion: PolynomialExpansion, head: Head) -> "ProvenHead":
        """Start without keys, for rows that reach as far as those of the head."""
        xp, t = head.xp, expansion.transform
        return ProvenHead(
            plan,
            MonomialState.of(expansion, head.scale),
            *_row_bounds(t, head.query, head.key),
            _double(xp.min(head.value, axis=0)),
            _double(xp.max(head.value, axis=0)),
        )

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.state.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        sides = (self.query.entries, self.key.entries, self.low, self.high)
        return self.state.nbytes + sum(int(x.nbytes) for x in sides)

    def empty(self) -> "ProvenHead":
        """Forget the keys."""
        return replace(self, state=self.state.empty(), blocks=0)

    def insert(
        self,
        key: Array,
        value: Array,
        *,
        fold: bool = False,  # noqa: ARG002
    ) -> "ProvenHead":
        """Add keys that are within the extents."""
        if not key.shape[0]:
            return self
        self.key.check("key", key)
        xp = array_namespace(value)
        low, high = (_double(end(value, axis=0)) for end in (xp.min, xp.max))
        if np.any(low < self.low) or np.any(high > self.high):
            raise RefusalError(
                "value: entries lie outside the range of those that the bound was "
                "proven for: prepare with values of that range, or use method=Exact()"
            )
        state, cut = self.state, list(accumulation_blocks(key.shape[0]))
        for rows in cut:
            state = state.insert(key[rows, :], value[rows, :])
        return self._counted(state, len(cut))

    def merge(self, other: "ProvenHead") -> "ProvenHead":
        """Add the keys of another structure of the same plan."""
        return self._counted(self.state.merge(other.state), other.blocks)

    def _counted(self, state: MonomialState, more: int) -> "ProvenHead":
        count = count_blocks(self.blocks, more, "guarantee='sampled'")
        return replace(self, state=state, blocks=count)

    def answer(
        self,
        query: Array,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> HeadAnswer:
        """Answer queries that are within the extents."""
        self.query.check("query", query)
        head = Head(query, query, query, self.state.scale)
        if self.count:
            value, logarithm, reliable = self.state.query(query)
            if not bool(head.xp.all(reliable)) or not bool(
                head.xp.all(head.xp.isfinite(value))
            ):
                raise RefusalError(
                    "a sum of weights is not positive and finite although the bound "
                    "says so: inputs are too extreme for this precision; use Exact()"
                )
        else:
            none = Head(query, query[:0, :], query[:0, : len(self.low)], 1.0)
            value, logarithm = none.attend()
        return HeadAnswer.under(self._bound, *head.finish(value, logarithm), self.plan)

    def certificate(
        self,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Certificate:
        """The proven bound, whatever is asked for."""
        return self._bound

    @property
    def _bound(self) -> Certificate:
        return Certificate(
            self.state.expansion.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {self.plan.method.degree} on the interval "
            "of all logits within the extents that queries and keys are held to "
            "(Alman and Song 2023; relative error of weights)",
        )

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays, values = pack_state(self.state)
        arrays = {
            **arrays,
            "query_entries": self.query.entries,
            "key_entries": self.key.entries,
            "low": self.low,
            "high": self.high,
        }
        return arrays, {
            **values,
            "pieces": self.blocks,
            "query_length": self.query.length,
            "query_raw": self.query.raw,
            "key_length": self.key.length,
            "key_raw": self.key.raw,
        }


def unpack_proven(
    plan: Plan, state: MonomialState, arrays: dict[str, Array], values: dict[str, Any]
) -> ProvenHead:
    """Undo ``ProvenHead.pack``."""
    t = state.expansion.transform
    query = _unpack_bounds("query", t.query_center, t.query_map, arrays, values)
    key = _unpack_bounds("key", t.key_center, t.key_map, arrays, values)
    low, high, blocks = arrays["low"], arrays["high"], int(values["pieces"])
    return ProvenHead(plan, state, query, key, low, high, blocks)


def _unpack_bounds(
    name: str,
    center: Array,
    projection: Array,
    arrays: dict[str, Array],
    values: dict[str, Any],
) -> RowBounds:
    length, raw = float(values[f"{name}_length"]), float(values[f"{name}_raw"])
    return RowBounds(center, projection, length, raw, arrays[f"{name}_entries"])


def _row_bounds(t: Transform, query: Array, key: Array) -> tuple[RowBounds, RowBounds]:
    return (
        RowBounds.of(query, t.query_center, t.query_map),
        RowBounds.of(key, t.key_center, t.key_map),
    )


def _double(x: Array) -> Array:
    return to_host(x).astype(np.float64)
