"""Key-value states: sums over keys that answer queries without the keys.

The states of the polynomial methods are here. Another family of feature maps needs a
class with the same methods, and a name in ``_KINDS``.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from fastattn.methods.lowrank.basis import Basis, Hermite
from fastattn.methods.lowrank.structure import LowRank, no_bounds
from fastattn.methods.lowrank.whitening import Whitening
from fastattn.methods.polynomial.expansions import IndexSet
from fastattn.methods.polynomial.moments import Moments
from fastattn.methods.polynomial.polynomial_expansion import PolynomialExpansion
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, mover, to_host
from sketching._lib.certificate import RefusalError

# arrays and plain values of a structure, by name
Packed = tuple[dict[str, Array], dict[str, Any]]


class KeyValueState(Protocol):
    """Sums over keys and values, to which keys can be added.

    For features ``phi`` the state is ``phi(K)^T [V, 1]``, shape ``(r, p + 1)``.
    """

    @property
    def count(self) -> int:
        """Number of keys."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        ...

    def empty(self) -> Self:
        """Return the state without keys."""
        ...

    def insert(self, key: Array, value: Array) -> Self:
        """Add keys, at least one; returns the new state."""
        ...

    def merge(self, other: Self) -> Self:
        """Add the keys of another state of the same plan; returns the new state."""
        ...

    def query(self, query: Array) -> tuple[Array, Array, Array]:
        """Outputs, log-sum-exps, and a mask of reliable rows."""
        ...

    def pack(self) -> Packed:
        """Arrays on the host, and plain values."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LowRankState:
    """The state over a low-rank basis of polynomials and landmarks.

    Parameters
    ----------
    structure : LowRank
        The basis, and sums over keys of basis functions times ``[value, 1]``.
    """

    structure: LowRank

    @property
    def count(self) -> int:
        """Number of keys, far ones among them."""
        return self.structure.count + len(self.structure.far_key)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.structure.nbytes

    def empty(self) -> "LowRankState":
        """Return the state without keys."""
        return LowRankState(self.structure.emptied())

    def insert(self, key: Array, value: Array) -> "LowRankState":
        """Add keys, at least one; returns the new state."""
        return LowRankState(self.structure.insert(key, value))

    def merge(self, other: "LowRankState") -> "LowRankState":
        """Add the keys of another state; returns the new state."""
        return LowRankState(self.structure.merge(other.structure))

    def query(self, query: Array) -> tuple[Array, Array, Array]:
        """Outputs, log-sum-exps, and a mask of reliable rows."""
        return self.structure.query(query)

    def pack(self) -> Packed:
        """Arrays on the host, and plain values."""
        held, basis = self.structure, self.structure.basis
        parts = {"": held, "frame_": basis.whitening, "hermite_": basis.hermite}
        arrays = {
            prefix + name: getattr(part, _ATTRIBUTES.get(name, name))
            for (prefix, part), names in zip(parts.items(), _LOWRANK, strict=True)
            for name in names
        }
        arrays["landmarks"] = basis.landmarks
        values = {name: float(getattr(basis.whitening, name)) for name in _WHITENING}
        return arrays, {"count": held.count, **values}

    @staticmethod
    def unpack(
        arrays: dict[str, Array],
        values: dict[str, Any],
        xp: Any,  # noqa: ARG004
    ) -> "LowRankState":
        """Undo ``pack``."""
        own, whitening, hermite = (
            {_ATTRIBUTES.get(name, name): arrays[prefix + name] for name in names}
            for prefix, names in zip(("", "frame_", "hermite_"), _LOWRANK, strict=True)
        )
        basis = Basis.factorised(
            Whitening(
                **whitening, **{name: float(values[name]) for name in _WHITENING}
            ),
            Hermite(**hermite),
            arrays["landmarks"],
        )
        return LowRankState(LowRank(basis=basis, count=int(values["count"]), **own))


# names in files: arrays of the structure, its whitening and its polynomials; then
# numbers of the whitening
_LOWRANK = (
    ("middle", "sums", "bounds", "far_key", "far_value", "weights"),
    ("center", "to_key", "to_query", "origin", "spread"),
    ("parent", "coordinate", "power", "factorial"),
)
# attributes whose names in files are older
_ATTRIBUTES = {"middle": "value_center"}
_WHITENING = ("offset", "limit", "longest", "share", "scale")


@dataclass(frozen=True, slots=True, eq=False)
class MonomialState:
    """The state over monomials, in float64 on the host.

    Parameters
    ----------
    expansion : PolynomialExpansion
        Coordinates, monomials and coefficients.
    scale : float
        The factor of the logits.
    count : int
        Number of keys.
    total : array, shape (r, p + 1)
        Sum over keys of monomial times weight times ``[value - value_center, 1]``.
    bounds : array, shape (2, p)
        Minimum and maximum of each column of the values.
    """

    expansion: PolynomialExpansion
    scale: float
    count: int
    total: Array
    bounds: Array

    @staticmethod
    def of(expansion: PolynomialExpansion, scale: float) -> "MonomialState":
        """Start without keys."""
        p = len(expansion.value_center)
        total = np.zeros((len(expansion.index), p + 1))
        return MonomialState(expansion, scale, 0, total, no_bounds(p))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(int(x.nbytes) for x in self.pack()[0].values())

    def empty(self) -> "MonomialState":
        """Return the state without keys."""
        return MonomialState.of(self.expansion, self.scale)

    def insert(self, key: Array, value: Array) -> "MonomialState":
        """Add keys, at least one; returns the new state."""
        xp = array_namespace(value)
        part = self.expansion.moments_of(key, value, self.scale)
        low, high = (
            to_host(end(value, axis=0)).astype(np.float64) for end in (xp.min, xp.max)
        )
        total = to_host(part.sums).astype(np.float64)
        added = replace(
            self, count=key.shape[0], total=total, bounds=np.stack([low, high])
        )
        return self.merge(added)

    def merge(self, other: "MonomialState") -> "MonomialState":
        """Add the keys of another state; returns the new state."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = self.total + other.total
        if not np.isfinite(total).all():
            raise RefusalError("sums over keys overflow: the inputs are too extreme")
        low = np.minimum(self.bounds[0], other.bounds[0])
        high = np.maximum(self.bounds[1], other.bounds[1])
        return replace(
            self,
            count=self.count + other.count,
            total=total,
            bounds=np.stack([low, high]),
        )

    def query(self, query: Array) -> tuple[Array, Array, Array]:
        """Outputs, log-sum-exps, and a mask of reliable rows."""
        expansion, xp = self.expansion, array_namespace(query)
        move = mover(query, expansion.dtype)
        moments = Moments(
            expansion.transform,
            expansion.index,
            expansion.value_center,
            self.scale,
            move(self.total),
        )
        value, logarithm, reliable = moments.query(query, expansion.coefficients)
        reliable = xp.logical_and(reliable, xp.all(xp.isfinite(value), axis=1))
        # a mean is within the range of the values
        low, high = move(self.bounds)[0, :], move(self.bounds)[1, :]
        return xp.minimum(xp.maximum(value, low), high), logarithm, reliable

    def pack(self) -> Packed:
        """Arrays on the host, and plain values."""
        expansion = self.expansion
        parts = {"transform_": expansion.transform, "index_": expansion.index}
        arrays = {
            prefix + name: getattr(part, name)
            for (prefix, part), names in zip(parts.items(), _MONOMIAL, strict=True)
            for name in names
        }
        arrays |= {"total": self.total, "bounds": self.bounds}
        arrays |= {
            "middle": expansion.value_center,
            "coefficients": expansion.coefficients,
        }
        dtype = str(expansion.dtype).rpartition(".")[2].strip("'> ")
        bound = expansion.bound
        return arrays, {
            "count": self.count, "scale": self.scale, "dtype": dtype, "bound": bound
        }  # fmt: skip

    @staticmethod
    def unpack(
        arrays: dict[str, Array], values: dict[str, Any], xp: Any
    ) -> "MonomialState":
        """Undo ``pack``, for arrays of the namespace ``xp``."""
        transform, index = (
            {name: arrays[prefix + name] for name in names}
            for prefix, names in zip(("transform_", "index_"), _MONOMIAL, strict=True)
        )
        expansion = PolynomialExpansion(
            Transform(**transform),
            IndexSet(**index),
            arrays["coefficients"],
            arrays["middle"],
            {"float32": xp.float32, "float64": xp.float64}[values["dtype"]],
            float(values["bound"]),
        )
        return MonomialState(
            expansion,
            float(values["scale"]),
            int(values["count"]),
            arrays["total"],
            arrays["bounds"],
        )


_MONOMIAL = (
    ("query_center", "key_center", "query_map", "key_map", "tilt", "scales"),
    ("parent", "coordinate", "degree", "multiplicity"),
)


def pack_state(state: KeyValueState) -> Packed:
    """Pack a state with the name of its kind."""
    arrays, values = state.pack()
    kind = next(name for name, of in _KINDS.items() if isinstance(state, of))
    return arrays, {"sums": kind, **values}


def unpack_state(
    arrays: dict[str, Array], values: dict[str, Any], xp: Any
) -> KeyValueState:
    """Undo ``pack_state``, for arrays of the namespace ``xp``."""
    found: KeyValueState = _KINDS[values["sums"]].unpack(arrays, values, xp)
    return found


_KINDS: dict[str, Any] = {"lowrank": LowRankState, "monomials": MonomialState}
