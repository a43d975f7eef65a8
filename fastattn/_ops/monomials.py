"""Sums of monomials over keys, and polynomials of the queries with those sums.

A set of monomials is given by ``parent`` and ``coordinate``: monomial ``j`` is monomial
``parent[j] < j`` times coordinate ``coordinate[j]``, and monomial 0 is 1. Both are
NumPy integer arrays on every device.
"""

from typing import Any

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op

# keys that the CPU kernels sum in the dtype of computation before they are added to
# totals in float64: bounds on rounding rely on it
SUMMED_ROWS = 384
_BLOCK = 4096


@op("cpu", "gpu")
def monomials(x: Array, *, parent: Any, coordinate: Any) -> Array:
    """Every monomial of the rows of ``x``, ``(n, c)``; the answer is ``(n, r)``."""
    xp = array_namespace(x)
    columns = [xp.ones_like(x[:, 0])]
    for source, factor in zip(parent[1:], coordinate[1:], strict=True):
        columns.append(columns[int(source)] * x[:, int(factor)])
    return xp.stack(columns, axis=1)


@op("cpu", "gpu")
def moments(
    key: Array,
    value: Array,
    center: Array,
    projection: Array,
    tilt: Array,
    value_center: Array,
    *,
    parent: Any,
    coordinate: Any,
) -> Array:
    """Sum over keys of monomial times weight times ``[value - value_center, 1]``.

    The coordinates of a key are ``(key - center) @ projection`` and its weight is
    ``exp((key - center) @ tilt)``. ``key`` is ``(m, d)``, ``value`` ``(m, p)``,
    ``projection`` ``(d, c)``, ``value_center`` ``(p,)``; the answer is ``(r, p + 1)``,
    in the dtype of ``projection``.
    """
    xp = array_namespace(key, value, center, projection, tilt, value_center)
    dtype, total = projection.dtype, None
    for start in range(0, key.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, key.shape[0]))
        centred = xp.astype(key[rows, :], dtype) - center
        weight = xp.exp(xp.matmul(centred, tilt))[:, None]
        features = monomials.reference(
            xp.matmul(centred, projection), parent=parent, coordinate=coordinate
        )
        values = (xp.astype(value[rows, :], dtype) - value_center) * weight
        values = xp.concat([values, weight], axis=1)
        part = xp.matmul(xp.matrix_transpose(features), values)
        total = part if total is None else total + part
    return total


@op("cpu", "gpu")
def means(
    query: Array,
    center: Array,
    projection: Array,
    readout: Array,
    value_center: Array,
    *,
    parent: Any,
    coordinate: Any,
) -> tuple[Array, Array]:
    """Weighted means of the values, and the sums of their weights.

    The coordinates of a query are ``(query - center) @ projection``. The columns of
    ``readout``, ``(r, p + 1)``, are the coefficients of ``p`` weighted sums and, last,
    of the sum of the weights: the mean is their quotient plus ``value_center``, and
    ``value_center`` alone where the sum is not positive and finite. ``query`` is
    ``(n, d)``; the answers are ``(n, p)`` and ``(n,)``, in the dtype of ``projection``.
    """
    xp = array_namespace(query, center, projection, readout, value_center)
    dtype, values, totals = projection.dtype, [], []
    for start in range(0, query.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, query.shape[0]))
        coordinates = xp.matmul(xp.astype(query[rows, :], dtype) - center, projection)
        features = monomials.reference(
            coordinates, parent=parent, coordinate=coordinate
        )
        sums = xp.matmul(features, readout)
        total = sums[:, -1]
        reliable = xp.logical_and(total > 0, xp.isfinite(total))[:, None]
        safe = xp.where(reliable, total[:, None], xp.ones_like(total[:, None]))
        shifted = sums[:, :-1] / safe
        values.append(
            xp.where(reliable, shifted, xp.zeros_like(shifted)) + value_center
        )
        totals.append(total)
    return xp.concat(values, axis=0), xp.concat(totals, axis=0)
