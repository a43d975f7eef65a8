"""Points and the clusters they belong to: the two nearest centres, sums of members."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def two_nearest(
    points: Array, centers: Array, squares: Array, slots: Array
) -> tuple[Array, Array, Array]:
    r"""Find the nearest centre of some points, and the scores of the two nearest.

    ``points`` is ``(n, d)``, ``centers`` ``(k, d)``, ``squares`` the squared norms of
    the centres, ``(k,)``, ``slots``, ``(m,)``, the rows of the points. Returns the
    number of the nearest centre, ``(m,)``, and :math:`|c|^2 - 2 x \cdot c` of it and of
    the second nearest, infinite if there is none.
    """
    xp = array_namespace(points, centers, squares, slots)
    rows = xp.take(points, slots, axis=0)
    scores = squares - 2 * xp.matmul(rows, centers.T)
    labels = xp.argmin(scores, axis=1)
    is_nearest = xp.arange(centers.shape[0]) == labels[:, None]
    others = xp.where(is_nearest, xp.full_like(scores, xp.inf), scores)
    return labels, xp.min(scores, axis=1), xp.min(others, axis=1)


@op("cpu")
def cluster_sums(
    points: Array, labels: Array, weights: Array, *, n_clusters: int
) -> Array:
    """Sum the points of each cluster times their weights, ``(n_clusters, d)``.

    ``points`` is ``(n, d)``, ``labels`` and ``weights`` are ``(n,)``; sums are float64.
    """
    xp = array_namespace(points, labels, weights)
    is_member = xp.arange(n_clusters)[:, None] == labels
    shares = xp.astype(is_member, xp.float64) * xp.astype(weights, xp.float64)
    return xp.matmul(shares, xp.astype(points, xp.float64))


@op("cpu")
def own_distances(points: Array, centers: Array, labels: Array, slots: Array) -> Array:
    """Measure the distances of some points to their centres, by difference.

    ``points`` is ``(n, d)``, ``centers`` ``(k, d)``; ``labels``, ``(m,)``, are those of
    the points ``slots``, ``(m,)``. The answer is ``(m,)``, in float64.
    """
    xp = array_namespace(points, centers, labels, slots)
    rows = xp.astype(xp.take(points, slots, axis=0), xp.float64)
    apart = rows - xp.astype(xp.take(centers, labels, axis=0), xp.float64)
    return xp.sqrt(xp.sum(apart * apart, axis=1))
