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
    of_codes: Array,
    sampled: Array,
    queries: Array,
    floor: Array,
    *,
    rounding: float,
) -> Array:
    """Median over the sampled sketches of distances to every point, ``(q, n)``.

    ``codes`` are integers, ``(L, n, m)``, to be multiplied by the first row of
    ``of_codes``, ``(2, L, n)``; the second are squared norms of the products.
    ``sampled`` are numbers of sketches, ``(R,)``, and ``queries`` the queries in each,
    ``(R, q, m)``. The answer is NaN where its square is at most ``floor``, ``(n,)``, or
    ``rounding`` times the norms that it is the difference of.
    """
    xp = array_namespace(codes, of_codes, sampled, queries, floor)
    steps, squares = (xp.take(of_codes[i, ...], sampled, axis=0) for i in range(2))
    own = xp.sum(queries * queries, axis=2)[:, :, None]
    terms = squares[:, None, :] + own
    chosen = xp.astype(xp.take(codes, sampled, axis=0), queries.dtype)
    near = steps[:, None, :] * xp.matmul(queries, xp.matrix_transpose(chosen))
    medians = xp.sort(terms - 2 * near, axis=0)[sampled.shape[0] // 2, ...]
    uncertainty = rounding * xp.max(terms, axis=0)
    is_small = (medians <= uncertainty) | (medians <= floor)
    return xp.sqrt(xp.where(is_small, xp.full_like(medians, xp.nan), medians))
