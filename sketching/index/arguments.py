"""Checks of what an index is made from, and of what it is asked."""

from typing import Any

from sketching._lib.arrays import Array
from sketching._lib.validation import check_number
from sketching.index.points import Points
from sketching.index.state import Mode
from sketching.metric.mahalanobis import MahalanobisMetric


def check_parts(metric: Any, mode: Any, eps: Any, delta: Any) -> None:
    """Raise unless these make an index."""
    if not isinstance(metric, MahalanobisMetric):
        raise TypeError(
            f"metric: expected a MahalanobisMetric, got {type(metric).__name__}; "
            "say which matrix you have: MahalanobisMetric(U) for a factor, "
            "from_matrix(A), from_covariance(C) or from_data(X)"
        )
    if mode is not None and not isinstance(mode, Mode):
        raise TypeError(f"mode: expected Exact, Filter or Adaptive, got {mode!r}")
    for name, x in (("eps", eps), ("delta", delta)):
        if check_number(name, x, above=0) >= 1:
            raise ValueError(f"{name}: expected a number below 1, got {x}")


def check_count(k: int, n: int) -> None:
    """Raise unless there are as many points as neighbours are asked for."""
    if k > n:
        raise ValueError(f"k: expected at most {n} points, got {k}")


def slots_of_pairs(points: Points, i: Array, j: Array) -> tuple[Array, Array]:
    """Positions of pairs of points, given by their numbers."""
    left, right = points.slots("i", i), points.slots("j", j)
    if len(left) != len(right):
        raise ValueError(f"j: expected {len(left)} numbers like i, got {len(right)}")
    return left, right
