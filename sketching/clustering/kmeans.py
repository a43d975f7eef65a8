"""k-means of whitened points: Lloyd's steps, with bounds on distances to save work."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array
from sketching._ops.assign import cluster_sums, own_distances, two_nearest
from sketching.clustering.seeding import squared_norms
from sketching.metric.rounding import Rounding

# share of points that may have changed above which own distances rule out few
_MANY = 0.7
# share of points to assign above which all are, in the order of the memory
_MOST = 0.8


@dataclass(frozen=True, slots=True)
class Clustering:
    """Clusters of whitened points.

    ``labels`` are those of ``centers``; ``members`` say which points each centre was
    made of, with ``weights`` unless all weigh the same.
    """

    centers: Array
    labels: Array
    members: Array
    inertia: float
    n_iter: int
    weights: Array | None = None


def lloyd(
    points: Array,
    centers: Array,
    *,
    max_iter: int,
    tol: float,
    advance: Callable[[], None],
) -> Clustering:
    """Alternate between nearest centres and means of members until labels are constant.

    Bounds on the two least distances of each point, updated as centres move, show which
    points may have changed (Hamerly, doi 10.1137/1.9781611972801.12).
    """
    state = _Assigned(points, centers)
    n_iter, shift, is_same = 0, np.inf, False
    while n_iter < max_iter and not (is_same or shift <= tol):
        n_iter += 1
        means = state.means()
        members = state.labels.copy()
        shift = state.move(means)
        is_same = not state.assign()
        advance()
    inertia = float(np.sum(state.distances() ** 2))
    return Clustering(state.centers, state.labels, members, inertia, n_iter)


class _Assigned:
    """Points with their nearest centres, and bounds on the two least distances."""

    def __init__(self, points: Array, centers: Array) -> None:
        self.points, self.centers = points, centers.astype(points.dtype)
        self.norms = squared_norms(points)
        self.unit = Rounding.of(points.dtype, points.shape[1]).unit
        # rounding error of the distance of a point to the mean of equal points
        eps = float(np.finfo(points.dtype).eps)
        self.nothing = 8 * eps * float(np.sqrt(self.norms.max(initial=0)))
        n = len(points)
        self.labels = np.zeros(n, np.int64)
        self.upper, self.lower = np.empty(n), np.empty(n)
        self.ones = np.ones(n, points.dtype)
        self.all = np.arange(n)
        self._search(self.all)
        self.sums = self._sums(points, self.labels)
        self.counts = np.bincount(self.labels, minlength=len(centers))

    def distances(self) -> Array:
        """Distances of all points to their centres."""
        own: Array = own_distances(self.points, self.centers, self.labels, self.all)
        return own

    def means(self) -> Array:
        """Means of members; an empty cluster takes the point farthest from its centre.

        If every point is at its centre, as with few distinct points, it stays empty.
        """
        for empty in np.flatnonzero(self.counts == 0):
            apart = self.distances()
            apart[self.counts[self.labels] < 2] = -1
            far = np.array([int(apart.argmax())])
            if apart[far[0]] <= self.nothing:
                break
            self._relabel(far, np.array([empty]))
            self.centers[empty] = self.points[far[0]]
            self.upper[far] = 0
            # of no point it is known how near the new centre is
            self.lower[:] = 0
        is_empty = self.counts[:, None] == 0
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        return np.where(is_empty, self.centers, means)

    def move(self, centers: Array) -> float:
        """Move centres and bounds; return the sum of the squared displacements."""
        centers = centers.astype(self.points.dtype)
        ways = np.linalg.norm((centers - self.centers).astype(np.float64), axis=1)
        self.centers = centers
        # the displacement of the centre that moved farthest, and for its own points the
        # second
        order = np.argsort(ways)[::-1]
        of_others = np.full(len(ways), ways[order[0]])
        of_others[order[0]] = ways[order[1]] if len(ways) > 1 else 0
        self.upper += ways[self.labels]
        self.lower -= of_others[self.labels]
        return float(ways @ ways)

    def assign(self) -> bool:
        """Assign the points that may have changed; return whether any did."""
        limit = np.maximum(self.lower, self._halves()[self.labels])
        may = np.flatnonzero(self.upper > limit)
        if len(may) < _MANY * len(self.points):
            own = own_distances(self.points, self.centers, self.labels[may], may)
            self.upper[may] = own * (1 + self.unit)
            may = may[self.upper[may] > limit[may]]
        if len(may) > _MOST * len(self.points):
            # rows that follow each other need no copy
            may = self.all
        before = self.labels[may]
        found = self._search(may)
        changed = found != before
        self.labels[may] = before
        self._relabel(may[changed], found[changed])
        return bool(changed.any())

    def _halves(self) -> Array:
        """Half the distance of each centre to the nearest other."""
        centers = self.centers.astype(np.float64)
        squares = np.einsum("kd,kd->k", centers, centers)
        apart = squares[:, None] + squares - 2 * centers @ centers.T
        np.fill_diagonal(apart, np.inf)
        return np.sqrt(np.maximum(apart.min(axis=1), 0)) / 2

    def _search(self, some: Array) -> Array:
        """Find the nearest centres of some points, and set their bounds."""
        centers = self.centers
        squares = squared_norms(centers)
        found, least, second = two_nearest(
            self.points, centers, squares.astype(centers.dtype), some
        )
        norms = self.norms[some]
        uncertainty = self.unit * (norms + squares.max())
        self.labels[some] = found
        self.upper[some] = np.sqrt(np.maximum(norms + least + uncertainty, 0))
        self.lower[some] = np.sqrt(np.maximum(norms + second - uncertainty, 0))
        return found

    def _relabel(self, slots: Array, labels: Array) -> None:
        """Move points from their clusters to others."""
        rows, old = self.points[slots], self.labels[slots]
        self.sums += self._sums(rows, labels) - self._sums(rows, old)
        size = len(self.centers)
        self.counts += np.bincount(labels, minlength=size)
        self.counts -= np.bincount(old, minlength=size)
        self.labels[slots] = labels

    def _sums(self, rows: Array, labels: Array) -> Array:
        ones, size = self.ones[: len(rows)], len(self.centers)
        sums: Array = cluster_sums(rows, labels, ones, n_clusters=size)
        return sums
