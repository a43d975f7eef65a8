"""What learners share: the metric or index that they change, checks, rank-one steps."""

import math
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.validation import check_finite
from sketching.index.mahalanobis import MahalanobisIndex
from sketching.metric.mahalanobis import MahalanobisMetric


class Learner:
    """The metric or index of a learner, and its changes."""

    def __init__(self, metric: MahalanobisMetric | MahalanobisIndex) -> None:
        if not isinstance(metric, (MahalanobisMetric, MahalanobisIndex)):
            raise TypeError(
                "metric: expected a MahalanobisMetric or a MahalanobisIndex, got "
                f"{type(metric).__name__}"
            )
        self._changed = metric

    @property
    def metric(self) -> MahalanobisMetric:
        """A copy of the metric that was learned so far."""
        if isinstance(self._changed, MahalanobisIndex):
            return self._changed.metric
        return self._changed.copy()

    @property
    def _factor(self) -> Array:
        return self._changed.factor

    def _apply(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Change the metric, or the index, unless nothing changes."""
        if a.any():
            if isinstance(self._changed, MahalanobisIndex):
                self._changed.update_metric(a, b)
            else:
                self._changed.update(a, b)
        return a, b


def difference_of(x: Any, x2: Any, factor: Array) -> Array:
    """Check two points; return their difference in float64."""
    points = []
    for name, z in (("x", x), ("x2", x2)):
        point = np.asarray(z)
        if point.shape != factor.shape[1:]:
            raise ValueError(
                f"{name}: expected shape ({factor.shape[1]},), got {point.shape}"
            )
        if point.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected real numbers, got dtype {point.dtype}")
        points.append(point.astype(np.float64))
        check_finite(name, points[-1])
    return points[0] - points[1]


def sign_of(target: Any) -> int:
    """Check a target; return it as an int."""
    if target not in (1, -1):
        raise ValueError(f"target: expected 1 (near) or -1 (far), got {target!r}")
    return int(target)


def no_update(factor: Array) -> tuple[Array, Array]:
    """Return the update that changes nothing."""
    k, d = factor.shape
    return np.zeros(k), np.zeros(d)


def rank_one_step(
    factor: Array, inverse: Array, v: Array, p: Array, s: float, floor: float
) -> tuple[Array, Array]:
    """Return a and b of ``A + s v v^T``, its eigenvalues raised to the floor.

    ``p`` solves ``U^T p = v``.
    """
    square = float(p @ p)
    kept = 1 + s * square
    if s < 0:
        # the only eigenvalue that may have fallen
        values, vectors = np.linalg.eigh(factor.T @ factor + s * np.outer(v, v))
        least, u = float(values[0]), vectors[:, 0]
        if least < floor:
            return _raised(inverse, v, p, -s, floor, (least, u))
    return p * ((math.sqrt(kept) - 1) / square), v


def _raised(
    inverse: Array,
    v: Array,
    p: Array,
    tau: float,
    floor: float,
    lowest: tuple[float, Array],
) -> tuple[Array, Array]:
    """Return a and b of ``A - tau v v^T + (floor - least) u u^T``.

    In the coordinates of U the change is ``(x y^T + y x^T) / 2``; a and x with
    ``x a^T + a x^T + |a|^2 x x^T`` equal to it follow from a quadratic equation.
    ``lowest`` are ``least`` and ``u``.
    """
    least, u = lowest
    c = math.sqrt(floor - least)
    w = u @ inverse
    x, y = c * w - math.sqrt(tau) * p, c * w + math.sqrt(tau) * p
    half = 1 + float(x @ y) / 2
    squares = float(x @ x), float(y @ y)
    kept = 1 - tau * float(p @ p)
    # the ratio of the determinants of A after and before, in two forms: one cancels
    # where eigenvalues are near the floor, the other where the least one is near 0
    if abs(kept) > 0.5:
        ratio = kept * floor / least
    else:
        ratio = half**2 - squares[0] * squares[1] / 4
    gamma = squares[1] / 2 / (half + math.sqrt(max(ratio, 0.0)))
    return (y - gamma * x) / 2, c * u - math.sqrt(tau) * v
