"""Random projections and distance structures."""

from typing import TYPE_CHECKING

from sketching._lib.exports import exports as _exports

if TYPE_CHECKING:
    from sketching._lib.certificate import Approximation as Approximation
    from sketching._lib.certificate import Certificate as Certificate
    from sketching._lib.certificate import RefusalError as RefusalError
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
    from sketching.index.load import load as load
    from sketching.index.mahalanobis import MahalanobisIndex as MahalanobisIndex
    from sketching.index.modes import Adaptive as Adaptive
    from sketching.index.modes import Exact as Exact
    from sketching.index.modes import Filter as Filter
    from sketching.index.neighbors import Neighbors as Neighbors
    from sketching.learning.learners import HingeGradient as HingeGradient
    from sketching.learning.learners import Itml as Itml
    from sketching.learning.learners import Lego as Lego
    from sketching.learning.learners import Pola as Pola
    from sketching.metric.mahalanobis import MahalanobisMetric as MahalanobisMetric
    from sketching.projections.linear import GaussianProjection as GaussianProjection
    from sketching.projections.linear import HadamardProjection as HadamardProjection
    from sketching.projections.linear import SparseProjection as SparseProjection
    from sketching.projections.tensor_sketch import TensorSketch as TensorSketch

# where each public name lives; a module is imported when one of its names is first used
_HOMES = {
    "sketching._lib.certificate": ("Approximation", "Certificate", "RefusalError"),
    "sketching.estimators": (
        "MahalanobisKMeans",
        "MahalanobisKMedians",
        "MahalanobisKNeighborsClassifier",
        "MahalanobisKNeighborsRegressor",
        "MahalanobisKNeighborsTransformer",
        "MahalanobisNeighbors",
    ),
    "sketching.index.load": ("load",),
    "sketching.index.mahalanobis": ("MahalanobisIndex",),
    "sketching.index.modes": ("Adaptive", "Exact", "Filter"),
    "sketching.index.neighbors": ("Neighbors",),
    "sketching.learning.learners": ("HingeGradient", "Itml", "Lego", "Pola"),
    "sketching.metric.mahalanobis": ("MahalanobisMetric",),
    "sketching.projections.linear": (
        "GaussianProjection",
        "HadamardProjection",
        "SparseProjection",
    ),
    "sketching.projections.tensor_sketch": ("TensorSketch",),
}

__all__, __getattr__, __dir__ = _exports(__name__, _HOMES)
