r"""The protocol of feature maps, and a map drawn for rows of a given width.

A feature map :math:`\phi: \mathbb{R}^d \to \mathbb{R}^r` gives the weight
:math:`\phi(q) \cdot \phi(k)` of a key for a query. A map whose features could overflow
returns them divided by a factor :math:`e^c` of each row, together with :math:`c`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from sketching._lib.arrays import Array, array_namespace, compute_dtype, mover
from sketching._lib.random import RandomSource, as_generator

# the random arrays of a map for rows of one width
Constants = tuple[Array, ...]
# features, and the logarithms of their factors or None
Features = tuple[Array, Array | None]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The random arrays of a map, and the positions of the rows, shape ``(n,)``."""

    constants: Constants
    position: Array | None = None


class FeatureMap(Protocol):
    """Settings of a feature map: a frozen value, with the seed of a random map."""

    __slots__ = ()

    # whether the weights approximate exp(scale * q . k)
    approximates_softmax: ClassVar[bool] = False
    # whether features depend on the position of a row
    is_positional: ClassVar[bool] = False
    # a number that is added to the sum of the weights of a row
    offset: ClassVar[float] = 0.0

    def default_scale(self, d: int) -> float:
        """Return the default factor of the logits."""
        return d**-0.5 if self.approximates_softmax else 1.0

    def draw(self, d: int) -> Constants:  # noqa: ARG002
        """Draw the random arrays of the map for rows of width ``d``, on the host."""
        return ()

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Features, ``(..., n, r)``, and logarithms of factors, ``(..., n, 1)``."""
        ...

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:
        """Gradient of ``sum(grad * features * exp(log - c))`` with respect to ``x``.

        Features and ``log``, the logarithms of their factors, are functions of ``x``;
        ``c`` is the value of ``log``, held constant.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A feature map for rows of one width, in one library and dtype.

    Parameters
    ----------
    map : FeatureMap
        The map.
    constants : tuple of array
        Its random arrays.
    factors : tuple of float
        Factors of queries and of keys, whose product is the scale.
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
        """Features of queries, and the logarithms of their factors."""
        return self._apply(x, self.factors[0], position)

    def key(self, x: Array, position: Any = None) -> Features:
        """Features of keys, and the logarithms of their factors."""
        return self._apply(x, self.factors[1], position)

    def query_vjp(self, x: Array, position: Any, grad: Array) -> Array:
        """Gradient with respect to queries."""
        return self._vjp(x, self.factors[0], position, grad)

    def key_vjp(self, x: Array, position: Any, grad: Array) -> Array:
        """Gradient with respect to keys."""
        return self._vjp(x, self.factors[1], position, grad)

    def _apply(self, x: Array, factor: float, position: Any) -> Features:
        return self.map.apply(self._scaled(x, factor), self._drawn(x, position))

    def _vjp(self, x: Array, factor: float, position: Any, grad: Array) -> Array:
        drawn = self._drawn(x, position)
        return self.map.vjp(self._scaled(x, factor), drawn, grad) * factor

    def _scaled(self, x: Array, factor: float) -> Array:
        xp = array_namespace(x)
        x = xp.astype(x, self.dtype, copy=False)
        return x if factor == 1 else x * factor

    def _drawn(self, x: Array, position: Any) -> Drawn:
        if not self.map.is_positional:
            return Drawn(self.constants)
        return Drawn(self.constants, mover(x, self.dtype)(position))


def seed_of(rng: RandomSource) -> int:
    """Return an int seed: ``rng`` if it is an int, else a number drawn from it."""
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool) and rng >= 0:
        return int(rng)
    return int(as_generator(rng).integers(2**63))
