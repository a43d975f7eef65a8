"""Medians over sampled sketches, in tiles of points that stay in the cache."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum
from sketching._ops.cpu.products import products
from sketching._ops.cpu.spans import over_spans

# numbers of one tile of distances, of all sampled sketches
_TILE = 1 << 16
# numbers below which starting another thread costs more than it saves
_SPAN = 1 << 18


def median(values):
    flat = np.array(values, order="C").reshape(len(values), -1)
    out = np.empty(flat.shape[1], values.dtype)
    for start in range(0, out.size, _TILE // len(values) + 1):
        part = slice(start, start + _TILE // len(values) + 1)
        out[part] = _median(flat[:, part])
    return out.reshape(values.shape[1:])


def median_distances(codes, of_codes, sampled, queries, floor, *, rounding):
    (count, q, m), n = queries.shape, codes.shape[1]
    out = np.empty((q, n), queries.dtype)
    rounding = queries.dtype.type(rounding)
    own = np.einsum("rqm,rqm->rq", queries, queries)
    rows = max(64, _TILE // (count * q))

    def work(start, end):
        values = np.empty((count, q, rows), queries.dtype)
        wide = np.empty((rows, m), queries.dtype)
        for first in range(start, end, rows):
            last = min(first + rows, end)
            part = values[:, :, : last - first]
            for r, sketch in enumerate(sampled):
                some = codes[sketch, first:last]
                if q == 1:
                    products(some, queries[r, 0], part[r, 0])
                else:
                    wide[: last - first] = some
                    part[r] = queries[r] @ wide[: last - first].T
            _finish(
                part, of_codes[:, :, first:last], sampled, own, rounding,
                floor[first:last], out[:, first:last],
            )  # fmt: skip

    over_spans(work, n, -(-(_SPAN * 16) // (count * q * rows)) * rows)
    return out


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish(values, of_codes, sampled, own, rounding, floor, out):
    count, q, n = values.shape
    largest = np.empty(n, values.dtype)
    for j in range(q):
        largest[:] = 0
        for r in range(count):
            row, mine = values[r, j], own[r, j]
            step, square = of_codes[0, sampled[r]], of_codes[1, sampled[r]]
            for i in range(n):
                terms = square[i] + mine
                row[i] = terms - 2 * step[i] * row[i]
                largest[i] = maximum(largest[i], terms)
        medians, result = _median(values[:, j]), out[j]
        for i in range(n):
            is_small = medians[i] <= rounding * largest[i] or medians[i] <= floor[i]
            result[i] = np.sqrt(np.nan if is_small else medians[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _median(values):
    """Median of columns: sort all at once by exchanges of neighbouring rows."""
    count = values.shape[0]
    for step in range(count):
        for r in range(step % 2, count - 1, 2):
            upper, lower = values[r], values[r + 1]
            for i in range(upper.size):
                a, b = upper[i], lower[i]
                upper[i] = a if a < b else b
                lower[i] = b if a < b else a
    return values[count // 2]
