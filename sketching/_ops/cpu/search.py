"""Exact distances of the points that lower bounds cannot rule out."""

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum
from sketching._ops.cpu.spans import over_spans

# bounds below which starting another thread costs more than it saves
_BOUNDS = 1 << 18


def search(
    points, directions, bounds, of_points, of_queries, *, k, first, most, rounding,
    tolerance,
):  # fmt: skip
    q = len(directions)
    slots, counts = np.full((q, most), -1), np.empty(q, np.int64)
    values = np.full((q, most), np.nan)

    def work(start, end):
        part = slice(start, end)
        _search(
            points, directions[part], bounds[part], of_points, of_queries[:, part], k,
            first, rounding, tolerance, slots[part], values[part], counts[part],
        )  # fmt: skip

    over_spans(work, q, max(1, _BOUNDS // bounds.shape[1]))
    return slots, values, counts


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _search(
    points, directions, bounds, of_points, of_queries, k, first, rounding, tolerance,
    slots, values, counts,
):  # fmt: skip
    most = slots.shape[1]
    for j in range(len(directions)):
        row = bounds[j]
        near = _least(row, first)
        above = np.empty(near.size)
        for t in range(near.size):
            i = near[t]
            square, uncertainty = _norm_form(
                points[i], directions[j], of_points[:, i], of_queries[:, j], rounding
            )
            above[t] = np.sqrt(maximum(square + uncertainty, 0.0))
        limit = np.sort(above)[k - 1] * (1 + tolerance)
        limit = row.dtype.type(limit)
        near = np.sort(near)
        counts[j] = _count(row, near, limit)
        if counts[j] > most:
            continue
        place, known = 0, 0
        for i in range(row.size):
            is_known = known < near.size and near[known] == i
            known += is_known
            if not is_known and row[i] > limit:
                continue
            square, uncertainty = _norm_form(
                points[i], directions[j], of_points[:, i], of_queries[:, j], rounding
            )
            slots[j, place] = i
            if square > uncertainty / (2 * tolerance):
                values[j, place] = np.sqrt(square)
            place += 1


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _norm_form(point, direction, of_point, of_query, rounding):
    product = point.dtype.type(0)
    for t in range(point.size):
        product += point[t] * direction[t]
    h, own = of_point[0], of_query[0]
    uncertainty = rounding * (h + own + 2 * of_point[2] * of_query[1]) + of_point[1]
    return h + own - 2 * np.float64(product), uncertainty


@njit(nogil=True, cache=True, error_model="numpy")
def _count(row, near, limit):
    """How many bounds are at most the limit, including those examined already."""
    count = near.size
    for i in range(row.size):
        count += row[i] <= limit
    for i in near:
        count -= row[i] <= limit
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def _least(row, count):
    """Positions of the least entries, by a heap whose top is the largest of them."""
    heap, where = np.empty(count, row.dtype), np.empty(count, np.int64)
    heap[:] = np.inf
    where[:] = -1
    top = heap[0]
    for i in range(row.size):
        x = row[i]
        # the first entries come in even if they are infinite
        if x < top or (where[0] < 0 and x == top):
            place = 0
            while True:
                child = 2 * place + 1
                if child >= count:
                    break
                if child + 1 < count and _is_above(heap, where, child + 1, child):
                    child += 1
                is_larger = heap[child] > x or where[child] < 0
                if not is_larger:
                    break
                heap[place], where[place] = heap[child], where[child]
                place = child
            heap[place], where[place] = x, i
            top = heap[0]
    return where


@njit(nogil=True, cache=True, error_model="numpy")
def _is_above(heap, where, one, other):
    """Whether an entry is larger than another, or has no place yet."""
    if where[other] < 0:
        return False
    return where[one] < 0 or heap[one] > heap[other]
