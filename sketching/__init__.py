"""Random projections and distance structures."""

from typing import TYPE_CHECKING

from sketching._lib.exports import exports as _exports

if TYPE_CHECKING:
    from sketching._lib.certificate import Approximation as Approximation
    from sketching._lib.certificate import Certificate as Certificate
    from sketching._lib.certificate import RefusalError as RefusalError
    from sketching._neighbors import Neighbors as Neighbors
    from sketching.distance_modes import Adaptive as Adaptive
    from sketching.distance_modes import Exact as Exact
    from sketching.distance_modes import Filter as Filter
    from sketching.estimators import MahalanobisKMeans as MahalanobisKMeans
    from sketching.estimators import MahalanobisKMedians as MahalanobisKMedians
    from sketching.estimators import (
        MahalanobisKNeighborsClassifier as MahalanobisKNeighborsClassifier,
    )
    from sketching.estimators import (
        MahalanobisKNeighborsRegressor as MahalanobisKNeighborsRegressor,
    )
    from sketching.estimators import (
        MahalanobisKNeighborsTransformer as MahalanobisKNeighborsTransformer,
    )
    from sketching.estimators import MahalanobisNeighbors as MahalanobisNeighbors
    from sketching.mahalanobis import MahalanobisIndex as MahalanobisIndex
    from sketching.metric import MahalanobisMetric as MahalanobisMetric
    from sketching.metric_learning import HingeGradient as HingeGradient
    from sketching.metric_learning import Itml as Itml
    from sketching.metric_learning import Lego as Lego
    from sketching.metric_learning import Pola as Pola
    from sketching.projections import GaussianProjection as GaussianProjection
    from sketching.projections import HadamardProjection as HadamardProjection
    from sketching.projections import SparseProjection as SparseProjection
    from sketching.projections import TensorSketch as TensorSketch
    from sketching.saved_index import load as load

# where each public name lives; a module is imported when one of its names is first used
_HOMES = {
    "sketching._lib.certificate": ("Approximation", "Certificate", "RefusalError"),
    "sketching._neighbors": ("Neighbors",),
    "sketching.distance_modes": ("Adaptive", "Exact", "Filter"),
    "sketching.estimators": (
        "MahalanobisKMeans",
        "MahalanobisKMedians",
        "MahalanobisKNeighborsClassifier",
        "MahalanobisKNeighborsRegressor",
        "MahalanobisKNeighborsTransformer",
        "MahalanobisNeighbors",
    ),
    "sketching.mahalanobis": ("MahalanobisIndex",),
    "sketching.metric": ("MahalanobisMetric",),
    "sketching.metric_learning": ("HingeGradient", "Itml", "Lego", "Pola"),
    "sketching.projections": (
        "GaussianProjection",
        "HadamardProjection",
        "SparseProjection",
        "TensorSketch",
    ),
    "sketching.saved_index": ("load",),
}

__all__, __getattr__, __dir__ = _exports(__name__, _HOMES)
