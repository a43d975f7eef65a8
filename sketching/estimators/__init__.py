"""scikit-learn wrappers of metric and index: neighbours, predictions, clusters."""

from sketching.estimators.clusters import MahalanobisKMeans, MahalanobisKMedians
from sketching.estimators.neighbors import (
    MahalanobisKNeighborsTransformer,
    MahalanobisNeighbors,
)
from sketching.estimators.predictors import (
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
