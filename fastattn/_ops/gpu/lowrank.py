"""Both passes of a low-rank softmax: polynomials in shared memory, landmarks by cuBLAS.

A basis polynomial of a row is the product of few polynomials of single coordinates, of
which there are as many as the degrees of all coordinates: these are written to global
memory, and their products are formed where they are multiplied, by the kernels of
:mod:`fastattn._ops.gpu.monomials`. Exponentials at landmarks are matrix products
themselves: those of a block of rows are computed and multiplied by cuBLAS; they are few
enough to stay in a second-level cache.

Not run on a device yet: the kernels were compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in; block sizes are estimates.
"""

import functools

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel
from fastattn._ops.gpu.products import (
    ROWS,
    THREADS,
    lines,
    move_lists,
    spans,
    sum_products,
    tiles,
)
from fastattn._ops.lowrank import CLAMP, LARGEST, LEAST

# exponentials of a block: 32 MiB in float32, what a second-level cache holds
_MARKS = 1 << 23
# keys whose exponentials are summed in working precision
_SPAN = 1024


def key_sums(
    key, value, center, projection, landmarks, value_center, *,
    offset, longest, parent, coordinate, power,
    low_precision=False,  # noqa: ARG001
):  # fmt: skip
    dtype, (m, p), r = projection.dtype, value.shape, len(parent)
    indices = _indices(parent, coordinate, power)
    span, size = spans(m, r, p, dtype)
    landmark_norm = cp.zeros(1, dtype=dtype)
    if len(landmarks):
        landmark_norm = cp.sqrt(cp.sum(landmarks**2, axis=1).max(keepdims=True))
    total = cp.zeros((r + len(landmarks), p + 1), dtype=cp.float64)
    ends, far = [], cp.empty(m, dtype=cp.bool_)
    for lo in range(0, m, size):
        rows = slice(lo, min(lo + size, m))
        centred = key[rows].astype(dtype, copy=False) - center
        y, length = lines(centred, projection), cp.sum(centred**2, axis=1)
        weight = cp.empty(len(length), dtype=dtype)
        scalars = [dtype.type(x) for x in (offset, longest, LARGEST)]
        _over_rows("weigh", y, length, landmark_norm, weight, far[rows], counts=scalars)
        values = value[rows].astype(dtype, copy=False) - value_center
        ends += [values.min(axis=0), values.max(axis=0)]
        table = _tabulate(y, indices, hermite=False)
        total[:r] += sum_products(table, weight, values, indices[1:], r, span)
        if len(landmarks):
            total[r:] += _sum_marks(y, landmarks, values)
    ends = cp.stack(ends)
    return total, cp.stack([ends.min(axis=0), ends.max(axis=0)]), far


def query_means(
    query, functions, weights, far_key, far_value, bounds, value_center, *,
    parent, coordinate, power,
):  # fmt: skip
    projection, origin, landmarks, spread = functions
    dtype, n, p, r = projection.dtype, len(query), len(value_center), len(parent)
    indices = _indices(parent, coordinate, power)
    readout = cp.ascontiguousarray(weights[:r])
    spread, bounds, value_center = map(
        cp.ascontiguousarray, (spread, bounds, value_center)
    )
    value, logarithm = cp.empty((n, p), dtype=dtype), cp.empty(n, dtype=dtype)
    for lo in range(0, n, ROWS):
        rows = slice(lo, min(lo + ROWS, n))
        block = query[rows].astype(dtype, copy=False)
        x = lines(block, projection)
        x -= origin[:, None]
        reliable = cp.empty(len(block), dtype=cp.bool_)
        _over_rows("settle", x, spread, reliable)
        table = _tabulate(x, indices, hermite=True)
        sums = cp.empty((len(block), p + 1), dtype=dtype)
        kernel("monomials.cu", "sums", dtype)(
            tiles(len(block), p),
            (THREADS,),
            (table, readout, *indices[1:], sums, len(block), r, p),
        )
        if len(landmarks):
            _add_marks(x, landmarks, weights[r:], sums)
        if len(far_key):
            _add_far(block, far_key, far_value, reliable, sums)
        kernel("lowrank.cu", "finish", dtype)(
            (-(-sums.size // THREADS),),
            (THREADS,),
            (
                sums, x[-1], reliable, bounds, value_center, value[rows],
                logarithm[rows], len(block), p, dtype.type(LEAST),
            ),
        )  # fmt: skip
    return value, logarithm


def _over_rows(name, x, *arrays, counts=()):
    """Run a kernel for every row of ``x``, ``(t + 1, rows)``."""
    rows = x.shape[1]
    kernel("lowrank.cu", name, x.dtype)(
        (-(-rows // THREADS),),
        (THREADS,),
        (x, *arrays, rows, len(x) - 1, *counts),
    )


def _tabulate(x, indices, *, hermite):
    """Polynomials of single coordinates, one to a line of memory."""
    (first, degrees), rows = indices[0], x.shape[1]
    table = cp.empty((degrees, rows), dtype=x.dtype)
    if degrees:
        kernel("lowrank.cu", "tabulate", x.dtype)(
            (-(-rows // THREADS), len(first) - 1),
            (THREADS,),
            (x, first, table, rows, int(hermite)),
        )
    return table


def _sum_marks(y, landmarks, values):
    """Sum over keys of exponentials at landmarks times ``[value, 1]``, in float64."""
    rows, p = values.shape
    total = cp.zeros((len(landmarks), p + 1), dtype=cp.float64)
    values = cp.concatenate([values, cp.ones_like(values[:, :1])], axis=1)
    size = _SPAN * max(1, _MARKS // (len(landmarks) * _SPAN))
    for lo in range(0, rows, size):
        block = slice(lo, min(lo + size, rows))
        marks = cp.matmul(y[:-1, block].T, landmarks.T)
        marks += y[-1, block, None]
        cp.exp(marks, out=marks)
        total += _summed(marks, values[block])
    return total


def _summed(left, right):
    """The product ``left.T @ right``, rows in spans whose products add in float64."""
    rows = len(left)
    whole = rows // _SPAN * _SPAN
    total = cp.zeros((left.shape[1], right.shape[1]), dtype=cp.float64)
    if whole:
        one, other = (x[:whole].reshape(-1, _SPAN, x.shape[1]) for x in (left, right))
        total += cp.matmul(one.swapaxes(1, 2), other).sum(axis=0, dtype=cp.float64)
    if whole < rows:
        total += cp.matmul(left[whole:].T, right[whole:])
    return total


def _add_marks(x, landmarks, weights, sums):
    """Add the contribution of the exponentials at landmarks to the rows."""
    half = cp.sum(landmarks**2, axis=1) / 2
    size = max(1, _MARKS // len(landmarks))
    for lo in range(0, len(sums), size):
        block = slice(lo, min(lo + size, len(sums)))
        marks = cp.matmul(x[:-1, block].T, landmarks.T)
        marks -= half
        cp.minimum(marks, CLAMP, out=marks)
        cp.exp(marks, out=marks)
        sums[block] += cp.matmul(marks, weights)


def _add_far(query, far_key, far_value, reliable, sums):
    """Add the far keys; a row with an exponent beyond ``LARGEST`` is an outlier."""
    size = max(1, _MARKS // len(far_key))
    for lo in range(0, len(sums), size):
        block = slice(lo, min(lo + size, len(sums)))
        logits = cp.matmul(query[block], far_key.T)
        reliable[block] &= cp.all(logits <= LARGEST, axis=1)
        logits = cp.where(reliable[block, None], logits, 0)
        sums[block] += cp.matmul(cp.exp(logits), far_value)


def _indices(parent, coordinate, power):
    """Return the index arrays of the kernels, on the current device.

    They are the start of the polynomials of each coordinate in a table, with their
    number; and the factors of basis polynomial ``j``, the lines ``factor[start[j]]`` to
    ``factor[start[j + 1] - 1]`` of the table.
    """
    indices = (np.asarray(x, np.int64).tobytes() for x in (parent, coordinate, power))
    return _moved_indices(cp.cuda.runtime.getDevice(), *indices)


@functools.lru_cache(maxsize=16)
def _moved_indices(device, *indices):  # noqa: ARG001 (a part of the key)
    parent, coordinate, power = (np.frombuffer(x, np.int64) for x in indices)
    degree = np.zeros(1 + coordinate.max(), np.int64)
    np.maximum.at(degree, coordinate[1:], power[1:])
    first = np.append(0, np.cumsum(degree))
    number, place = [], np.arange(len(parent))
    while place.any():
        line = first[coordinate[place]] + power[place] - 1
        number.append(np.where(place > 0, line, -1))
        # past all powers of this coordinate
        for left in range(int(power[place].max()), 0, -1):
            place = np.where(power[place] >= left, parent[place], place)
    lists = np.array(number[::-1], dtype=np.int64).reshape(-1, len(parent)).T
    start, factor = move_lists(lists)
    return (cp.asarray(first.astype(np.int32)), int(first[-1])), start, factor
