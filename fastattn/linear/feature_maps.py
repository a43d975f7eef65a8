"""Feature maps without random numbers.

The weight of a key for a query is the product of their features. :class:`Taylor`
approximates the weights of softmax; the other maps have weights of their own.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from fastattn._ops.linear import elu_plus_one, positive, squares
from fastattn.linear.protocol import Drawn, FeatureMap, Features
from fastattn.linear.softmax_method import SoftmaxFeatures
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.validation import check_integer


@dataclass(frozen=True, slots=True)
class Identity(FeatureMap):
    r"""Plain linear attention: weights :math:`s\,q \cdot k`, of either sign.

    It replaces softmax. Rows whose weights nearly cancel have answers of any size.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Identity, linear_attention
    >>> key, value = np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]])
    >>> linear_attention(np.array([[2.0]]), key, value, feature_map=Identity())
    array([[0.75]])

    References
    ----------
    Deng, Song, Yuan and Zhou, Why Softmax Attention Outperforms Linear Attention,
    arXiv 2310.11685.
    """

    def apply(self, x: Array, drawn: Drawn) -> Features:  # noqa: ARG002
        """Return the rows as they are."""
        return x, None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:  # noqa: ARG002
        """Return the gradient of the features."""
        return grad


@dataclass(frozen=True, slots=True)
class EluPlusOne(FeatureMap):
    r"""Features :math:`\mathrm{elu}(x) + 1`, which are positive.

    It replaces softmax.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import EluPlusOne, linear_attention
    >>> key, value = np.array([[0.0], [2.0]]), np.array([[0.0], [1.0]])
    >>> linear_attention(np.array([[2.0]]), key, value, feature_map=EluPlusOne())
    array([[0.75]])

    References
    ----------
    Katharopoulos, Vyas, Pappas and Fleuret, Transformers are RNNs, arXiv 2006.16236.
    """

    def apply(self, x: Array, drawn: Drawn) -> Features:  # noqa: ARG002
        """Return ``x + 1`` or ``exp(x)``."""
        return elu_plus_one(x), None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:  # noqa: ARG002
        """Gradient of the features, times ``exp(x)`` where ``x`` is not positive."""
        xp = array_namespace(x)
        return grad * xp.where(x > 0, xp.ones_like(x), elu_plus_one(x))


@dataclass(frozen=True, slots=True)
class Relu(FeatureMap):
    r"""Features :math:`\max(x, 0)`.

    It replaces softmax. A row whose weights are all zero gets zeros.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Relu, linear_attention
    >>> key, value = np.array([[-1.0], [2.0]]), np.array([[0.0], [1.0]])
    >>> linear_attention(np.array([[2.0]]), key, value, feature_map=Relu())
    array([[1.]])

    References
    ----------
    Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.
    """

    def apply(self, x: Array, drawn: Drawn) -> Features:  # noqa: ARG002
        """Return the positive parts."""
        return positive(x), None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:  # noqa: ARG002
        """Gradient of the features where ``x`` is positive, else zero."""
        return _where_positive(x, grad)


@dataclass(frozen=True, slots=True)
class Cosformer(FeatureMap):
    r"""Rectified features with weights that fall off with the distance of positions.

    The weight of key :math:`j` for query :math:`i` is :math:`\mathrm{relu}(q_i) \cdot
    \mathrm{relu}(k_j) \cos(\pi (i - j) / 2M)`. It replaces softmax.

    Parameters
    ----------
    length : int
        The number :math:`M`, at least that of queries and of keys.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Cosformer, linear_attention
    >>> ones = np.ones((3, 1))
    >>> value = np.arange(3.0)[:, None]
    >>> out = linear_attention(ones, ones, value, feature_map=Cosformer(length=3))
    >>> out[:, 0].round(3)
    array([0.789, 1.   , 1.211])

    References
    ----------
    Qin et al., cosFormer: Rethinking Softmax in Attention, arXiv 2202.08791.
    """

    length: int

    is_positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("length", self.length, least=1)

    def apply(self, x: Array, drawn: Drawn) -> Features:
        """Return positive parts times the cosine, and times the sine, of positions."""
        xp = array_namespace(x)
        cosine, sine = self._turn(x, drawn.position)
        x = positive(x)
        return xp.concat([x * cosine, x * sine], axis=-1), None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:
        """Undo the rotation, and set to zero where ``x`` is not positive."""
        cosine, sine = self._turn(x, drawn.position)
        d = x.shape[-1]
        return _where_positive(x, grad[..., :d] * cosine + grad[..., d:] * sine)

    def _turn(self, x: Array, position: Array | None) -> tuple[Array, Array]:
        xp = array_namespace(x)
        if position is None or bool(xp.any(position >= self.length)):
            raise ValueError(
                f"feature_map: Cosformer(length={self.length}) is for fewer rows than "
                "were given"
            )
        angle = position[:, None] * (math.pi / 2 / self.length)
        return xp.cos(angle), xp.sin(angle)


@dataclass(frozen=True, slots=True)
class Taylor(SoftmaxFeatures):
    r"""Weights :math:`1 + t + t^2/2` of the logits :math:`t`, which are positive.

    It approximates softmax where logits are small, and is a method for
    :func:`approximate`. There are :math:`1 + d + d(d + 1)/2` features; Based projects
    queries and keys to 16 dimensions first.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Taylor, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 300, 8)) * 0.4
    >>> answer = approximate(query, key, value, method=Taylor(), tol=3e-2, rng=0)
    >>> bool(answer.certificate.error <= 3e-2)
    True

    References
    ----------
    Arora et al., Simple Linear Attention Language Models Balance the
    Recall-Throughput Tradeoff, arXiv 2402.18668.
    """

    def apply(self, x: Array, drawn: Drawn) -> Features:  # noqa: ARG002
        """Return one, the entries, and their products in pairs."""
        return squares(x), None

    def vjp(self, x: Array, drawn: Drawn, grad: Array) -> Array:  # noqa: ARG002
        """Differentiate the products."""
        d = x.shape[-1]
        return grad[..., 1 : d + 1] + pairs_vjp(x, grad[..., d + 1 :])


def pairs_vjp(x: Array, grad: Array) -> Array:
    """Gradient with respect to ``x`` of its products in pairs, as of ``squares``."""
    xp = array_namespace(x)
    d, place = x.shape[-1], 0
    total = xp.zeros_like(x)
    for a in range(d):
        some = grad[..., place : place + d - a]
        place += d - a
        square, others = some[..., :1] * (2**0.5 * x[..., a : a + 1]), some[..., 1:]
        own = square + xp.sum(others * x[..., a + 1 :], axis=-1, keepdims=True)
        rest = others * x[..., a : a + 1]
        total = total + xp.concat([xp.zeros_like(x[..., :a]), own, rest], axis=-1)
    return total


def _where_positive(x: Array, other: Array) -> Array:
    xp = array_namespace(x)
    return xp.where(x > 0, other, xp.zeros_like(other))
