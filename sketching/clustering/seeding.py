"""First centres: candidates drawn by their distance, then k-means of the candidates."""

import math

import numpy as np

from sketching._lib.arrays import Array
from sketching._ops.assign import cluster_sums, two_nearest
from sketching.index.points import blocks

# candidates for each centre, and Lloyd's steps between them
_CANDIDATES, _STEPS = 4, 20


def first_centers(points: Array, n_clusters: int, rng: np.random.Generator) -> Array:
    """Choose the first centres.

    Some candidates for each centre are drawn as k-means++ draws, weighted by the number
    of points that are nearest to them. The centres are found by k-means of the few
    candidates: the sum of squares is lower than that of the greedy k-means++, with
    fewer products with all points.

    Bahmani et al., Scalable K-Means++, arXiv 1203.6402, reduce candidates so.
    """
    size = min(_CANDIDATES * n_clusters, len(points))
    candidates = points[drawn_by_distance(points, size, rng)]
    squares = squared_norms(candidates)
    every = np.arange(len(points))
    labels, *_ = two_nearest(points, candidates, squares.astype(points.dtype), every)
    weights = np.bincount(labels, minlength=size).astype(np.float64)
    candidates = candidates.astype(np.float64)
    centers = candidates[_greedy(candidates, squares, weights, n_clusters, rng)]
    every = np.arange(size)
    for _ in range(_STEPS):
        norms = squared_norms(centers)
        labels, *_ = two_nearest(candidates, centers, norms, every)
        mass = np.bincount(labels, weights, minlength=n_clusters)
        sums = cluster_sums(candidates, labels, weights, n_clusters=n_clusters)
        # a centre without candidates stays
        centers = np.where(
            mass[:, None] > 0, sums / np.maximum(mass, 1)[:, None], centers
        )
    return centers


def _greedy(
    points: Array,
    norms: Array,
    weights: Array,
    n_clusters: int,
    rng: np.random.Generator,
) -> Array:
    """Draw centres of weighted points; of a few candidates the best one is taken."""
    trials = 2 + int(math.log(n_clusters))
    chosen = [int(rng.choice(len(points), p=weights / weights.sum()))]
    squares = np.full(len(points), np.inf)
    while True:
        apart = norms + norms[chosen[-1]] - 2 * points @ points[chosen[-1]]
        squares = np.minimum(squares, np.maximum(apart, 0))
        squares[chosen] = 0
        if len(chosen) == n_clusters:
            return np.array(chosen)
        shares = squares * weights
        if not shares.sum() > 0:
            others = np.setdiff1d(np.arange(len(points)), chosen)
            return np.array([*chosen, *others[: n_clusters - len(chosen)]])
        tried = rng.choice(len(points), trials, p=shares / shares.sum())
        apart = norms[tried, None] + norms - 2 * points[tried] @ points.T
        left = np.minimum(squares, np.maximum(apart, 0)) @ weights
        chosen.append(int(tried[left.argmin()]))


def drawn_by_distance(points: Array, size: int, rng: np.random.Generator) -> Array:
    """Draw distinct points as k-means++ draws its centres; return their numbers.

    Each is drawn with probability exactly proportional to the squared distance to the
    nearest one before it. Distances to older ones propose, the distance of the
    proposed point decides, so that distances to many new centres are one product.
    """
    norms = squared_norms(points)
    chosen = [int(rng.integers(len(points)))]
    squares = _squares_to(points, norms, chosen)
    known = 1
    while len(chosen) < size:
        total = squares.sum()
        if not total > 0:
            # fewer places than points to draw
            others = np.setdiff1d(np.arange(len(points)), chosen)
            return np.array([*chosen, *others[: size - len(chosen)]])
        wanted = min(len(chosen), size - len(chosen))
        proposed = rng.choice(len(points), 2 * wanted + 8, p=squares / total)
        for i, u in zip(proposed, rng.random(len(proposed)), strict=True):
            fresh = points[chosen[known:]].astype(np.float64) - points[i]
            nearest = np.einsum("cd,cd->c", fresh, fresh).min(initial=squares[i])
            if u * squares[i] < nearest and len(chosen) - known < wanted:
                chosen.append(int(i))
        squares = np.minimum(squares, _squares_to(points, norms, chosen[known:]))
        squares[chosen] = 0
        known = len(chosen)
    return np.array(chosen)


def squared_norms(points: Array) -> Array:
    """Squared norms of rows, in float64."""
    parts = [points[some].astype(np.float64) for some in blocks(np.arange(len(points)))]
    return np.concatenate([np.einsum("nd,nd->n", x, x) for x in parts])


def _squares_to(points: Array, norms: Array, chosen: list[int]) -> Array:
    """Squared distance of every point to the nearest of some."""
    if not chosen:
        return np.full(len(points), np.inf)
    centers = points[chosen]
    _, least, _ = two_nearest(
        points, centers, norms[chosen].astype(points.dtype), np.arange(len(points))
    )
    squares: Array = np.maximum(norms + least, 0)
    return squares
