"""Random feature maps: products of features are unbiased estimates of weights.

:class:`RandomFeatures` and :class:`RandomMaclaurin` estimate those of softmax;
:class:`TensorSketch` and :class:`PolySketch` estimate powers of logits.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastattn._ops.linear import exponentials
from fastattn.linear.protocol import Constants, Drawn, Features, seed_of
from fastattn.linear.softmax_method import SoftmaxFeatures
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.random import RandomSource
from sketching._lib.validation import check_choice, check_integer

KINDS = ("positive", "hyperbolic", "trigonometric")


@dataclass(frozen=True, slots=True)
class RandomFeatures(SoftmaxFeatures):
    r"""Random features of the exponential kernel (FAVOR+).

    With rows :math:`w` of normal numbers, :math:`e^{q \cdot k}` is the mean of

    * ``"positive"``: :math:`e^{w \cdot q - |q|^2/2} e^{w \cdot k - |k|^2/2}`, whose
      variance is :math:`e^{2 q \cdot k} (e^{|q + k|^2} - 1)`;
    * ``"hyperbolic"``: the same for both :math:`w` and :math:`-w`;
    * ``"trigonometric"``: :math:`e^{(|q|^2 + |k|^2)/2} \cos(w \cdot (q - k))`, the
      weights of which may be negative.

    It approximates softmax where logits and norms are small, and is a method for
    :func:`approximate`.

    Parameters
    ----------
    size : int, default 256
        Number of directions :math:`w`; all kinds but ``"positive"`` have two features
        for each.
    kind : {"positive", "hyperbolic", "trigonometric"}
        The kind of features.
    orthogonal : bool, default True
        Make directions orthogonal in blocks of :math:`d`; their lengths are
        distributed as those of normal vectors.
    rng : int or Generator, default 0
        Source of the directions. A generator draws an int seed, which is stored: a map
        has the same directions in every use.

    Notes
    -----
    Features are relative to the largest exponent of each row, so that they do not
    overflow. The constant 1e-4 that Performer adds to features is left out: it is a
    bias, which dominates the output in rows of peaked attention.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import RandomFeatures, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 300, 8)) * 0.5
    >>> method = RandomFeatures(size=512)
    >>> answer = approximate(query, key, value, method=method, tol=0.3, rng=0)
    >>> bool(answer.certificate.error <= 0.3)
    True

    References
    ----------
    Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.
    """

    size: int = 256
    kind: str = "positive"
    orthogonal: bool = True
    rng: RandomSource = 0

    def __post_init__(self) -> None:
        check_integer("size", self.size, least=1)
        check_choice("kind", self.kind, KINDS)
        object.__setattr__(self, "rng", seed_of(self.rng))

    def draw(self, d: int) -> Constants:
        """Draw the directions, ``(d, size)``."""
        rng = np.random.default_rng(self.rng)
        if not self.orthogonal:
            return (rng.standard_normal((d, self.size)),)
        blocks = [_orthogonal(d, rng) for _ in range(-(-self.size // d))]
        return (np.concatenate(blocks, axis=1)[:, : self.size],)

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Return the features relative to the largest of their row."""
        xp = array_namespace(x)
        along = xp.matmul(x, drawn.constants[0])
        half = xp.sum(x * x, axis=-1, keepdims=True) / 2
        if self.kind == "trigonometric":
            both = xp.concat([xp.cos(along), xp.sin(along)], axis=-1)
            return both * self.size**-0.5, half
        if self.kind == "positive":
            found, peak = exponentials(along)
            return found * self.size**-0.5, peak - half
        found, peak = exponentials(xp.concat([along, -along], axis=-1))
        return found * (2 * self.size) ** -0.5, peak - half

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:
        """Differentiate the exponents, or the angles."""
        xp = array_namespace(x)
        features, _ = self.apply(x, drawn)
        change = features * grad
        total = xp.sum(change, axis=-1, keepdims=True)
        first, second = slice(None, self.size), slice(self.size, None)
        if self.kind == "trigonometric":
            along = features[..., first] * grad[..., second]
            along = along - features[..., second] * grad[..., first]
        else:
            total, along = -total, change
            if self.kind == "hyperbolic":
                along = change[..., first] - change[..., second]
        return xp.matmul(along, xp.matrix_transpose(drawn.constants[0])) + x * total


@dataclass(frozen=True, slots=True)
class RandomMaclaurin(SoftmaxFeatures):
    r"""Random products that estimate the power series of the exponential.

    A feature is :math:`\sqrt{2^{N+1}/N!} \prod_{j \le N} \omega_j \cdot x` with random
    signs :math:`\omega_j`, where :math:`N` is :math:`k` with probability
    :math:`2^{-(k+1)}`. Weights are unbiased, may be negative, and vary much: a
    baseline that approximates softmax, and a method for :func:`approximate`.

    Parameters
    ----------
    size : int, default 256
        Number of features.
    rng : int or Generator, default 0
        As in :class:`RandomFeatures`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import RandomMaclaurin, linear_attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 50, 4)) / 4
    >>> linear_attention(query, key, value, feature_map=RandomMaclaurin(64)).shape
    (50, 4)

    References
    ----------
    Kar and Karnick, Random Feature Maps for Dot Product Kernels, arXiv 1201.6530.
    """

    size: int = 256
    rng: RandomSource = 0

    def __post_init__(self) -> None:
        check_integer("size", self.size, least=1)
        object.__setattr__(self, "rng", seed_of(self.rng))

    def draw(self, d: int) -> Constants:
        """Draw the factors, ``(size,)``, and signs for each order, ``(d, r_j)``.

        Features are sorted: those of many signs come first.
        """
        rng = np.random.default_rng(self.rng)
        order = np.sort(rng.geometric(0.5, self.size) - 1)[::-1]
        factor = [math.sqrt(2.0 ** (k + 1) / math.factorial(k)) for k in order.tolist()]
        signs = [
            rng.choice([-1.0, 1.0], (d, np.count_nonzero(order > j)))
            for j in range(int(order[0]))
        ]
        return np.array(factor) * self.size**-0.5, *signs

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Return the products."""
        xp = array_namespace(x)
        factor, *signs = drawn.constants
        parts = [xp.matmul(x, omega) for omega in signs]
        return factor * _product(x, parts, self.size), None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:
        """Differentiate factor by factor."""
        xp = array_namespace(x)
        factor, *signs = drawn.constants
        parts = [xp.matmul(x, omega) for omega in signs]
        total = xp.zeros_like(x)
        for j, omega in enumerate(signs):
            others = _product(x, parts[:j] + parts[j + 1 :], self.size)
            change = (factor * grad * others)[..., : omega.shape[1]]
            total = total + xp.matmul(change, xp.matrix_transpose(omega))
        return total


def _orthogonal(d: int, rng: np.random.Generator) -> Array:
    """Draw ``d`` orthogonal columns of a uniform direction and normal lengths."""
    basis, upper = np.linalg.qr(rng.standard_normal((d, d)))
    # LAPACK's signs depend on the input: left alone, directions would be biased
    basis = basis * np.sign(np.diag(upper))
    return basis * np.linalg.norm(rng.standard_normal((d, d)), axis=0)


def _product(x: Array, parts: list[Array], size: int) -> Array:
    """Multiply columns; a part that has fewer columns than ``size`` ends in ones."""
    xp = array_namespace(x)
    total = xp.broadcast_to(xp.ones_like(x[..., :1]), (*x.shape[:-1], size))
    for part in parts:
        width = part.shape[-1]
        total = xp.concat([total[..., :width] * part, total[..., width:]], axis=-1)
    return total
