"""k-medians between whitened points: Weiszfeld's steps towards geometric medians."""

from collections.abc import Callable

import numpy as np

from sketching._lib.arrays import Array
from sketching._ops.assign import cluster_sums, own_distances, two_nearest
from sketching.clustering.kmeans import Clustering
from sketching.clustering.seeding import squared_norms


def medians(
    points: Array,
    centers: Array,
    *,
    max_iter: int,
    tol: float,
    advance: Callable[[], None],
) -> Clustering:
    """Alternate between nearest centres and one step towards medians of members.

    Neither increases the sum of distances. Where a centre lies on a point the step is
    that of Vardi and Zhang: it leaves the point only if the resultant of the unit
    vectors to the other points exceeds the weight of the point.
    """
    centers, every = centers.astype(np.float64), np.arange(len(points))
    n_iter, shift = 0, np.inf
    while n_iter < max_iter and shift > tol:
        n_iter += 1
        labels = _nearest(points, centers, every)
        apart = own_distances(points, centers, labels, every)
        _fill_empty(points, labels, apart, centers)
        weights = _weights(points, centers, labels, apart)
        size = len(centers)
        mass = np.bincount(labels, weights, minlength=size)
        sums = cluster_sums(points, labels, weights, n_clusters=size)
        is_empty = mass[:, None] == 0
        moved = np.where(is_empty, centers, sums / np.where(is_empty, 1, mass[:, None]))
        shift = float(np.sum((moved - centers) ** 2))
        centers, members = moved, labels
        advance()
    labels = _nearest(points, centers, every)
    inertia = float(own_distances(points, centers, labels, every).sum())
    return Clustering(centers, labels, members, inertia, n_iter, weights)


def _nearest(points: Array, centers: Array, every: Array) -> Array:
    near = centers.astype(points.dtype)
    squares = squared_norms(near).astype(points.dtype)
    labels: Array = two_nearest(points, near, squares, every)[0]
    return labels


def _fill_empty(points: Array, labels: Array, apart: Array, centers: Array) -> None:
    """Give every empty cluster the point that is farthest from its centre.

    If every point is at its centre, as with few distinct points, it stays empty.
    """
    counts = np.bincount(labels, minlength=len(centers))
    for empty in np.flatnonzero(counts == 0):
        # the last point of a cluster stays
        far = int(np.where(counts[labels] > 1, apart, -1).argmax())
        if apart[far] <= 8 * np.finfo(points.dtype).eps * np.abs(points).max():
            break
        counts[labels[far]] -= 1
        counts[empty] += 1
        labels[far], apart[far], centers[empty] = empty, 0, points[far]


def _weights(points: Array, centers: Array, labels: Array, apart: Array) -> Array:
    """Weights of points such that weighted means of members are the next centres."""
    size = len(centers)
    is_on = apart <= 1e-12 * apart.max()
    weights = np.where(is_on, 0.0, 1 / np.where(is_on, 1.0, apart))
    count = np.bincount(labels, is_on, minlength=size)
    if not count.any():
        return weights
    # length of the resultant of the other points, against the weight at the centre
    mass = np.bincount(labels, weights, minlength=size)
    sums = cluster_sums(points, labels, weights, n_clusters=size)
    pull = np.linalg.norm(sums - mass[:, None] * centers, axis=1)
    stays = np.minimum(1, count / np.where(pull > 0, pull, np.inf))
    stays[(pull == 0) & (count > 0)] = 1
    # a share of the mass that keeps the mean where it is; all if the resultant is zero
    held = np.where(stays < 1, mass * stays / np.where(stays < 1, 1 - stays, 1), 0)
    on = np.where(count > 0, held / np.where(count > 0, count, 1), 0)
    is_held = (stays >= 1) & (count > 0)
    weights = np.where(is_held[labels], is_on.astype(np.float64), weights)
    return np.where(is_on & ~is_held[labels], on[labels], weights)
