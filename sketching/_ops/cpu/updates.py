"""Updates of a metric, each in one pass over the factor and one over the points.

Many products go to BLAS, or to shorter integers where their rounding, which is counted
like any other, stays within that of a fresh norm.
"""

import functools
import math

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum
from sketching._ops.cpu.products import products as single_products
from sketching._ops.cpu.short_products import is_fast, share, short_products, shortened
from sketching._ops.cpu.spans import over_spans

# updates of a factor beyond which matrix products are faster
_FEW = 4
# rows of the factor that are updated at a time
_ROWS = 64
# points of a tile: their products stay in the second-level cache
_TILE = 1024
# points whose few products are finished together: each switch interrupts the pass
_PASS = 8 * _TILE
# vectors, and their numbers, from which on integers are faster
_SHORT = 16, 64
# numbers below which starting another thread costs more than it saves
_SPAN = 1 << 18


def changed_factor(factor, left, right, *, out=None):
    out = np.empty_like(factor) if out is None else out
    if len(left) <= _FEW:
        images = np.zeros_like(right)
        _change_rows(factor, left, right, images, out)
        return out, images
    images = np.tril(left @ left.T, -1) @ right
    # in blocks, whose products are still in the cache when they are added
    for start in range(0, len(factor), _ROWS):
        rows = slice(start, start + _ROWS)
        images += left[:, rows] @ factor[rows]
        np.matmul(left[:, rows].T, right, out=out[rows])
        out[rows] += factor[rows]
    return out, images


def changed_norms(
    points, vectors, of_points, seen, of_updates, *, rounding, steps=None, keep=False
):
    r = of_updates.shape[1]
    kept = np.empty((len(points), r if keep else 0), vectors.dtype)
    if steps is None:
        steps = np.empty(0, vectors.dtype)
    # one vector or two are faster than BLAS
    change = _change_by_pass if len(vectors) <= 2 else _change_by_tiles
    is_plain = not (keep or steps.size)
    if is_plain and _may_be_short(vectors, of_points, of_updates):
        rounding *= share(vectors.shape[1])
        change = functools.partial(_change_by_tiles, short=shortened(vectors))

    def work(start, end):
        part = slice(start, end)
        of_part = points[part], steps[part], of_points[:, part], seen[part], kept[part]
        change(*of_part, vectors, of_updates, rounding)

    over_spans(work, len(points), max(_TILE, _SPAN // points.shape[1]))
    return of_points, kept


def _may_be_short(vectors, of_points, of_updates):
    """Whether rounding to short integers stays within that of a fresh norm."""
    count, d = vectors.shape
    is_long = count >= _SHORT[0] and d >= _SHORT[1] and vectors.dtype == np.float32
    if not (is_long and is_fast()):
        return False
    h, point_norm = of_points[0], of_points[2]
    squares, _, of_right, of_image, _ = of_updates
    # a product is the root of d less than the lengths, as a rule
    terms = np.sum(of_right * (2 * of_image + squares * of_right)) / math.sqrt(d)
    return 2 * share(d) * terms * np.mean(point_norm * point_norm) <= np.mean(h)


def _change_by_tiles(
    points, steps, of_points, seen, kept, vectors, of_updates, rounding, *, short=None
):
    """Multiply some points at a time, and finish while the products are in cache."""
    for start in range(0, len(points), _TILE):
        part = slice(start, start + _TILE)
        rows = points[part]
        if short is not None:
            products = np.empty((len(rows), len(vectors)), vectors.dtype)
            short_products(rows, of_points[2, part], *short, products)
        else:
            # BLAS has no integers
            products = rows.astype(vectors.dtype, copy=False) @ vectors.T
        if steps.size:
            products *= steps[part, None]
        _forget(products, seen[part], of_updates[4])
        _add_all(products, of_updates, rounding, of_points[:, part])
        kept[part] = products[:, : kept.shape[1]]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _change_by_pass(
    points, steps, of_points, seen, kept, vectors, of_updates, rounding
):
    r, m = of_updates.shape[1], vectors.shape[0] - of_updates.shape[1]
    for start in range(0, points.shape[0], _PASS):
        part = slice(start, min(start + _PASS, points.shape[0]))
        rows = points[part]
        products = np.empty((vectors.shape[0], rows.shape[0]), vectors.dtype)
        if vectors.shape[0] == 1:
            single_products(rows, vectors[0], products[0])
        else:
            _paired_products(rows, vectors[0], vectors[1], products)
        if steps.size > 0:
            products *= steps[part]
        _forget(products.T, seen[part], of_updates[4])
        for t in range(r):
            ratio, v = of_updates[1, t], products[t]
            if t < m:
                ratio, v = 1.0, products[r + t]
            update = of_updates[:, t]
            _add(products[t], v, ratio, update, rounding, of_points[:, part])
        _clip(of_points[0, part])
        for t in range(kept.shape[1]):
            kept[part, t] = products[t]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _change_rows(factor, left, right, images, out):
    for i in range(factor.shape[0]):
        before, row = factor[i], out[i]
        for t in range(left.shape[0]):
            share, vector, image = left[t, i], right[t], images[t]
            for j in range(row.size):
                image[j] += share * before[j]
                row[j] = before[j] + share * vector[j]
            before = row


@njit(nogil=True, cache=True, error_model="numpy")
def _forget(products, seen, order):
    """Drop the products with updates that points have seen."""
    r, m = order.size, products.shape[1] - order.size
    for i in range(products.shape[0]):
        if seen[i] > 0:
            for t in range(r):
                if order[t] < seen[i]:
                    products[i, t] = 0
                    if t < m:
                        products[i, r + t] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add_all(products, of_updates, rounding, of_points):
    """Add the changes of norms by many updates, one point after the other."""
    squares, ratios, long = of_updates[0], of_updates[1], of_updates[2]
    wide = of_updates[3] + squares * long
    both = (long * (of_updates[3] + wide)).sum()
    r, m = squares.size, products.shape[1] - squares.size
    # the difference of both where one vector is a multiple of the other
    curve, slope = (2 * ratios + squares)[m:], (np.abs(ratios) * long + wide)[m:]
    for i in range(products.shape[0]):
        row, others, change, terms = products[i], products[i, m:r], 0.0, 0.0
        for t in range(m):
            w, v = np.float64(row[t]), np.float64(row[r + t])
            change += w * (2 * v + squares[t] * w)
            terms += abs(v) * long[t] + abs(w) * wide[t]
        for t in range(others.size):
            w = np.float64(others[t])
            change += curve[t] * (w * w)
            terms += slope[t] * abs(w)
        of_points[0, i] = maximum(of_points[0, i] + change, 0.0)
        apart = rounding * of_points[2, i]
        of_points[1, i] += apart * (2 * terms + apart * both)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add(w, v, ratio, update, rounding, of_points):
    """Add the changes of norms by one update, of all points at once."""
    h, off, point_norm = of_points[0], of_points[1], of_points[2]
    square, long = update[0], update[2]
    wide = update[3] + square * long
    both = long * (update[3] + wide)
    for i in range(w.size):
        one, other = np.float64(w[i]), ratio * v[i]
        h[i] += one * (2 * other + square * one)
        terms, apart = abs(other) * long + abs(one) * wide, rounding * point_norm[i]
        off[i] += apart * (2 * terms + apart * both)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _clip(h):
    for i in range(h.size):
        h[i] = maximum(h[i], 0.0)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _paired_products(points, left, right, out):
    kind = left.dtype.type
    for i in range(points.shape[0]):
        row, first, second = points[i], kind(0), kind(0)
        for t in range(row.size):
            first += kind(row[t]) * left[t]
            second += kind(row[t]) * right[t]
        out[0, i], out[1, i] = first, second
