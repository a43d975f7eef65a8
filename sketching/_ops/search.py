"""Exact distances of the points that lower bounds cannot rule out."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def search(
    points: Array,
    directions: Array,
    bounds: Array,
    of_points: Array,
    of_queries: Array,
    *,
    k: int,
    first: int,
    most: int,
    rounding: float,
    tolerance: float,
) -> tuple[Array, Array, Array]:
    """Examine the ``first`` least bounds, then all up to the ``k``-th distance.

    ``bounds`` is ``(q, n)``, the other arrays are those of ``scan``. Returns the
    positions of the examined points, ``(q, most)``, in ascending order and padded with
    -1; their distances, NaN where rounding is too large or for padding; and how many
    points were examined. Where that is more than ``most``, none was.
    """
    xp = array_namespace(points, directions, bounds)
    slots, values, counts = [], [], []
    for j in range(directions.shape[0]):
        row = bounds[j, :]
        squares, uncertainty = _norm_form(
            points, directions[j, :], of_points, of_queries[:, j], rounding
        )
        near = xp.argsort(row)[:first]
        above = xp.sqrt(xp.maximum(squares + uncertainty, xp.zeros_like(squares)))
        limit = xp.sort(xp.take(above, near, axis=0))[k - 1] * (1 + tolerance)
        # a bound of the first may lie above the limit: they were examined anyway
        where = xp.nonzero(row <= xp.astype(limit, row.dtype))[0]
        where = xp.unique_values(xp.concat([where, near]))
        counts.append(where.shape[0])
        if where.shape[0] > most:
            where = where[:0]
        is_open = xp.take(squares <= uncertainty / (2 * tolerance), where)
        root = xp.sqrt(xp.where(is_open, xp.nan, xp.take(squares, where)))
        rest = most - where.shape[0]
        slots.append(xp.concat([where, xp.full((rest,), -1, dtype=where.dtype)]))
        values.append(xp.concat([root, xp.full((rest,), xp.nan, dtype=root.dtype)]))
    return xp.stack(slots), xp.stack(values), xp.asarray(counts)


def _norm_form(
    points: Array, direction: Array, of_points: Array, of_query: Array, rounding: float
) -> tuple[Array, Array]:
    """Squared distances of one query, and bounds on their rounding errors."""
    xp = array_namespace(points)
    h, off, point_norm = of_points[0, :], of_points[1, :], of_points[2, :]
    own, length = of_query[0], of_query[1]
    products = xp.astype(xp.matmul(points, direction), xp.float64)
    uncertainty = rounding * (h + own + 2 * point_norm * length) + off
    return h + own - 2 * products, uncertainty
