"""Scans over all points: distances by the norm form, by difference, and medians."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def scan(
    points: Array,
    directions: Array,
    of_points: Array,
    of_queries: Array,
    *,
    rounding: float,
    tolerance: float,
    steps: Array | None = None,
) -> tuple[Array, Array]:
    r"""Distances :math:`\sqrt{h_i - 2 x_i \cdot g_j + h_j}`, rounding checked.

    ``points`` is ``(n, d)``, of integers if there are ``steps``, ``(n,)``, to multiply
    them by; ``directions`` is ``(q, d)``. The rows of ``of_points``, ``(3, n)``, are
    the squared norms in the metric, how far those may be off, and
    Euclidean lengths; of ``of_queries``, ``(2, q)``, squared norms and lengths of the
    directions. The answer is ``(q, n)``, NaN where rounding of ``rounding`` times the
    terms may exceed ``tolerance`` times the distance, and the number of NaN by row.
    """
    xp = array_namespace(points, directions)
    h, off, point_norm = of_points[0, :], of_points[1, :], of_points[2, :]
    own, length = of_queries[0, :, None], of_queries[1, :, None]
    if steps is not None:
        points = steps[:, None] * xp.astype(points, directions.dtype)
    products = xp.astype(xp.matmul(directions, points.T), xp.float64)
    squares = h + own - 2 * products
    uncertainty = rounding * (h + own + 2 * point_norm * length) + off
    is_uncertain = squares <= uncertainty / (2 * tolerance)
    roots = xp.sqrt(xp.where(is_uncertain, xp.full_like(squares, xp.nan), squares))
    counts = xp.sum(xp.astype(is_uncertain, xp.int64), axis=1)
    return xp.astype(roots, points.dtype), counts


@op("cpu")
def brackets(
    codes: Array,
    queries: Array,
    of_points: Array,
    of_queries: Array,
    *,
    rounding: float,
    tolerance: float,
) -> tuple[Array, Array, Array]:
    r"""Distances from codes and lengths of tails, where these determine them to eps.

    ``codes`` is ``(n, p)``, ``queries`` ``(q, p)``. The rows of ``of_points``,
    ``(4, n)``, are squared norms of codes, how far those may be off, and the least and
    the largest length of the tail; of ``of_queries``, ``(2, q)``, squared norms and
    lengths of tails. A squared distance lies within twice the product of the tails of
    the sum of squares. The answer, ``(q, n)``, is the distance with the least relative
    error, NaN where that exceeds ``tolerance``; the error, the largest of each row;
    and the number of NaN by row.
    """
    xp = array_namespace(codes, queries)
    low, high = _bracket(codes, queries, of_points, of_queries, rounding)
    total = low + high
    safe = xp.where(total > 0, total, xp.ones_like(total))
    error = xp.where(total > 0, (high - low) / safe, xp.zeros_like(total))
    is_wide = error > tolerance
    nan = xp.full_like(total, xp.nan)
    values = xp.where(is_wide, nan, 2 * low * high / safe)
    worst = xp.max(xp.where(is_wide, xp.zeros_like(error), error), axis=1)
    counts = xp.sum(xp.astype(is_wide, xp.int64), axis=1)
    return xp.astype(values, codes.dtype), worst, counts


def _bracket(
    codes: Array, queries: Array, of_points: Array, of_queries: Array, rounding: float
) -> tuple[Array, Array]:
    """Bounds of every distance from below and above."""
    xp = array_namespace(codes, queries)
    h, off, least, most = (of_points[row, :] for row in range(4))
    own, tail = of_queries[0, :, None], of_queries[1, :, None]
    near = h + own - 2 * xp.astype(xp.matmul(queries, codes.T), xp.float64)
    uncertainty = rounding * (h + own) + off
    apart = xp.maximum(xp.maximum(least - tail, tail - most), xp.zeros_like(near))
    zero = xp.zeros_like(near)
    low = xp.maximum(near - uncertainty, zero) + apart**2
    high = xp.maximum(near + uncertainty, zero) + (tail + most) ** 2
    return xp.sqrt(low), xp.sqrt(high)


@op("cpu")
def lower_bounds(
    codes: Array,
    queries: Array,
    of_points: Array,
    of_queries: Array,
    *,
    rounding: float,
) -> Array:
    """Bounds of every distance from below, ``(q, n)``; arguments as of brackets."""
    low, _ = _bracket(codes, queries, of_points, of_queries, rounding)
    return array_namespace(codes).astype(low, codes.dtype)
