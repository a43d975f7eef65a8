"""A head with a proven bound, which holds for queries, keys and values in bounds."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import accumulation_blocks, count_blocks
from fastattn.certificates.rounding import largest_entries, largest_norm
from fastattn.methods.polynomial.polynomial_expansion import PolynomialExpansion
from fastattn.prepared.states import MonomialState, Packed, pack_state
from fastattn.problem.head import Head
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, to_host
from sketching._lib.certificate import Certificate, RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class RowBounds:
    """Bounds on the rows of queries or keys, in the coordinates of a polynomial.

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
        """The tightest bounds on rows, at least one."""
        return RowBounds(
            center,
            projection,
            largest_norm(x, center, projection),
            largest_norm(x, center),
            largest_entries(x, center, projection),
        )

    def check(self, name: str, x: Array) -> None:
        """Raise ``RefusalError`` where a row exceeds the bounds."""
        found = RowBounds.of(x, self.center, self.projection)
        ratio = max(
            _share(found.length, self.length),
            _share(found.raw, self.raw),
            *map(_share, found.entries, self.entries),
        )
        if not ratio <= 1:
            raise RefusalError(
                f"{name}: rows are {ratio:.3g} times as large as the bounds of the "
                "proven certificate allow: prepare with rows as large as these, or use "
                "guarantee='sampled' or method=Exact()"
            )


def _share(found: float, allowed: float) -> float:
    """``found / allowed`` if above one, else 0; NaN is infinite."""
    if found <= allowed:
        return 0.0
    share = found / allowed if allowed > 0 else math.inf
    # NaN would be lost in a maximum
    return math.inf if math.isnan(share) else share


@dataclass(frozen=True, slots=True, eq=False)
class ProvenHead:
    """A state over monomials with a proven bound.

    Parameters
    ----------
    plan : Plan
        The plan.
    state : MonomialState
        Over all keys.
    query, key : RowBounds
        Bounds on queries and keys for which the certificate is proven.
    low, high : array, shape (p,)
        The same for the values: minimum and maximum of each column.
    blocks : int
        Number of partial sums that were added, which bounds the rounding error.
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
        """Start without keys, with the bounds of the rows of a head."""
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
        """Return the structure without keys."""
        return replace(self, state=self.state.empty(), blocks=0)

    def insert(
        self,
        key: Array,
        value: Array,
        *,
        fold: bool = False,  # noqa: ARG002
    ) -> "ProvenHead":
        """Add keys that are within the bounds."""
        if not key.shape[0]:
            return self
        self.key.check("key", key)
        xp = array_namespace(value)
        low, high = (_double(end(value, axis=0)) for end in (xp.min, xp.max))
        if np.any(low < self.low) or np.any(high > self.high):
            raise RefusalError(
                "value: entries are outside of the range of the proven certificate: "
                "prepare with values of this range, or use method=Exact()"
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
        """Answer queries that are within the bounds."""
        self.query.check("query", query)
        head = Head(query, query, query, self.state.scale)
        if self.count:
            value, logarithm, reliable = self.state.query(query)
            if not bool(head.xp.all(reliable)) or not bool(
                head.xp.all(head.xp.isfinite(value))
            ):
                raise RefusalError(
                    "a sum of weights is not positive and finite, against the bound: "
                    "inputs are too extreme for this precision; use Exact()"
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
        """The proven bound."""
        return self._bound

    @property
    def _bound(self) -> Certificate:
        return Certificate(
            self.state.expansion.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {self.plan.method.degree} on the interval "
            "of all logits within the bounds on queries and keys (Alman and Song "
            "2023; relative error of weights)",
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
