"""Products with basis functions, one function to a line: by BLAS, or in bfloat16.

Rounded to bfloat16, a product of two matrices takes half the time where the processor
multiplies such numbers; sums are float32.
"""

import numpy as np

from fastattn._ops.cpu.packing import pack_pair_lanes, pack_rows
from fastattn._ops.cpu.tile_products import combine_functions, weigh_values
from fastattn._ops.cpu.tiles import (
    COLUMNS,
    LANES,
    add_tile,
    multiplies_bytes,
    pair,
    whole_tiles,
)
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE


def rounds(low_precision, dtype):
    """Whether products that may be in low precision are rounded."""
    return low_precision and dtype == np.float32 and multiplies_bytes()


class Readout:
    """Weights of basis functions, ``(size, p)``, packed for products with rows."""

    def __init__(self, weights, rounded):
        self.weights, self.pairs = weights, None
        if rounded:
            self.pairs, self.across = _packed(weights), _packed(weights.T.copy())

    def multiply(self, rows, out):
        """Write ``weights @ rows.T``; ``out`` has as many lines as the padded tiles."""
        size, n = len(self.weights), len(rows)
        if self.pairs is None or n % LANES:
            np.matmul(self.weights, rows.T, out=out[:size])
            return
        lanes = np.empty((n // LANES, self.pairs.shape[1], LANES), np.uint32)
        _pack_groups(rows, lanes)
        _add_products(lanes, self.pairs, out, 1)

    def read(self, features, out):
        """Write ``features.T @ weights``, for features with a column for each row."""
        n = features.shape[1]
        if self.pairs is None or n % LANES:
            combine_functions(features, self.weights, out)
            return
        lanes = np.empty((n // LANES, self.across.shape[1], LANES), np.uint32)
        _pack_columns(features, lanes)
        across = np.empty((len(self.across), n), np.float32)
        _add_products(lanes, self.across, across, 1)
        out[:] = across[: out.shape[1]].T


def _packed(x):
    pairs = np.zeros((whole_tiles(len(x)), -(-x.shape[1] // 2)), np.uint32)
    pack_rows(x, pairs)
    return pairs


class Sums:
    """Sums over rows of their functions, ``(size, n)``, times rows of p numbers."""

    def __init__(self, size, p, most, rounded, dtype):
        self.size, self.p = size, p
        self.pairs = None
        if rounded:
            self.pairs = np.empty(whole_tiles(size) * -(-most // 2), np.uint32)
            width = -(-p // LANES) * LANES
            self.part = np.zeros((whole_tiles(size), width), np.float32)
        else:
            self.part = np.empty((size, p), dtype)
            self.sums = np.zeros((size, p))

    def add(self, features, rows):
        """Add the products of so many rows."""
        if self.pairs is None:
            weigh_values(features, rows, self.part)
            self.sums += self.part
            return
        steps = -(-len(rows) // 2)
        pairs = self.pairs[: len(self.part) * steps].reshape(-1, steps)
        pack_rows(features, pairs)
        lanes = np.empty((self.part.shape[1] // LANES, steps, LANES), np.uint32)
        _pack_columns(rows, lanes)
        _add_products(lanes, pairs, self.part, 0)

    def total(self):
        """Return the sums, ``(size, p)``."""
        return self.sums if self.pairs is None else self.part[: self.size, : self.p]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _add_products(lanes, pairs, out, fresh):
    groups, steps, _ = lanes.shape
    for c in range(0, pairs.shape[0], COLUMNS):
        for g in range(groups):
            add_tile(
                lanes[g].ctypes.data, 4 * LANES,
                pairs.ctypes.data + 4 * steps * c, 4 * steps, 4, steps,
                out.ctypes.data + 4 * (out.shape[1] * c + LANES * g),
                4 * out.shape[1], fresh,
            )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack_groups(x, lanes):
    for g in range(lanes.shape[0]):
        pack_pair_lanes(x, g * LANES, lanes[g])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _pack_columns(x, lanes):
    # neighbours of every column; columns, padded with zeros, are lanes
    n, p = x.shape
    for g in range(lanes.shape[0]):
        width = min(LANES, p - g * LANES)
        for k in range(lanes.shape[1]):
            low, high = x[2 * k], x[min(2 * k + 1, n - 1)]
            whole = np.float32(2 * k + 1 < n)
            for l in range(width):
                c = g * LANES + l
                lanes[g, k, l] = pair(low[c], whole * high[c])
            lanes[g, k, width:] = 0
