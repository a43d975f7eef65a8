"""Key-value states of the factors of tensor attention, with a proven bound.

The tuples are all combinations of one key of each factor, and a monomial of a tuple is
the product of the monomials of its keys. So the sum of a monomial over all tuples is
the product of its sums over the keys of each factor, and the state is one matrix of
such sums for each factor, to which keys of that factor can be added.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.accumulation import accumulation_blocks, count_blocks
from fastattn.methods.polynomial.expansions import IndexSet
from fastattn.prepared.states import Packed
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.tensor.logit_bounds import row_norms
from fastattn.tensor.polynomial import TensorPolynomialExpansion
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, array_namespace, mover, to_host
from sketching._lib.certificate import Certificate, RefusalError

# norms of the same rows, computed in blocks of different size, differ by less
_GIVE = 1 + 1e-13


@dataclass(frozen=True, slots=True, eq=False)
class FactorBounds:
    """Bounds on the rows of one factor, for which the certificate is proven.

    Parameters
    ----------
    low, high : array, shape (c,)
        The range of each column.
    norms : array, shape (k,)
        The largest weighted norms of order 1, 2, ... of a row, as in ``LogitBounds``;
        empty for values.
    """

    low: Array
    high: Array
    norms: Array

    @staticmethod
    def of(x: Array, weights: tuple[Array, Array] | None = None, count: int = 0) -> Any:
        """The tightest bounds on rows, at least one."""
        xp = array_namespace(x)
        low, high = (
            to_host(end(x, axis=0)).astype(np.float64) for end in (xp.min, xp.max)
        )
        norms = np.zeros(0) if weights is None else row_norms(x, *weights, count)
        return FactorBounds(low, high, np.array(norms))

    def check(
        self, name: str, x: Array, weights: tuple[Array, Array] | None = None
    ) -> None:
        """Raise ``RefusalError`` where a row exceeds the bounds."""
        found = FactorBounds.of(x, weights, len(self.norms))
        outside = (found.low < self.low) | (found.high > self.high)
        if np.any(outside):
            column = int(np.flatnonzero(outside)[0])
            raise RefusalError(
                f"{name}: column {column} has entries from {found.low[column]:.3g} to "
                f"{found.high[column]:.3g}, outside {self.low[column]:.3g} to "
                f"{self.high[column]:.3g}, for which the bound was proven: prepare "
                "with rows as large as these, or use method=Exact()"
            )
        if np.any(found.norms > self.norms * _GIVE):
            raise RefusalError(
                f"{name}: a row is longer than those for which the bound was proven: "
                "prepare with rows as large as these, or use method=Exact()"
            )


@dataclass(frozen=True, slots=True, eq=False)
class TensorStateHead:
    """Sums of monomials over the keys of each factor, with a proven bound.

    Parameters
    ----------
    plan : Plan
        The plan.
    expansion : TensorPolynomialExpansion
        Coordinates, monomials and coefficients.
    terms : array, shape (d,)
        Bound on the absolute term of each coordinate of a logit.
    largest : array, shape (k, d)
        The largest absolute coordinates of queries and keys.
    query : FactorBounds
        Bounds on the queries.
    keys, values : tuple of FactorBounds
        Bounds on keys and values of each factor.
    totals : tuple of array, shape (r, p + 1)
        Sums over the keys of each factor of monomial times ``[value, 1]``, in float64
        on the host.
    count, blocks : tuple of int
        Number of keys of each factor, and of partial sums that were added for it.
    """

    plan: Plan
    expansion: TensorPolynomialExpansion
    terms: Array
    largest: Array
    query: FactorBounds
    keys: tuple[FactorBounds, ...]
    values: tuple[FactorBounds, ...]
    totals: tuple[Array, ...]
    count: Any
    blocks: tuple[int, ...]

    @staticmethod
    def of(
        plan: Plan, expansion: TensorPolynomialExpansion, head: TensorHead
    ) -> "TensorStateHead":
        """Start without keys, with the bounds of the rows of a head."""
        sides, logit_bounds = (head.query, *head.keys), head.logit_bounds
        query, *keys = (
            FactorBounds.of(x, (largest, logit_bounds.terms), head.order)
            for x, largest in zip(sides, logit_bounds.largest, strict=True)
        )
        totals = np.zeros((len(expansion.index), head.sizes[3] + 1))
        none = (0,) * len(keys)
        return TensorStateHead(
            plan,
            expansion,
            logit_bounds.terms,
            logit_bounds.largest,
            query,
            tuple(keys),
            tuple(FactorBounds.of(x) for x in head.values),
            (totals,) * len(keys),
            none,
            none,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(int(x.nbytes) for x in self.pack()[0].values())

    def empty(self) -> "TensorStateHead":
        """Return the structure without keys."""
        none = (0,) * len(self.keys)
        totals = tuple(np.zeros_like(x) for x in self.totals)
        return replace(self, totals=totals, count=none, blocks=none)

    def insert_into(self, factor: int, key: Array, value: Array) -> "TensorStateHead":
        """Add keys that are within the bounds to one factor."""
        if not key.shape[0]:
            return self
        weights = self.largest[factor + 1], self.terms
        self.keys[factor].check(f"keys[{factor}]", key, weights)
        self.values[factor].check(f"values[{factor}]", value)
        total, cut = self.totals[factor], list(accumulation_blocks(key.shape[0]))
        for rows in cut:
            part = self.expansion.sums(factor, key[rows, :], value[rows, :])
            total = total + to_host(part).astype(np.float64)
        return self._added(factor, total, key.shape[0], len(cut))

    def merge(self, other: "TensorStateHead") -> "TensorStateHead":
        """Add the keys of another structure of the same plan, factor by factor."""
        merged = self
        pairs = zip(self.totals, other.totals, strict=True)
        for s, (mine, theirs) in enumerate(pairs):
            total = mine + theirs
            merged = merged._added(s, total, other.count[s], other.blocks[s])
        return merged

    def _added(
        self, factor: int, total: Array, count: int, more: int
    ) -> "TensorStateHead":
        """Replace the sums of a factor by ``total``, with ``count`` more keys."""
        summed = count_blocks(self.blocks[factor], more, "method=Exact()")
        if not np.isfinite(total).all():
            raise RefusalError("sums over keys overflow: the inputs are too extreme")

        def changed(x: tuple[Any, ...], new: Any) -> tuple[Any, ...]:
            return (*x[:factor], new, *x[factor + 1 :])

        return replace(
            self,
            totals=changed(self.totals, total),
            count=changed(self.count, self.count[factor] + count),
            blocks=changed(self.blocks, summed),
        )

    def answer(
        self,
        query: Array,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> HeadAnswer:
        """Answer queries that are within the bounds."""
        self.query.check("query", query, (self.largest[0], self.terms))
        # a head for its dtypes only: factors without keys
        width = self.totals[0].shape[1] - 1
        none = (query[:0, :],), (query[:0, :1],)
        head = TensorHead(query, *none, 1.0)
        xp, n = head.xp, query.shape[0]
        move = mover(query, self.expansion.dtype)
        if all(self.count):
            factors = zip(self.totals, self.count, strict=True)
            parts = (move(total / count) for total, count in factors)
            value, logarithm, reliable = self.expansion.query(query, parts)
            if not bool(xp.all(reliable)):
                raise RefusalError(
                    "a sum of weights is not positive and finite, against the bound: "
                    "inputs are too extreme for this precision; use Exact()"
                )
            logarithm = logarithm + float(np.log(np.array(self.count, float)).sum())
        else:
            value = move(np.zeros((n, width)))
            logarithm = move(np.full(n, -np.inf))
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
            self.expansion.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {self.expansion.degree} on the interval of "
            "all logits within the bounds on queries and keys (Alman and Song 2023; "
            "relative error of weights)",
        )

    def pack(self) -> Packed:
        """Arrays and plain values."""
        expansion, index = self.expansion, self.expansion.index
        arrays = {
            "maps": np.array(expansion.maps),
            "coefficients": expansion.coefficients,
            "terms": self.terms,
            "largest": self.largest,
            **{f"index_{name}": getattr(index, name) for name in _INDEX},
            **{f"total_{s}": total for s, total in enumerate(self.totals)},
        }
        for side, bounds in self._factor_bounds().items():
            arrays |= {
                f"{side}_{name}": getattr(bounds, name) for name in _FACTOR_BOUNDS
            }
        dtype = str(expansion.dtype).rpartition(".")[2].strip("'>")
        numbers = {name: getattr(expansion, name) for name in _NUMBERS}
        own = {"dtype": dtype, "count": self.count, "pieces": self.blocks}
        return arrays, {**numbers, **own}

    def _factor_bounds(self) -> dict[str, FactorBounds]:
        sides = {"query": self.query}
        for s, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            sides |= {f"key_{s}": key, f"value_{s}": value}
        return sides

    @staticmethod
    def unpack(
        plan: Plan, arrays: dict[str, Array], values: dict[str, Any], like: Array
    ) -> "TensorStateHead":
        """Undo ``pack``."""
        factors = range(len(values["count"]))

        def bounds(side: str) -> FactorBounds:
            return FactorBounds(*(arrays[f"{side}_{name}"] for name in _FACTOR_BOUNDS))

        expansion = TensorPolynomialExpansion(
            maps=tuple(arrays["maps"]),
            index=IndexSet(**{name: arrays[f"index_{name}"] for name in _INDEX}),
            coefficients=arrays["coefficients"],
            dtype=getattr(array_namespace(like), values["dtype"]),
            **{name: float(values[name]) for name in _NUMBERS},
        )
        return TensorStateHead(
            plan,
            expansion,
            arrays["terms"],
            arrays["largest"],
            bounds("query"),
            tuple(bounds(f"key_{s}") for s in factors),
            tuple(bounds(f"value_{s}") for s in factors),
            tuple(arrays[f"total_{s}"] for s in factors),
            tuple(values["count"]),
            tuple(values["pieces"]),
        )


_INDEX = ("parent", "coordinate", "degree", "multiplicity")
_FACTOR_BOUNDS = ("low", "high", "norms")
_NUMBERS = ("center", "bound", "low", "high")
