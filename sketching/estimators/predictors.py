"""scikit-learn wrappers of prediction: votes and means of neighbours in a metric."""

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from sketching._lib.arrays import Array
from sketching._lib.validation import check_choice
from sketching.estimators.documented import documented
from sketching.estimators.fitting import fitted_aside
from sketching.estimators.neighbors import DTYPES, Indexed


class _Predictor(Indexed):
    """Neighbours with weights."""

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: str = "uniform",
        metric: Any = "covariance",
        ridge: float = 0.0,
        shrinkage: float | str = 0.0,
        index_mode: Any = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.weights = weights
        self.metric = metric
        self.ridge = ridge
        self.shrinkage = shrinkage
        self.index_mode = index_mode

    def _check(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        X, y = validate_data(self, X, y, dtype=DTYPES, multi_output=True, reset=reset)
        check_choice("weights", self.weights, ("uniform", "distance"))
        return X, y

    def _weighted(self, X: Any) -> tuple[Array, Array]:
        """Neighbours of queries and their weights, which sum to one."""
        distances, numbers = self._neighbors(X, self.n_neighbors)
        if self.weights == "uniform":
            return numbers, np.full(numbers.shape, 1 / numbers.shape[1])
        # points at distance zero take all the weight
        is_zero = distances == 0
        inverse = 1 / np.where(is_zero, 1.0, distances)
        has_zero = is_zero.any(axis=1, keepdims=True)
        weights = np.where(has_zero, is_zero.astype(np.float64), inverse)
        return numbers, weights / weights.sum(axis=1, keepdims=True)


@documented
class MahalanobisKNeighborsClassifier(
    ClassifierMixin,  # type: ignore[misc]
    _Predictor,
):
    """Classifier by the votes of the nearest neighbours in a Mahalanobis metric.

    Parameters
    ----------
    n_neighbors : int, default 5
        How many neighbours vote.
    weights : {"uniform", "distance"}, default "uniform"
        Whether votes weigh the same, or by the inverse of the distance.
    {metric parameters}
    {index parameters}

    Attributes
    ----------
    classes_ : array
        The classes.
    {index attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisKNeighborsClassifier
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((200, 2)) * [1.0, 100.0]
    >>> y = (X[:, 0] > 0).astype(int)
    >>> model = MahalanobisKNeighborsClassifier().fit(X[:100], y[:100])
    >>> bool(model.score(X[100:], y[100:]) > 0.9)
    True
    """

    def fit(self, X: Array, y: Array) -> "MahalanobisKNeighborsClassifier":
        """Put the rows of ``X`` into an index and remember their classes."""
        return fitted_aside(self, lambda fresh: fresh._fit(X, y))

    def _fit(self, X: Any, y: Any) -> None:
        X, y = self._checked(X, y, reset=True)
        self._build(X)
        self.classes_, self._codes = np.unique(y, return_inverse=True)

    def partial_fit(
        self, X: Array, y: Array, classes: Array | None = None
    ) -> "MahalanobisKNeighborsClassifier":
        """Insert more rows; the metric stays that of the first ones.

        ``classes`` are all that will come; needed in the first call.
        """
        is_first = not hasattr(self, "index_")
        given = None if classes is None else np.unique(classes)
        known = given if is_first else self.classes_
        if known is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if given is not None and not np.array_equal(given, known):
            raise ValueError(f"classes: expected those of the first call, {known}")
        if is_first:
            return fitted_aside(self, lambda fresh: fresh._begin(X, y, known))
        X, y = self._known(X, y, known, reset=False)
        self._extend(X, _codes=np.searchsorted(known, y))
        return self

    def _begin(self, X: Any, y: Any, known: Array) -> None:
        X, y = self._known(X, y, known, reset=True)
        self._build(X)
        self.classes_, self._codes = known, np.searchsorted(known, y)

    def _known(
        self, X: Any, y: Any, known: Array, *, reset: bool
    ) -> tuple[Array, Array]:
        """Check rows whose classes are among those of the first call."""
        X, y = self._checked(X, y, reset=reset)
        unknown = np.setdiff1d(y, known)
        if len(unknown):
            raise ValueError(f"y: expected classes of {known}, got {unknown}")
        return X, y

    def predict(self, X: Array) -> Array:
        """Return the class with the most votes; of several the first."""
        shares = self.predict_proba(X)
        return self.classes_[shares.argmax(axis=1)]

    def predict_proba(self, X: Array) -> Array:
        """Return the shares of the votes, a column for each of ``classes_``."""
        check_is_fitted(self)
        numbers, weights = self._weighted(X)
        shares = np.zeros((len(numbers), len(self.classes_)))
        rows = np.arange(len(numbers))[:, None]
        np.add.at(shares, (rows, self._codes[numbers]), weights)
        return shares

    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        X, y = self._check(X, y, reset=reset)
        check_classification_targets(y)
        return X, column_or_1d(y, warn=True)


@documented
class MahalanobisKNeighborsRegressor(
    RegressorMixin,  # type: ignore[misc]
    _Predictor,
):
    """Regression by the mean of the nearest neighbours in a Mahalanobis metric.

    Parameters
    ----------
    n_neighbors : int, default 5
        How many neighbours.
    weights : {"uniform", "distance"}, default "uniform"
        Whether targets weigh the same, or by the inverse of the distance.
    {metric parameters}
    {index parameters}

    Attributes
    ----------
    {index attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisKNeighborsRegressor
    >>> X = np.arange(20.0)[:, None]
    >>> model = MahalanobisKNeighborsRegressor(3).fit(X, 2 * X[:, 0])
    >>> model.predict(np.array([[7.1]]))
    array([14.])
    """

    def fit(self, X: Array, y: Array) -> "MahalanobisKNeighborsRegressor":
        """Put the rows of ``X`` into an index and remember their targets."""
        return fitted_aside(self, lambda fresh: fresh._fit(X, y))

    def _fit(self, X: Any, y: Any) -> None:
        X, y = self._check(X, y, reset=True)
        self._build(X)
        self._targets = y

    def partial_fit(self, X: Array, y: Array) -> "MahalanobisKNeighborsRegressor":
        """Insert more rows; the metric stays that of the first ones."""
        if not hasattr(self, "index_"):
            return self.fit(X, y)
        X, y = self._check(X, y, reset=False)
        if y.shape[1:] != self._targets.shape[1:]:
            raise ValueError(
                f"y: expected shape (n, {self._targets.shape[1:]}), got {y.shape}"
            )
        self._extend(X, _targets=y)
        return self

    def predict(self, X: Array) -> Array:
        """Return the weighted means of the neighbours' targets."""
        check_is_fitted(self)
        numbers, weights = self._weighted(X)
        return np.einsum("qk,qk...->q...", weights, self._targets[numbers])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.single_output = True
        tags.target_tags.multi_output = True
        return tags
