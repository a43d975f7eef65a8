"""Products of numbers rounded to eight bits, two at a time.

AVX-512 BF16, where the processor has it, adds two products of bfloat16 numbers to a
float32 where a fused multiply-add adds one. numba has no such type: pairs are
``uint32``, the first of a pair in the lower half, and the loop over them is written in
LLVM's language, so that a tile of sums stays in registers.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketching._ops.cpu.features import has

# a tile of sums: rows in so many vectors of 16 lanes, and so many columns
_VECTORS, COLUMNS = 2, 8
LANES = 16 * _VECTORS


def multiplies_bfloat16() -> bool:
    """Whether ``add_tile`` may be compiled here."""
    return has("avx512f", "avx512bf16")


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _Bfloat)

    def __hash__(self):
        return hash(_Bfloat)


_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_WORDS = ir.VectorType(_WORD, 16)
_PAIRS = ir.VectorType(_Bfloat(), 32)
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@intrinsic
def pair(typingctx, low, high):
    """Two float32 numbers rounded to bfloat16, in one uint32."""

    def codegen(context, builder, signature, args):
        half, upper = ir.Constant(_WORD, 0x8000), ir.Constant(_WORD, 0xFFFF0000)
        # to the nearest; ties go up
        low, high = (builder.add(builder.bitcast(x, _WORD), half) for x in args)
        low = builder.lshr(low, ir.Constant(_WORD, 16))
        return builder.or_(low, builder.and_(high, upper))

    return types.uint32(types.float32, types.float32), codegen


@intrinsic
def add_tile(typingctx, left, row, right, column, step, steps, sums, line, fresh):
    """Add products of pairs to a tile of sums, ``COLUMNS`` lines of ``LANES`` float32.

    ``sums[c, l] += sum_k left[k, l] * right[k, c]``: ``left``, ``right`` and ``sums``
    are addresses, ``left[k]`` is ``k * row`` bytes away, ``right[k, c]`` ``c * column +
    k * step``, line ``c`` of the sums ``c * line``. Sums that are ``fresh`` start at
    zero.
    """

    def codegen(context, builder, signature, args):
        left, row, right, column, step, steps, sums, line, fresh = args
        columns = [
            builder.add(right, builder.mul(column, _long(c))) for c in range(COLUMNS)
        ]
        places = [
            builder.add(sums, builder.add(builder.mul(line, _long(c)), _long(64 * v)))
            for c in range(COLUMNS)
            for v in range(_VECTORS)
        ]
        before = builder.block
        load, loop, done = (builder.append_basic_block(x) for x in ("load", "k", "end"))
        builder.cbranch(builder.icmp_signed("!=", fresh, _long(0)), loop, load)
        builder.position_at_end(load)
        loaded = [_load(builder, x, _FLOATS) for x in places]
        builder.branch(loop)
        builder.position_at_end(loop)
        starts = [_long(0), left, _long(0)]
        counters = [_phi(builder, _LONG, (before, x), (load, x)) for x in starts]
        zero = ir.Constant(_FLOATS, [0.0] * 16)
        totals = [_phi(builder, _FLOATS, (before, zero), (load, x)) for x in loaded]
        made = _products(builder, totals, counters[1], columns, counters[2])
        after = [
            builder.add(x, by)
            for x, by in zip(counters, (_long(1), row, step), strict=True)
        ]
        more = builder.icmp_signed("<", after[0], steps)
        for old, new in zip(counters + totals, after + made, strict=True):
            old.add_incoming(new, builder.block)
        builder.cbranch(more, loop, done)
        builder.position_at_end(done)
        for place, total in zip(places, made, strict=True):
            builder.store(total, _pointer(builder, place, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), codegen


def _products(builder, totals, left, columns, offset):
    """Totals with one pair of every row and column multiplied and added."""
    dot = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS]), _DOT
    )
    rows = [
        builder.bitcast(
            _load(builder, builder.add(left, _long(64 * v)), _WORDS), _PAIRS
        )
        for v in range(_VECTORS)
    ]
    nothing, made = ir.Constant(_WORDS, ir.Undefined), []
    first, everywhere = ir.Constant(_WORD, 0), ir.Constant(_WORDS, [0] * 16)
    for c, column in enumerate(columns):
        word = _load(builder, builder.add(column, offset), _WORD)
        word = builder.insert_element(nothing, word, first)
        word = builder.shuffle_vector(word, nothing, everywhere)
        word = builder.bitcast(word, _PAIRS)
        for v, lanes in enumerate(rows):
            made.append(builder.call(dot, [totals[c * _VECTORS + v], lanes, word]))
    return made


def _long(x):
    return ir.Constant(_LONG, x)


def _phi(builder, kind, *incoming):
    phi = builder.phi(kind)
    for block, value in incoming:
        phi.add_incoming(value, block)
    return phi


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder, address, kind):
    return builder.load(_pointer(builder, address, kind), align=4)


def packed_rows(x):
    """Neighbours of every row in pairs, ``(m, ceil(d / 2))``."""
    m, d = x.shape
    bits = np.zeros((m, d + d % 2), np.uint32)
    bits[:, :d] = (np.ascontiguousarray(x, np.float32).view(np.uint32) + 0x8000) >> 16
    return bits[:, 0::2] | (bits[:, 1::2] << 16)
