"""Medians over sampled sketches of the distances to all points."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def median(values: Array) -> Array:
    """Median of an odd number of arrays, over the first axis."""
    xp = array_namespace(values)
    return xp.sort(values, axis=0)[values.shape[0] // 2, ...]


@op("cpu")
def median_distances(
    codes: Array,
    squares: Array,
    sampled: Array,
    queries: Array,
    *,
    rounding: float,
    floor: float,
) -> Array:
    """Median over the sampled sketches of distances to every point, ``(q, n)``.

    ``codes`` is ``(L, n, m)`` with squared norms ``squares``, ``(L, n)``; ``sampled``
    are numbers of sketches, ``(R,)``, and ``queries`` the queries in each,
    ``(R, q, m)``. The answer is NaN where its square is at most ``floor`` or
    ``rounding`` times the norms that it is the difference of.
    """
    xp = array_namespace(codes, squares, sampled, queries)
    own = xp.sum(queries * queries, axis=2)[:, :, None]
    terms = xp.take(squares, sampled, axis=0)[:, None, :] + own
    near = xp.matmul(queries, xp.matrix_transpose(xp.take(codes, sampled, axis=0)))
    middle = xp.sort(terms - 2 * near, axis=0)[sampled.shape[0] // 2, ...]
    doubt = rounding * xp.max(terms, axis=0)
    is_small = (middle <= doubt) | (middle <= floor)
    return xp.sqrt(xp.where(is_small, xp.full_like(middle, xp.nan), middle))
