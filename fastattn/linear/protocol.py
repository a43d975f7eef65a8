"""What a feature map is, and one that is ready for rows of a given width.

A map sends a row ``x`` to features; the weight of a key for a query is the product of
theirs. Where features would overflow, a map returns them relative to a factor of
their row, whose logarithm it returns beside them.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from sketching._lib.arrays import Array, array_namespace, compute_dtype, mover
from sketching._lib.random import RandomSource, as_generator

# what a map is made from for rows of one width: its random numbers
Constants = tuple[Array, ...]
# features and, where they have factors, the logarithms of these
Features = tuple[Array, Array | None]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What features of rows are made with: random numbers, and where the rows stand."""

    constants: Constants
    position: Array | None = None


class FeatureMap(Protocol):
    """A recipe for features: a frozen value, a random one with the seed it is of."""

    __slots__ = ()

    # whether the weights approximate exp(scale * q . k), or are others
    approximates_softmax: ClassVar[bool] = False
    # whether features depend on where a row stands
    is_positional: ClassVar[bool] = False
    # what is added to the sum of the weights of a row
    offset: ClassVar[float] = 0.0

    def default_scale(self, d: int) -> float:
        """Return the factor of logits where none is given."""
        return d**-0.5 if self.approximates_softmax else 1.0

    def draw(self, d: int) -> Constants:  # noqa: ARG002
        """Return host arrays that the map is made from."""
        return ()

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Features, ``(..., n, r)``, and logarithms of factors, ``(..., n, 1)``."""
        ...

    def vjp(self, x: Array, drawn: Drawn, slope: Array) -> Array:
        """Derivative by ``x`` of ``sum(slope * features)``.

        Factors count as constants, but where they depend on ``x`` the features are
        differentiated as if they were multiplied by them.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A feature map for rows of one width, in one library and dtype.

    Parameters
    ----------
    map : FeatureMap
        The recipe.
    constants : tuple of array
        What it drew.
    factors : tuple of float
        What queries and keys are multiplied by: their product is the scale.
    dtype : dtype
        The dtype of computation.
    """

    map: FeatureMap
    constants: Constants
    factors: tuple[float, float]
    dtype: Any

    @staticmethod
    def of(feature_map: FeatureMap, like: Array, scale: float) -> "Reader":
        """Draw a map for rows like those of ``like``."""
        dtype = compute_dtype(array_namespace(like), like.dtype)
        move = mover(like, dtype)
        constants = tuple(move(x) for x in feature_map.draw(like.shape[-1]))
        root = abs(scale) ** 0.5
        factors = math.copysign(root, scale), root
        return Reader(feature_map, constants, factors, dtype)

    def query(self, x: Array, position: Any = None) -> Features:
        """Features of queries with their factors' logarithms."""
        return self._apply(x, self.factors[0], position)

    def key(self, x: Array, position: Any = None) -> Features:
        """Features of keys with their factors' logarithms."""
        return self._apply(x, self.factors[1], position)

    def query_vjp(self, x: Array, position: Any, slope: Array) -> Array:
        """Derivative by queries."""
        return self._vjp(x, self.factors[0], position, slope)

    def key_vjp(self, x: Array, position: Any, slope: Array) -> Array:
        """Derivative by keys."""
        return self._vjp(x, self.factors[1], position, slope)

    def _apply(self, x: Array, factor: float, position: Any) -> Features:
        return self.map.apply(self._scaled(x, factor), self._drawn(x, position))

    def _vjp(self, x: Array, factor: float, position: Any, slope: Array) -> Array:
        drawn = self._drawn(x, position)
        return self.map.vjp(self._scaled(x, factor), drawn, slope) * factor

    def _scaled(self, x: Array, factor: float) -> Array:
        xp = array_namespace(x)
        x = xp.astype(x, self.dtype, copy=False)
        return x if factor == 1 else x * factor

    def _drawn(self, x: Array, position: Any) -> Drawn:
        if not self.map.is_positional:
            return Drawn(self.constants)
        return Drawn(self.constants, mover(x, self.dtype)(position))


def seed_of(rng: RandomSource) -> int:
    """Return an int as it is, or draw one: a map is the same wherever it is used."""
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool) and rng >= 0:
        return int(rng)
    return int(as_generator(rng).integers(2**63))
