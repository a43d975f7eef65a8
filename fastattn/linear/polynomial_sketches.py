"""Random features of polynomial kernels, in place of the weights of softmax."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastattn._ops.linear import squares
from fastattn.linear.feature_maps import pairs_vjp
from fastattn.linear.protocol import Constants, Drawn, FeatureMap, Features, seed_of
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.random import RandomSource
from sketching._lib.validation import check_integer, check_number
from sketching.projections import tensor_sketch as projections


@dataclass(frozen=True, slots=True)
class TensorSketch(FeatureMap):
    r"""Sketched features of :math:`(c + s\,q \cdot k)^p`.

    It replaces softmax. Weights are unbiased; those of few features may be negative.

    Parameters
    ----------
    degree : int, default 2
        The power :math:`p`.
    size : int, default 256
        Number of features.
    constant : float, default 0
        The constant :math:`c`, not negative.
    rng : int or Generator, default 0
        Source of the sketch. A generator draws an int seed, which is stored: a map has
        the same sketch in every use.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import TensorSketch, linear_attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 50, 4))
    >>> linear_attention(query, key, value, feature_map=TensorSketch(size=64)).shape
    (50, 4)

    References
    ----------
    Pham and Pagh, Fast and Scalable Polynomial Kernels via Explicit Feature Maps,
    doi 10.1145/2487575.2487591.
    """

    degree: int = 2
    size: int = 256
    constant: float = 0.0
    rng: RandomSource = 0

    def __post_init__(self) -> None:
        check_integer("degree", self.degree, least=1)
        check_integer("size", self.size, least=1)
        check_number("constant", self.constant, least=0)
        object.__setattr__(self, "rng", seed_of(self.rng))

    def draw(self, d: int) -> Constants:
        """Draw the count sketches, of a row with the root of the constant."""
        width = d + (self.constant > 0)
        return projections.TensorSketch.draw(
            width, size=self.size, degree=self.degree, rng=self.rng
        ).matrices

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Sketch the rows."""
        return projections.TensorSketch(drawn.constants).apply(self._extended(x)), None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:
        """Differentiate the convolution."""
        sketch = projections.TensorSketch(drawn.constants)
        return sketch.vjp(self._extended(x), grad)[..., : x.shape[-1]]

    def _extended(self, x: Array) -> Array:
        if self.constant == 0:
            return x
        xp = array_namespace(x)
        last = xp.ones_like(x[..., :1]) * self.constant**0.5
        return xp.concat([x, last], axis=-1)


@dataclass(frozen=True, slots=True)
class PolySketch(FeatureMap):
    r"""Features of a power of logits, with weights that are squares: never negative.

    Sketches are :math:`S_1(x) = x` and :math:`S_{2p}(x) = r^{-1/2} (S_p(x) G) \circ
    (S_p(x) G')` with normal :math:`G, G'`. The weight of a key is :math:`(S_{p/2}(q)
    \cdot S_{p/2}(k))^2`, near :math:`(s\,q \cdot k)^p`; one is added to the sum of the
    weights of a row. It replaces softmax; rows are meant to come from a layer norm.

    Parameters
    ----------
    degree : int, default 4
        The power :math:`p`: 2, 4, 8 or 16.
    size : int, default 32
        The width :math:`r` of the sketches; there are :math:`r (r + 1) / 2` features.
        Degree 2 needs no sketch and has the width of the rows.
    rng : int or Generator, default 0
        As in :class:`TensorSketch`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import PolySketch, linear_attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 50, 4))
    >>> linear_attention(query, key, value, feature_map=PolySketch(size=8)).shape
    (50, 4)

    References
    ----------
    Kacham, Mirrokni and Zhong, PolySketchFormer, arXiv 2310.01655.
    """

    degree: int = 4
    size: int = 32
    rng: RandomSource = 0

    offset: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_integer("size", self.size, least=1)
        if self.degree not in (2, 4, 8, 16):
            raise ValueError(f"degree: expected 2, 4, 8 or 16, got {self.degree!r}")
        object.__setattr__(self, "rng", seed_of(self.rng))

    def default_scale(self, d: int) -> float:
        """Return the scale that makes the logits of normalised rows at most one."""
        return 1 / d

    def draw(self, d: int) -> Constants:
        """Draw two normal matrices for each doubling of the degree."""
        rng, matrices = np.random.default_rng(self.rng), []
        doublings = self.degree.bit_length() - 2
        for level in range(doublings):
            width = d if level == 0 else self.size
            pair = rng.standard_normal((2, width, self.size)) * self.size**-0.25
            matrices += list(pair)
        return tuple(matrices)

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Return the products in pairs of the sketch."""
        sketch = self._levels(x, drawn.constants)[-1]
        start = sketch.shape[-1] + 1
        return squares(sketch)[..., start:] * 2**0.5, None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:
        """Differentiate level by level."""
        xp = array_namespace(x)
        levels, flip = self._levels(x, drawn.constants), xp.matrix_transpose
        change = pairs_vjp(levels[-1], grad * 2**0.5)
        for j in reversed(range(len(levels) - 1)):
            first, second = drawn.constants[2 * j : 2 * j + 2]
            left = xp.matmul(levels[j], first), xp.matmul(levels[j], second)
            change = xp.matmul(change * left[1], flip(first)) + xp.matmul(
                change * left[0], flip(second)
            )
        return change

    def _levels(self, x: Array, constants: Constants) -> list[Array]:
        """Sketches of degrees 1, 2, 4, ...; the first are the rows."""
        xp, levels = array_namespace(x), [x]
        for j in range(0, len(constants), 2):
            left, right = (xp.matmul(levels[-1], g) for g in constants[j : j + 2])
            levels.append(left * right)
        return levels
