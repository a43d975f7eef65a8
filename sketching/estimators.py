"""scikit-learn faces of metric and index: neighbours, predictions, clusters."""

from sketching._cluster_estimators import MahalanobisKMeans, MahalanobisKMedians
from sketching._neighbor_estimators import (
    MahalanobisKNeighborsTransformer,
    MahalanobisNeighbors,
)
from sketching._neighbor_predictors import (
    MahalanobisKNeighborsClassifier,
    MahalanobisKNeighborsRegressor,
)

__all__ = [
    "MahalanobisKMeans",
    "MahalanobisKMedians",
    "MahalanobisKNeighborsClassifier",
    "MahalanobisKNeighborsRegressor",
    "MahalanobisKNeighborsTransformer",
    "MahalanobisNeighbors",
]
