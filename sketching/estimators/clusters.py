"""scikit-learn wrappers of k-means and k-medians in a Mahalanobis metric."""

from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from sketching._lib.arrays import Array
from sketching._lib.validation import (
    check_choice,
    check_finite,
    check_integer,
    check_number,
)
from sketching._ops.assign import cluster_sums, own_distances, two_nearest
from sketching.clustering.kmeans import Clustering, lloyd
from sketching.clustering.kmedians import medians
from sketching.clustering.seeding import first_centers, squared_norms
from sketching.estimators.documented import documented
from sketching.estimators.fitting import fitted_aside
from sketching.estimators.metric_parameter import metric_of
from sketching.estimators.progress import progress
from sketching.metric.rounding import Rounding

_DTYPES = (np.float64, np.float32)


class _Clusters(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    ClusterMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Centres in a metric: found between whitened points, where it is Euclidean."""

    _run: Any
    _power: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        metric: Any = "covariance",
        ridge: float = 0.0,
        shrinkage: float | str = 0.0,
        init: Any = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        progress: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.ridge = ridge
        self.shrinkage = shrinkage
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.progress = progress
        self.random_state = random_state

    def fit(self, X: Array, y: Any = None) -> Any:  # noqa: ARG002
        """Find the clusters of the rows of ``X``."""
        return fitted_aside(self, lambda fresh: fresh._fit(X))

    def _fit(self, X: Any) -> None:
        X = self._begin(X)
        offset = X.mean(axis=0)
        points = np.ascontiguousarray(self.metric_.whiten(X - offset))
        _check_range(points)
        # as in scikit-learn the tolerance is in units of the mean variance
        tol = self.tol * float(np.mean(np.var(points, axis=0)))
        rng = self._rng()
        starts = [self._first(points, offset, rng) for _ in range(self._starts())]
        what, total = type(self).__name__, self.max_iter * len(starts)
        with progress(what, total, shown=self.progress) as advance:
            options = {"max_iter": self.max_iter, "tol": tol, "advance": advance}
            runs = (self._run(points, centers, **options) for centers in starts)
            best = min(runs, key=lambda run: run.inertia)
        self._keep(X, best)

    def _begin(self, X: Any) -> Array:
        """Check points and parameters; make the metric."""
        X = validate_data(self, X, dtype=_DTYPES)
        for name in ("n_clusters", "n_init", "max_iter"):
            check_integer(name, getattr(self, name), least=1)
        check_number("tol", self.tol, least=0)
        if len(X) < self.n_clusters:
            raise ValueError(
                f"X: expected at least n_clusters = {self.n_clusters} rows, got "
                f"n_samples={len(X)}"
            )
        metric = metric_of(self.metric, X, self.ridge, self.shrinkage)
        metric.refuse_covariance_of(X)
        self.metric_ = metric
        self._n_features_out = self.n_clusters
        return X

    def _rng(self) -> np.random.Generator:
        state = check_random_state(self.random_state)
        return np.random.default_rng(state.randint(2**31, size=4))

    def _starts(self) -> int:
        return self.n_init if isinstance(self.init, str) else 1

    def _first(self, points: Array, offset: Array, rng: np.random.Generator) -> Array:
        """Pick whitened centres to begin with."""
        if isinstance(self.init, str):
            check_choice("init", self.init, ("k-means++", "random"))
            if self.init == "random":
                return points[rng.choice(len(points), self.n_clusters, replace=False)]
            return first_centers(points, self.n_clusters, rng)
        wanted = (self.n_clusters, len(offset))
        given = np.asarray(self.init)
        if given.dtype.kind not in "fiub":
            raise TypeError(
                "init: expected 'k-means++', 'random' or an array of shape "
                f"{wanted}, got {type(self.init).__name__}"
            )
        given = given.astype(np.float64)
        if given.shape != wanted:
            raise ValueError(f"init: expected shape {wanted}, got {given.shape}")
        check_finite("init", given)
        return self.metric_.whiten(given - offset)

    def _keep(self, X: Array, found: Clustering) -> None:
        """Store the clusters; with a metric of low rank whitening has no inverse."""
        weights = found.weights
        if weights is None:
            weights = np.ones(len(X))
        size = self.n_clusters
        mass = np.bincount(found.members, weights, minlength=size)
        sums = cluster_sums(X, found.members, weights, n_clusters=size)
        is_empty = mass == 0
        centers = sums / np.where(is_empty, 1, mass)[:, None]
        # fewer places than clusters: one of them has several centres
        centers[is_empty] = X[0]
        self.cluster_centers_ = centers.astype(X.dtype)
        # from the stored centres, so that these labels are those of predict
        self.labels_ = self._labels(X)
        self.n_distinct_ = len(np.unique(self.labels_))
        self.inertia_ = found.inertia
        self.n_iter_ = found.n_iter

    def predict(self, X: Array) -> Array:
        """Return the number of the nearest centre of each row."""
        return self._labels(self._checked(X))

    def transform(self, X: Array) -> Array:
        """Return the distances of each row to all centres."""
        X = self._checked(X)
        points, centers = self._whitened(X)
        out = np.empty((len(X), len(centers)), X.dtype)
        every = np.arange(len(X))
        for j in range(len(centers)):
            labels = np.full(len(X), j)
            out[:, j] = own_distances(points, centers, labels, every)
        return out

    def score(self, X: Array, y: Any = None) -> float:  # noqa: ARG002
        """Return the negative of what fitting minimises."""
        points, centers, labels = self._assigned(self._checked(X))
        apart = own_distances(points, centers, labels, np.arange(len(points)))
        return -float(np.sum(apart**self._power))

    def _checked(self, X: Any) -> Array:
        """Check rows of a fitted estimator."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=_DTYPES, reset=False)

    def _labels(self, X: Array) -> Array:
        """Numbers of the nearest centres of checked rows."""
        return self._assigned(X)[2].astype(np.int32)

    def _assigned(self, X: Array) -> tuple[Array, Array, Array]:
        """Whiten rows and find their centres."""
        points, centers = self._whitened(X)
        squares = squared_norms(centers)
        every = np.arange(len(points))
        labels, least, second = two_nearest(
            points, centers, squares.astype(points.dtype), every
        )
        # products of equal rows may be rounded differently: near ties are decided by
        # differences, which are equal for equal rows
        unit = Rounding.of(points.dtype, points.shape[1]).unit
        uncertainty = 2 * unit * (squared_norms(points) + squares.max())
        close = np.flatnonzero(second - least <= uncertainty)
        if len(close):
            apart = np.stack(
                [
                    own_distances(points, centers, np.full(len(close), j), close)
                    for j in range(len(centers))
                ]
            )
            labels[close] = apart.argmin(axis=0)
        return points, centers, labels

    def _whitened(self, X: Array) -> tuple[Array, Array]:
        """Whiten rows and centres about their midrange, to keep rounding small."""
        middle = self.cluster_centers_.mean(axis=0, dtype=np.float64)
        points, centers = (
            np.ascontiguousarray(self.metric_.whiten((x - middle).astype(X.dtype)))
            for x in (X, self.cluster_centers_)
        )
        _check_range(points)
        return points, centers

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _check_range(points: Array) -> None:
    """Raise ``ValueError`` where squared distances of whitened points overflow."""
    # of two points twice as far apart as each is from the midrange
    most = np.sqrt(float(np.finfo(points.dtype).max) / (4 * points.shape[1]))
    largest = max(-float(points.min()), float(points.max()))
    if not largest < most:
        raise ValueError(
            f"X: squared distances overflow {points.dtype}: the largest entry of the "
            f"whitened points is {largest:.3g}, expected less than {most:.3g}; scale X "
            "or the metric down"
            + ("" if points.dtype == np.float64 else ", or pass float64 arrays")
        )


@documented
class MahalanobisKMeans(_Clusters):
    """Cluster by k-means in a Mahalanobis metric.

    Parameters
    ----------
    n_clusters : int, default 8
        How many clusters.
    {metric parameters}
    init : {"k-means++", "random"} or array, shape (n_clusters, d)
        The first centres. Four candidates for each are drawn as k-means++ does, exactly
        in proportion to squared distances, and reduced by their own k-means.
    n_init : int, default 1
        How many times to start; the best result is used.
    max_iter : int, default 300
        The most steps of one start.
    tol : float, default 1e-4
        Stops when the squared moves of the centres, in units of the mean variance, are
        less.
    {run parameters}

    Attributes
    ----------
    cluster_centers_ : array, shape (n_clusters, d)
        The means of the clusters.
    labels_ : array, shape (n,)
        The cluster of each row.
    inertia_ : float
        The sum of squared distances to the nearest centres.
    {clustering attributes}
    counts_ : array, shape (n_clusters,)
        Rows that each centre has seen; what ``partial_fit`` goes on with.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisKMeans
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((100, 2)) * [1.0, 50.0]
    >>> X[50:, 0] += 12
    >>> labels = MahalanobisKMeans(2, random_state=0).fit_predict(X)
    >>> len(set(labels[:50])), len(set(labels[50:])), bool(labels[0] != labels[50])
    (1, 1, True)

    References
    ----------
    Hamerly, Making k-means Even Faster, doi 10.1137/1.9781611972801.12. Bahmani et
    al., Scalable K-Means++, arXiv 1203.6402.
    """

    _run = staticmethod(lloyd)
    _power = 2

    def _keep(self, X: Array, found: Clustering) -> None:
        super()._keep(X, found)
        self.counts_ = np.bincount(self.labels_, minlength=self.n_clusters)

    def partial_fit(self, X: Array, y: Any = None) -> "MahalanobisKMeans":  # noqa: ARG002
        """Move each centre towards the rows nearest to it, as means of all it has seen.

        The first call sets the metric, and the first centres from its rows.
        """
        return fitted_aside(self, lambda fresh: fresh._partial_fit(X))

    def _partial_fit(self, X: Any) -> None:
        if not hasattr(self, "counts_"):
            X = self._begin(X)
            offset = X.mean(axis=0)
            points = np.ascontiguousarray(self.metric_.whiten(X - offset))
            _check_range(points)
            first = self._first(points, offset, self._rng())
            squares = squared_norms(first).astype(points.dtype)
            every = np.arange(len(X))
            labels, *_ = two_nearest(points, first.astype(points.dtype), squares, every)
            self.cluster_centers_ = np.repeat(offset[None], self.n_clusters, axis=0)
            self.counts_ = np.zeros(self.n_clusters, np.int64)
            self.n_iter_ = 0
        else:
            X = self._checked(X)
            _, _, labels = self._assigned(X)
        size = self.n_clusters
        sums = cluster_sums(X, labels, np.ones(len(X)), n_clusters=size)
        arrived = np.bincount(labels, minlength=size)
        # the array may be that of the estimator this one is a copy of
        self.counts_ = self.counts_ + arrived
        change = sums - arrived[:, None] * self.cluster_centers_
        moved = self.cluster_centers_ + change / np.maximum(self.counts_, 1)[:, None]
        self.cluster_centers_ = moved.astype(self.cluster_centers_.dtype)
        self.n_iter_ += 1
        self.labels_ = labels.astype(np.int32)


@documented
class MahalanobisKMedians(_Clusters):
    """Cluster around centres of least sum of distances in a Mahalanobis metric.

    Each centre is the geometric median of its cluster, which a few far points hardly
    move.

    Parameters
    ----------
    n_clusters : int, default 8
        How many clusters.
    {metric parameters}
    init : {"k-means++", "random"} or array, shape (n_clusters, d)
        As in :class:`MahalanobisKMeans`.
    n_init : int, default 1
        How many times to start; the best result is used.
    max_iter : int, default 300
        The most steps of one start.
    tol : float, default 1e-4
        As in :class:`MahalanobisKMeans`.
    {run parameters}

    Attributes
    ----------
    cluster_centers_ : array, shape (n_clusters, d)
        The medians of the clusters.
    labels_ : array, shape (n,)
        The cluster of each row.
    inertia_ : float
        The sum of distances to the nearest centres.
    {clustering attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisKMedians
    >>> X = np.array([[0.0], [1.0], [2.0], [500.0], [501.0], [900.0]])
    >>> model = MahalanobisKMedians(2, metric=np.eye(1), random_state=0, tol=1e-9)
    >>> np.round(np.sort(model.fit(X).cluster_centers_[:, 0]), 1)
    array([  1., 501.])

    References
    ----------
    Vardi and Zhang, The multivariate L1-median and associated data depth,
    doi 10.1073/pnas.97.4.1423.
    """

    _run = staticmethod(medians)
    _power = 1
