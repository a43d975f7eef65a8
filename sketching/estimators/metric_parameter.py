"""The parameters of estimators that name a metric, and the index that serves them."""

from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.validation import check_finite
from sketching.index.mahalanobis import MahalanobisIndex
from sketching.index.modes import Adaptive, Exact, Filter
from sketching.metric.mahalanobis import MahalanobisMetric


def metric_of(
    metric: Any, X: Array, ridge: float, shrinkage: float | str
) -> MahalanobisMetric:
    """Make the metric of an estimator's parameters, for points ``X``."""
    if isinstance(metric, str):
        if metric != "covariance":
            raise ValueError(
                f"metric: expected 'covariance', a matrix or a MahalanobisMetric, got "
                f"{metric!r}"
            )
        if len(X) < 2:
            raise ValueError(
                "X: expected at least 2 points for a covariance, got n_samples=1"
            )
        return MahalanobisMetric.from_data(X, ridge=ridge, shrinkage=shrinkage)
    if ridge != 0 or shrinkage != 0:
        raise ValueError(
            "ridge, shrinkage: they change the estimated covariance; expected 0 with a "
            f"metric that is given, got {ridge} and {shrinkage}"
        )
    if isinstance(metric, MahalanobisMetric):
        found = metric.copy()
    else:
        matrix = _as_matrix(metric)
        # an inverse is symmetric up to rounding only: from_matrix says if it is not
        if _looks_symmetric(matrix):
            found = MahalanobisMetric.from_matrix(matrix)
        else:
            found = MahalanobisMetric(matrix)
    if found.shape[1] != X.shape[1]:
        raise ValueError(
            f"metric: expected {X.shape[1]} columns, as many as the points, got shape "
            f"{found.shape}"
        )
    return found


def _as_matrix(metric: Any) -> Array:
    """Check what was given as a matrix."""
    matrix = np.asarray(metric)
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub":
        got = f"shape {matrix.shape}"
        if matrix.dtype.kind not in "fiub":
            got = type(metric).__name__
        more = "; numpy.diag makes a matrix of weights" if matrix.ndim == 1 else ""
        raise ValueError(
            "metric: expected 'covariance', a matrix of real numbers or a "
            f"MahalanobisMetric, got {got}{more}"
        )
    check_finite("metric", matrix.astype(np.float64))
    return matrix


def _looks_symmetric(matrix: Array) -> bool:
    """Whether a matrix was meant as A: no factor is so nearly its transpose."""
    if matrix.shape[0] != matrix.shape[1] or not matrix.size:
        return False
    skew = np.abs(matrix - matrix.T.astype(np.float64))
    return bool(skew.max() <= 1e-3 * np.abs(matrix).max())


def index_of(metric: MahalanobisMetric, X: Array, mode: Any) -> MahalanobisIndex:
    """Fill an index whose mode returns exact neighbours."""
    if mode is not None and not isinstance(mode, (Exact, Filter)):
        raise ValueError(f"index_mode: expected None, Exact or Filter, got {mode!r}")
    index = MahalanobisIndex(metric, mode=mode, rng=0)
    index.insert(X)
    if isinstance(index.mode, Adaptive):
        return index_of(metric, X, Exact())
    return index
