"""Products with a block of basis functions, one to a line, without packing them.

BLAS copies both sides of a product before it multiplies; where the other side has few
columns the copy takes a large part of the time.
"""

import numpy as np

from fastattn._ops.cpu.tiles import COLUMNS, LANES, add_float_tile, has_tiles
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE


def weigh_values(features, values, out):
    """Write ``features @ values``: of functions by rows, and rows by columns."""
    if not _serves(features, values, out):
        np.matmul(features, values, out=out)
        return
    whole = len(features) // COLUMNS * COLUMNS
    _multiply(features, features.shape[1], 1, values, out[:whole])
    np.matmul(features[whole:], values, out=out[whole:])


def combine_functions(features, readout, out):
    """Write ``features.T @ readout``, of functions by rows and by columns."""
    if not _serves(features, readout, out):
        np.matmul(features.T, readout, out=out)
        return
    whole = features.shape[1] // COLUMNS * COLUMNS
    _multiply(features, 1, features.shape[1], readout, out[:whole])
    np.matmul(features[:, whole:].T, readout, out=out[whole:])


def _serves(*arrays):
    return (
        has_tiles()
        and all(x.dtype == np.float32 and x.flags.c_contiguous for x in arrays)
        and arrays[-1].shape[1] % LANES == 0
        and 0 not in arrays[0].shape
    )


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _multiply(features, column, step, other, out):
    # column and step are how far apart a row, and a term, of the answer lie
    p, terms = other.shape[1], other.shape[0]
    for i in range(0, out.shape[0], COLUMNS):
        for c in range(0, p, LANES):
            add_float_tile(
                other.ctypes.data + 4 * c, 4 * p,
                features.ctypes.data + 4 * column * i, 4 * column, 4 * step, terms,
                out.ctypes.data + 4 * (p * i + c), 4 * p, 1,
            )  # fmt: skip
