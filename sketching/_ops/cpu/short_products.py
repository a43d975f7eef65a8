"""Products of rows in 16-bit integers, twice as many a cycle as in single precision.

Each row is rounded to steps proportional to its length. Half a step of error in every
number changes a product of long rows by far less than the bound on the rounding of
single precision, and is bounded in the same way (:func:`share`).
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.features import has

# steps of a length: no number of a row, and no sum of products, overflows the integers
_STEPS = 32767
# numbers that are multiplied at once, and rows and columns of a block of products
_LANES, _SIDE = 32, 4
# rows that are rounded at a time: they stay in the second-level cache
_TILE = 128


def is_fast():
    """Whether the processor multiplies and adds pairs of short integers at once."""
    return has("avx512bw", "avx512vnni")


def share(d):
    """Rounding of a product, in units of that of a sum of ``d`` in single precision.

    Half a step of rounding in both factors is bounded by Hoeffding's inequality.
    """
    unit = float(np.finfo(np.float32).eps) / 2
    return 1 + math.sqrt(0.5) / _STEPS / (unit * (1 + math.sqrt(d)))


def shortened(rows):
    """Round rows to integers, in whole blocks; return them and their steps."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    count, d = rows.shape
    codes = np.zeros((-(-count // _SIDE) * _SIDE, -(-d // _LANES) * _LANES), np.int16)
    _round(rows, lengths, codes)
    return codes, lengths / _STEPS


@njit(nogil=True, cache=True, error_model="numpy")
def short_products(points, lengths, codes, steps, out):
    """Write the products of points, of such lengths, with rows that were shortened."""
    some = np.zeros((_TILE, codes.shape[1]), np.int16)
    block = np.empty((_SIDE, _SIDE), np.int32)
    for first in range(0, points.shape[0], _TILE):
        part = slice(first, min(first + _TILE, points.shape[0]))
        result, scales = out[part], lengths[part] / _STEPS
        _round(points[part], lengths[part], some)
        for i in range(0, result.shape[0], _SIDE):
            for j in range(0, codes.shape[0], _SIDE):
                _multiply(some, i, codes, j, block)
                for a in range(min(_SIDE, result.shape[0] - i)):
                    for b in range(min(_SIDE, result.shape[1] - j)):
                        result[i + a, j + b] = (
                            block[a, b] * scales[i + a] * steps[j + b]
                        )


@njit(nogil=True, cache=True, error_model="numpy")
def _round(rows, lengths, out):
    for i in range(rows.shape[0]):
        row, codes = rows[i], out[i]
        # products with less are zero in single precision
        scale = np.float32(_STEPS / lengths[i] if lengths[i] > 1e-30 else 0)
        for t in range(row.size):
            codes[t] = np.int16(np.rint(row[t] * scale))


@intrinsic
def _multiply(typingctx, rows, i, columns, j, out):
    """Write the products of four rows from ``i`` on with four columns from ``j`` on."""
    signature = types.void(rows, types.intp, columns, types.intp, out)
    return signature, _multiply_code


def _multiply_code(context, builder, signature, args):
    short, word, size = (ir.IntType(bits) for bits in (16, 32, 64))
    wide, sums = ir.VectorType(short, _LANES), ir.VectorType(word, _LANES // 2)
    arrays = [
        context.make_array(kind)(context, builder, args[at])
        for at, kind in enumerate(signature.args)
        if at % 2 == 0
    ]
    width = cgutils.unpack_tuple(builder, arrays[0].shape)[1]
    starts = [
        builder.gep(array.data, [builder.mul(builder.add(first, size(k)), width)])
        for array, first in zip(arrays, (args[1], args[3]), strict=False)
        for k in range(_SIDE)
    ]
    pairs = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(sums, [wide, wide]),
        "llvm.x86.avx512.pmaddw.d.512",
    )
    total = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(word, [sums]), "llvm.vector.reduce.add.v16i32"
    )
    before = builder.block
    loop, done = (builder.append_basic_block(name) for name in ("loop", "done"))
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(size)
    at.add_incoming(size(0), before)
    held = [builder.phi(sums) for _ in range(_SIDE**2)]
    loaded = []
    for start in starts:
        place = builder.bitcast(builder.gep(start, [at]), wide.as_pointer())
        loaded.append(builder.load(place, align=2))
    for number, old in enumerate(held):
        row, column = divmod(number, _SIDE)
        product = builder.call(pairs, [loaded[row], loaded[_SIDE + column]])
        new = builder.add(old, product)
        old.add_incoming(ir.Constant(sums, None), before)
        old.add_incoming(new, loop)
    following = builder.add(at, size(_LANES))
    at.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, width), loop, done)
    builder.position_at_end(done)
    for number, old in enumerate(held):
        place = builder.gep(arrays[2].data, [size(number)])
        builder.store(builder.call(total, [old.incomings[1][0]]), place)
    return context.get_dummy_value()
