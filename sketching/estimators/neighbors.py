"""scikit-learn wrappers of the index: neighbours, and the graph of them."""

from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted, validate_data

from sketching._lib.arrays import Array
from sketching._lib.validation import check_choice, check_integer, check_number
from sketching.estimators.documented import documented
from sketching.estimators.fitting import fitted_aside
from sketching.estimators.metric_parameter import index_of, metric_of

DTYPES = (np.float64, np.float32)


class Indexed(BaseEstimator):  # type: ignore[misc]
    """Points in an index, and the neighbours of queries among them."""

    def _build(self, X: Array) -> None:
        """Make metric and index of checked points."""
        check_integer("n_neighbors", self.n_neighbors, least=1)
        metric = metric_of(self.metric, X, self.ridge, self.shrinkage)
        self.index_ = index_of(metric, X, self.index_mode)
        self._points = X

    @property
    def n_samples_fit_(self) -> int:
        """How many points there are, those among them that were deleted again."""
        return self.index_._engine.given

    def _extend(self, X: Array, **more: Array) -> None:
        """Insert more checked points under the metric that there is.

        ``more`` are attributes with a row for each point, and their new rows. The index
        comes last: it knows how many of the rows count.
        """
        rows = {"_points": X.astype(self._points.dtype), **more}
        count = self.n_samples_fit_
        longer = {
            name: np.concatenate([getattr(self, name)[:count], new])
            for name, new in rows.items()
        }
        self.__dict__.update(longer)
        self.index_.insert(X)

    def _neighbors(self, X: Any, k: int) -> tuple[Array, Array]:
        """Find neighbours of queries, or of the points without themselves."""
        check_integer("n_neighbors", k, least=1)
        most = self.n_samples_fit_ - (X is None)
        if k > most:
            raise ValueError(
                f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {k}, "
                f"n_samples_fit = {self.n_samples_fit_}"
                + (", of which each is left out itself" if X is None else "")
            )
        if X is not None:
            X = validate_data(self, X, dtype=DTYPES, reset=False)
            distances, numbers = self.index_.kneighbors(X, k)
            return distances, numbers
        points = self._points[: self.n_samples_fit_]
        distances, numbers = self.index_.kneighbors(points, k + 1)
        is_self = numbers == np.arange(len(numbers))[:, None]
        # among more than k duplicates a point may be missing: then the last one goes
        is_self[~is_self.any(axis=1), -1] = True
        return distances[~is_self].reshape(-1, k), numbers[~is_self].reshape(-1, k)

    def _graph(self, X: Any, k: int, mode: str) -> Any:
        """Sparse matrix of neighbours by row: ones, or distances."""
        from scipy.sparse import csr_matrix

        check_choice("mode", mode, ("connectivity", "distance"))
        distances, numbers = self._neighbors(X, k)
        data = np.ones(distances.size) if mode == "connectivity" else distances.ravel()
        starts = np.arange(0, distances.size + 1, k)
        shape = (len(distances), self.n_samples_fit_)
        return csr_matrix((data, numbers.ravel(), starts), shape=shape)


@documented
class MahalanobisNeighbors(Indexed):
    """Nearest neighbours in a Mahalanobis metric.

    Parameters
    ----------
    n_neighbors : int, default 5
        How many neighbours.
    radius : float, default 1.0
        Distance within which ``radius_neighbors`` finds neighbours.
    metric : "covariance", array, or MahalanobisMetric, default "covariance"
        The metric: of the inverse of the covariance of the points; A itself, a matrix
        that equals its transpose; a factor U of ``A = U^T U``, any other matrix; or a
        metric, which can have a symmetric factor too.
    ridge, shrinkage : float, default 0.0
        How the covariance is regularised, as in :meth:`MahalanobisMetric.from_data`.
    {index parameters}

    Attributes
    ----------
    {index attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisNeighbors
    >>> X = np.random.default_rng(0).standard_normal((100, 3))
    >>> neighbors = MahalanobisNeighbors(n_neighbors=2).fit(X)
    >>> distances, numbers = neighbors.kneighbors(X[:1])
    >>> int(numbers[0, 0]), float(distances[0, 0])
    (0, 0.0)
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        radius: float = 1.0,
        metric: Any = "covariance",
        ridge: float = 0.0,
        shrinkage: float | str = 0.0,
        index_mode: Any = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.radius = radius
        self.metric = metric
        self.ridge = ridge
        self.shrinkage = shrinkage
        self.index_mode = index_mode

    def fit(self, X: Array, y: Any = None) -> "MahalanobisNeighbors":  # noqa: ARG002
        """Put the rows of ``X`` into an index."""
        return fitted_aside(self, lambda fresh: fresh._fit(X))

    def _fit(self, X: Any) -> None:
        X = validate_data(self, X, dtype=DTYPES)
        check_number("radius", self.radius, least=0)
        self._build(X)

    def partial_fit(
        self,
        X: Array,
        y: Any = None,  # noqa: ARG002
    ) -> "MahalanobisNeighbors":
        """Insert more rows; the metric stays that of the first ones."""
        if not hasattr(self, "index_"):
            return self.fit(X)
        self._extend(validate_data(self, X, dtype=DTYPES, reset=False))
        return self

    def kneighbors(
        self,
        X: Any = None,
        n_neighbors: int | None = None,
        return_distance: bool = True,
    ) -> Any:
        """Find the nearest points of ``X``, or of each point among the others."""
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        found = self._neighbors(X, k)
        return found if return_distance else found[1]

    def radius_neighbors(
        self,
        X: Any = None,
        radius: float | None = None,
        return_distance: bool = True,
        sort_results: bool = False,
    ) -> Any:
        """Find the points within a radius; arrays of arrays, one for each row."""
        check_is_fitted(self)
        radius = check_number(
            "radius", self.radius if radius is None else radius, least=0
        )
        if X is None:
            queries = self._points[: self.n_samples_fit_]
        else:
            queries = validate_data(self, X, dtype=DTYPES, reset=False)
        distances, numbers = self.index_.radius_neighbors(queries, radius)
        for i, (near, of_near) in enumerate(zip(distances, numbers, strict=True)):
            # without themselves, and in the order of the points
            kept = of_near != i if X is None else np.ones(len(near), bool)
            order = slice(None) if sort_results else np.argsort(of_near[kept])
            distances[i], numbers[i] = near[kept][order], of_near[kept][order]
        return (distances, numbers) if return_distance else numbers

    def kneighbors_graph(
        self,
        X: Any = None,
        n_neighbors: int | None = None,
        mode: str = "connectivity",
    ) -> Any:
        """Return the sparse matrix of neighbours, of ones or of distances."""
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        return self._graph(X, k, mode)


@documented
class MahalanobisKNeighborsTransformer(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    Indexed,
):
    """Rows to the sparse graph of their nearest neighbours in a Mahalanobis metric.

    What follows in a pipeline takes it as ``metric="precomputed"``: DBSCAN, Isomap,
    TSNE, or any estimator of scikit-learn that takes a sparse graph of neighbours. The
    graph is not symmetric: a point may be among the nearest of another that is not
    among its own. Estimators that want a matrix of all distances, or a symmetric one,
    refuse it (scikit-learn's HDBSCAN, umap-learn): the larger of the entries of G and
    of its transpose, ``G.maximum(G.T)``, is symmetric, and umap-learn takes the
    neighbours themselves as ``precomputed_knn``.

    Parameters
    ----------
    mode : {"distance", "connectivity"}, default "distance"
        Whether entries are distances or ones. With distances a point that was fitted
        counts as its own first neighbour, in addition to ``n_neighbors`` others.
    n_neighbors : int, default 5
        How many neighbours.
    {metric parameters}
    {index parameters}

    Attributes
    ----------
    {index attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.cluster import DBSCAN
    >>> from sklearn.pipeline import make_pipeline
    >>> from sketching import MahalanobisKNeighborsTransformer
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.standard_normal((50, 2)) + c for c in (0, 9)])
    >>> graph = MahalanobisKNeighborsTransformer(n_neighbors=20, metric=np.eye(2))
    >>> model = make_pipeline(graph, DBSCAN(eps=2, metric="precomputed"))
    >>> labels = model.fit_predict(X)
    >>> sorted(set(labels[:50])), sorted(set(labels[50:]))
    ([np.int64(0)], [np.int64(1)])
    """

    def __init__(
        self,
        mode: str = "distance",
        *,
        n_neighbors: int = 5,
        metric: Any = "covariance",
        ridge: float = 0.0,
        shrinkage: float | str = 0.0,
        index_mode: Any = None,
    ) -> None:
        self.mode = mode
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.ridge = ridge
        self.shrinkage = shrinkage
        self.index_mode = index_mode

    def fit(self, X: Array, y: Any = None) -> Any:  # noqa: ARG002
        """Put the rows of ``X`` into an index."""
        return fitted_aside(self, lambda fresh: fresh._fit(X))

    def _fit(self, X: Any) -> None:
        X = validate_data(self, X, dtype=DTYPES)
        check_choice("mode", self.mode, ("connectivity", "distance"))
        self._build(X)
        self._n_features_out = self.n_samples_fit_

    def transform(self, X: Array) -> Any:
        """Return the graph from the rows of ``X`` to the points."""
        check_is_fitted(self)
        return self._graph(X, self.n_neighbors + (self.mode == "distance"), self.mode)
