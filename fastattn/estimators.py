"""scikit-learn wrappers: feature maps as transformers before a linear model."""

from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastattn.linear.polynomial_sketches import TensorSketch
from fastattn.linear.protocol import Drawn
from fastattn.linear.random_features import KINDS, RandomFeatures
from sketching._lib.arrays import Array
from sketching._lib.validation import check_choice, check_integer, check_number

_DTYPES = (np.float64, np.float32)


class _Sampler(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """A feature map that is drawn in ``fit`` and applied in ``transform``."""

    def fit(self, X: Array, y: Any = None) -> Any:  # noqa: ARG002
        """Draw the map for rows of the width of ``X``."""
        X = validate_data(self, X, dtype=_DTYPES)
        self._check()
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        self.map_ = self._made(int(seed))
        self.constants_ = tuple(
            x.astype(X.dtype) for x in self.map_.draw(self.n_features_in_)
        )
        self._n_features_out = self.n_components
        return self

    def transform(self, X: Array) -> Array:
        """Return the features of the rows of ``X``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_DTYPES, reset=False)
        constants = tuple(x.astype(X.dtype) for x in self.constants_)
        scaled = X * X.dtype.type(self._factor())
        features, log = self.map_.apply(scaled, Drawn(constants))
        features = features[:, : self.n_components]
        if log is None:
            return features
        # exp(-|x - y|^2 / 2) = exp(x . y) exp(-|x|^2 / 2) exp(-|y|^2 / 2)
        half = np.sum(scaled**2, axis=1, keepdims=True) / 2
        return features * np.exp(log - half)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class RandomFeatureSampler(_Sampler):
    r"""Random features of the Gaussian kernel :math:`e^{-\gamma |x - y|^2}`.

    They are the features of :class:`fastattn.RandomFeatures` for rows times
    :math:`\sqrt{2\gamma}`, divided by :math:`e^{|x|^2/2}`. With orthogonal directions,
    and without a random offset, their variance is below that of scikit-learn's
    ``RBFSampler``.

    Parameters
    ----------
    gamma : float, default 1.0
        The factor :math:`\gamma`.
    n_components : int, default 100
        Number of features. Kinds with two features for each direction drop the last
        one if the number is odd.
    kind : {"trigonometric", "positive", "hyperbolic"}
        As in :class:`fastattn.RandomFeatures`.
    orthogonal : bool, default True
        As in :class:`fastattn.RandomFeatures`.
    random_state : int, RandomState instance or None, default None
        Source of the directions.

    Attributes
    ----------
    map_ : RandomFeatures
        The map that was drawn.
    constants_ : tuple of array
        Its directions.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.estimators import RandomFeatureSampler
    >>> X = np.random.default_rng(0).standard_normal((5, 3))
    >>> Z = RandomFeatureSampler(n_components=4096, random_state=0).fit_transform(X)
    >>> distances = np.sum((X[:, None] - X) ** 2, axis=2)
    >>> bool(np.abs(Z @ Z.T - np.exp(-distances)).max() < 0.1)
    True
    """

    def __init__(
        self,
        gamma: float = 1.0,
        n_components: int = 100,
        kind: str = "trigonometric",
        orthogonal: bool = True,
        random_state: Any = None,
    ) -> None:
        self.gamma = gamma
        self.n_components = n_components
        self.kind = kind
        self.orthogonal = orthogonal
        self.random_state = random_state

    def _check(self) -> None:
        check_number("gamma", self.gamma, above=0)
        check_integer("n_components", self.n_components, least=1)
        check_choice("kind", self.kind, KINDS)

    def _made(self, seed: int) -> RandomFeatures:
        size = self.n_components
        if self.kind != "positive":
            size = -(-size // 2)
        return RandomFeatures(size, self.kind, self.orthogonal, seed)

    def _factor(self) -> float:
        return float((2 * self.gamma) ** 0.5)


class TensorSketchSampler(_Sampler):
    r"""Sketched features of the polynomial kernel :math:`(\gamma\,x \cdot y + c)^p`.

    Parameters
    ----------
    gamma : float, default 1.0
        The factor :math:`\gamma`.
    degree : int, default 2
        The power :math:`p`.
    coef0 : float, default 0
        The constant :math:`c`, not negative.
    n_components : int, default 100
        Number of features.
    random_state : int, RandomState instance or None, default None
        Source of the sketch.

    Attributes
    ----------
    map_ : TensorSketch
        The map that was drawn.
    constants_ : tuple of array
        Its count sketches.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.estimators import TensorSketchSampler
    >>> X = np.random.default_rng(0).standard_normal((5, 3))
    >>> Z = TensorSketchSampler(n_components=8192, random_state=0).fit_transform(X)
    >>> bool(np.abs(Z @ Z.T - (X @ X.T) ** 2).max() < 1)
    True
    """

    def __init__(
        self,
        gamma: float = 1.0,
        degree: int = 2,
        coef0: float = 0.0,
        n_components: int = 100,
        random_state: Any = None,
    ) -> None:
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.n_components = n_components
        self.random_state = random_state

    def _check(self) -> None:
        check_number("gamma", self.gamma, above=0)
        check_integer("n_components", self.n_components, least=1)

    def _made(self, seed: int) -> TensorSketch:
        return TensorSketch(self.degree, self.n_components, float(self.coef0), seed)

    def _factor(self) -> float:
        return float(self.gamma**0.5)
