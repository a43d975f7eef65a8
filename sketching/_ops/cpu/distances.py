"""Scans over all points in tiles: a product by BLAS, then one pass over the tile."""

from typing import Any

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE, maximum
from sketching._ops.cpu.products import vector_products
from sketching._ops.cpu.spans import over_spans

# numbers of one tile of products: they stay in the second-level cache
_TILE = 1 << 16
# numbers below which starting another thread costs more than it saves
_SPAN = 1 << 18


def scan(points, directions, of_points, of_queries, *, rounding, tolerance, steps=None):
    out = np.empty((len(directions), len(points)), directions.dtype)
    counts = np.zeros((len(directions), len(points) // _rows(directions) + 1), int)

    def finish(products, start, end):
        number = start // _rows(directions)
        columns, result = of_points[:, start:end], out[:, start:end]
        if steps is not None:
            products *= steps[start:end]
        _finish_scan(
            products, columns, of_queries, rounding, 0.5 / tolerance, result,
            counts[:, number],
        )  # fmt: skip

    _tiles(points, directions, finish)
    return out, counts.sum(axis=1)


def brackets(codes, queries, of_points, of_queries, *, rounding, tolerance):
    out = np.empty((len(queries), len(codes)), codes.dtype)
    shape = (len(queries), len(codes) // _rows(queries) + 1)
    counts, worst = np.zeros(shape, int), np.zeros(shape)

    def finish(products, start, end):
        number = start // _rows(queries)
        _finish_brackets(
            products, of_points[:, start:end], of_queries, rounding, tolerance,
            out[:, start:end], counts[:, number], worst[:, number],
        )  # fmt: skip

    _tiles(codes, queries, finish)
    return out, worst.max(axis=1), counts.sum(axis=1)


def lower_bounds(codes, queries, of_points, of_queries, *, rounding):
    out = np.empty((len(queries), len(codes)), codes.dtype)

    def finish(products, start, end):
        columns, result = of_points[:, start:end], out[:, start:end]
        _finish_lower(products, columns, of_queries, rounding, result)

    _tiles(codes, queries, finish)
    return out


def _rows(queries):
    return max(256, _TILE // len(queries))


def _tiles(points, queries, finish):
    """Call ``finish`` with the products of the queries and some points at a time."""
    rows = _rows(queries)

    def work(start, end):
        for first in range(start, end, rows):
            last = min(first + rows, end)
            some = points[first:last]
            if len(queries) == 1:
                products = vector_products(some, queries[0])[None]
            else:
                # BLAS has no integers
                some = some.astype(queries.dtype, copy=False)
                products = queries @ some.T
            finish(products, first, last)

    # whole tiles, so that each has a column of counts to itself
    per = -(-(_SPAN * 16) // (points.shape[1] * rows)) * rows
    over_spans(work, len(points), per)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish_scan(products, of_points, of_queries, rounding, share, out, counts):
    for j in range(products.shape[0]):
        own, length = of_queries[0, j], of_queries[1, j]
        h, off, point_norm = of_points[0], of_points[1], of_points[2]
        row, result, count = products[j], out[j], 0
        for i in range(row.size):
            square = h[i] + own - 2 * row[i]
            uncertainty = rounding * (h[i] + own + 2 * point_norm[i] * length) + off[i]
            is_uncertain = square <= share * uncertainty
            count += is_uncertain
            result[i] = np.sqrt(np.nan if is_uncertain else square)
        counts[j] = count


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish_brackets(
    products, of_points, of_queries, rounding, tolerance, out, counts, worst
):
    h, off, least, most = of_points[0], of_points[1], of_points[2], of_points[3]
    for j in range(products.shape[0]):
        own, tail = of_queries[0, j], of_queries[1, j]
        row, result, count, top = products[j], out[j], 0, 0.0
        for i in range(row.size):
            near = h[i] + own - 2 * row[i]
            uncertainty = rounding * (h[i] + own) + off[i]
            apart: Any = maximum(maximum(least[i] - tail, tail - most[i]), 0.0)
            low = np.sqrt(maximum(near - uncertainty, 0.0) + apart * apart)
            wide = tail + most[i]
            high = np.sqrt(maximum(near + uncertainty, 0.0) + wide * wide)
            total = low + high
            error = (high - low) / total if total > 0 else 0.0
            is_wide = error > tolerance
            count += is_wide
            top = maximum(top, 0.0 if is_wide else error)
            value = 2 * low * high / total if total > 0 else 0.0
            result[i] = np.nan if is_wide else value
        counts[j], worst[j] = count, top


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _finish_lower(products, of_points, of_queries, rounding, out):
    h, off, least, most = of_points[0], of_points[1], of_points[2], of_points[3]
    for j in range(products.shape[0]):
        own, tail = of_queries[0, j], of_queries[1, j]
        row, result = products[j], out[j]
        for i in range(row.size):
            near = h[i] + own - 2 * row[i] - rounding * (h[i] + own) - off[i]
            apart: Any = maximum(maximum(least[i] - tail, tail - most[i]), 0.0)
            result[i] = np.sqrt(maximum(near, 0.0) + apart * apart)
