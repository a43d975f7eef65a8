"""A head with a proven bound: its queries, keys and values must stay within extents."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import count_pieces, pieces
from fastattn.certificates.rounding import largest_entries, largest_norm
from fastattn.methods.polynomial.recipe import Recipe
from fastattn.prepared.states import MonomialSums, Packed, pack_sums
from fastattn.problem.head import Head
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, to_host
from sketching._lib.certificate import Certificate, RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
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
    def of(x: Array, center: Array, projection: Array) -> "Extent":
        """Measure rows, at least one."""
        return Extent(
            center,
            projection,
            largest_norm(x, center, projection),
            largest_norm(x, center),
            largest_entries(x, center, projection),
        )

    def check(self, name: str, x: Array) -> None:
        """Raise ``RefusalError`` where a row is beyond the extents."""
        found = Extent.of(x, self.center, self.projection)
        reach = max(
            _share(found.length, self.length),
            _share(found.raw, self.raw),
            *map(_share, found.entries, self.entries),
        )
        if not reach <= 1:
            raise RefusalError(
                f"{name}: rows reach {reach:.3g} times as far as those that the bound "
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
    sums : MonomialSums
        Over all keys.
    query, key : Extent
        What queries and keys must stay within.
    low, high : array, shape (p,)
        What values must stay within.
    pieces : int
        Sums that were added up.
    """

    plan: Plan
    sums: MonomialSums
    query: Extent
    key: Extent
    low: Array
    high: Array
    pieces: int = 0

    @staticmethod
    def of(plan: Plan, recipe: Recipe, head: Head) -> "ProvenHead":
        """Start without keys, for rows that reach as far as those of the head."""
        xp, t = head.xp, recipe.transform
        return ProvenHead(
            plan,
            MonomialSums.of(recipe, head.scale),
            *_extents(t, head.query, head.key),
            _double(xp.min(head.value, axis=0)),
            _double(xp.max(head.value, axis=0)),
        )

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.sums.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        sides = (self.query.entries, self.key.entries, self.low, self.high)
        return self.sums.nbytes + sum(int(x.nbytes) for x in sides)

    def empty(self) -> "ProvenHead":
        """Forget the keys."""
        return replace(self, sums=self.sums.empty(), pieces=0)

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
        sums, cut = self.sums, list(pieces(key.shape[0]))
        for rows in cut:
            sums = sums.insert(key[rows, :], value[rows, :])
        return self._counted(sums, len(cut))

    def merge(self, other: "ProvenHead") -> "ProvenHead":
        """Add the keys of another structure of the same plan."""
        return self._counted(self.sums.merge(other.sums), other.pieces)

    def _counted(self, sums: MonomialSums, more: int) -> "ProvenHead":
        count = count_pieces(self.pieces, more, "guarantee='sampled'")
        return replace(self, sums=sums, pieces=count)

    def answer(
        self,
        query: Array,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> HeadAnswer:
        """Answer queries that are within the extents."""
        self.query.check("query", query)
        head = Head(query, query, query, self.sums.scale)
        if self.count:
            value, logarithm, good = self.sums.query(query)
            if not bool(head.xp.all(good)) or not bool(
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
            self.sums.recipe.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {self.plan.method.degree} on the interval "
            "of all logits within the extents that queries and keys are held to "
            "(Alman and Song 2023; relative error of weights)",
        )

    def pack(self) -> Packed:
        """Arrays and plain values."""
        arrays, values = pack_sums(self.sums)
        arrays = {
            **arrays,
            "query_entries": self.query.entries,
            "key_entries": self.key.entries,
            "low": self.low,
            "high": self.high,
        }
        return arrays, {
            **values,
            "pieces": self.pieces,
            "query_length": self.query.length,
            "query_raw": self.query.raw,
            "key_length": self.key.length,
            "key_raw": self.key.raw,
        }


def unpack_proven(
    plan: Plan, sums: MonomialSums, arrays: dict[str, Array], values: dict[str, Any]
) -> ProvenHead:
    """Undo ``ProvenHead.pack``."""
    t = sums.recipe.transform
    query = _unpack_extent("query", t.query_center, t.query_map, arrays, values)
    key = _unpack_extent("key", t.key_center, t.key_map, arrays, values)
    low, high, pieces = arrays["low"], arrays["high"], int(values["pieces"])
    return ProvenHead(plan, sums, query, key, low, high, pieces)


def _unpack_extent(
    name: str,
    center: Array,
    projection: Array,
    arrays: dict[str, Array],
    values: dict[str, Any],
) -> Extent:
    length, raw = float(values[f"{name}_length"]), float(values[f"{name}_raw"])
    return Extent(center, projection, length, raw, arrays[f"{name}_entries"])


def _extents(t: Transform, query: Array, key: Array) -> tuple[Extent, Extent]:
    return (
        Extent.of(query, t.query_center, t.query_map),
        Extent.of(key, t.key_center, t.key_map),
    )


def _double(x: Array) -> Array:
    return to_host(x).astype(np.float64)
