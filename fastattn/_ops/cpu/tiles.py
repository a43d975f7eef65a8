"""Tiles of products that stay in registers, and weights computed from them there.

AVX-512 BF16, where the processor has it, adds two products of bfloat16 numbers to a
float32 where a fused multiply-add adds one; AVX-512 VNNI adds four of bytes. numba has
no such types: pairs are ``uint32``, the first of a pair in the lower half, and the
loops are written in LLVM IR.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketching._ops.cpu.features import has

# a tile of sums: rows in so many vectors of 16 lanes, and so many columns
VECTORS, COLUMNS = 2, 8
LANES = 16 * VECTORS
# exponents of weights are to the base two
LOG2 = 1 / math.log(2)


def whole_tiles(size):
    """A number of columns, rounded up to whole tiles."""
    return -(-size // COLUMNS) * COLUMNS


def has_tiles() -> bool:
    """Whether tiles of float32 numbers may be compiled here."""
    return has("avx512f", "avx512dq")


def multiplies_bytes() -> bool:
    """Whether tiles of all types, bytes included, may be compiled here."""
    return has_tiles() and has("avx512bf16", "avx512vnni")


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _Bfloat)

    def __hash__(self):
        return hash(_Bfloat)


_WORD, _LONG = ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), 16)
WORDS = ir.VectorType(_WORD, 16)
PAIRS = ir.VectorType(_Bfloat(), 32)
_PAIRWISE = "llvm.x86.avx512bf16.dpbf16ps.512"
_BYTEWISE = "llvm.x86.avx512.vpdpbusd.512"
# coefficients of 2 ** x on [0, 1), lowest first: minimax for the relative error,
# 7.5e-5, below the rounding of the weights; and one below the rounding of float32
_POWER = 0.99992522, 0.69583354, 0.22606715, 0.07802453
_FINE_POWER = (
    1.0, 0.693146933, 0.240230454, 0.0554806302, 0.00968418631, 0.00123913318,
    0.000218657848,
)  # fmt: skip


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
    return types.void(*[types.intp] * 9), _add_code("pairs")


@intrinsic
def add_float_tile(typingctx, left, row, right, column, step, steps, sums, line, fresh):
    """Add products of float32 numbers as ``add_tile`` adds those of pairs."""
    return types.void(*[types.intp] * 9), _add_code("floats")


def _add_code(kind):
    def codegen(context, builder, signature, args):
        left, row, right, column, step, steps, sums, line, fresh = args
        places = [
            builder.add(sums, builder.add(builder.mul(line, long(c)), long(64 * v)))
            for c in range(COLUMNS)
            for v in range(VECTORS)
        ]
        before = builder.block
        again, start = (builder.append_basic_block(x) for x in ("again", "start"))
        builder.cbranch(builder.icmp_signed("!=", fresh, long(0)), start, again)
        builder.position_at_end(again)
        loaded = [load(builder, x, FLOATS) for x in places]
        builder.branch(start)
        builder.position_at_end(start)
        zero = ir.Constant(FLOATS, [0.0] * 16)
        first = [_phi(builder, FLOATS, (before, zero), (again, x)) for x in loaded]
        made = summed(builder, kind, first, left, row, right, column, step, steps)
        for place, total in zip(places, made, strict=True):
            store(builder, total, place)
        return context.get_dummy_value()

    return codegen


@intrinsic
def weigh_tile(typingctx, left, row, right, column, steps, tilt, shift, mass, weights):
    """Turn a tile of logits into weights, ``COLUMNS`` lines of ``LANES`` numbers.

    ``2 ** (tilt[c] - shift[l] + sum_k left[k, l] * right[k, c])`` are cut to bfloat16
    and written in pairs, those of two neighbouring lines in one ``uint32``; the rounded
    weights are added to ``mass[l]``. Addresses and distances are those of ``add_tile``;
    the pairs of ``right`` are contiguous.
    """

    def codegen(context, builder, signature, args):
        left, row, right, column, steps, tilt, shift, mass, weights = args
        first = _raised(builder, tilt, shift)
        made = summed(builder, "pairs", first, left, row, right, column, long(4), steps)
        _weigh(builder, made, mass, weights)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), codegen


@intrinsic
def weigh_float_tile(typingctx, left, row, right, column, steps, shift, mass, weights):
    """Turn a tile of logits into weights, without rounding beyond float32's.

    ``2 ** (sum_k left[k, l] * right[k, c] - shift[l])`` are written and added to
    ``mass[l]``. Addresses and distances are those of ``weigh_tile``.
    """
    return types.void(*[types.intp] * 8), _weigh_code("floats", _FINE_POWER)


@intrinsic
def weigh_pair_tile(typingctx, left, row, right, column, steps, shift, mass, weights):
    """Turn a tile of logits, made from bfloat16 pairs, into float32 weights."""
    return types.void(*[types.intp] * 8), _weigh_code("pairs", _POWER)


def _weigh_code(kind, coefficients):
    def codegen(context, builder, signature, args):
        left, row, right, column, steps, shift, mass, weights = args
        zero = [ir.Constant(FLOATS, [0.0] * 16)] * (COLUMNS * VECTORS)
        made = summed(builder, kind, zero, left, row, right, column, long(4), steps)
        shifts, masses = vectors(builder, shift), vectors(builder, mass)
        for i, total in enumerate(made):
            v = i % VECTORS
            exponent = builder.fsub(total, shifts[v])
            power = _power_of_two(builder, exponent, coefficients)
            masses[v] = builder.fadd(masses[v], power)
            place = builder.add(weights, long(64 * i))
            store(builder, power, place)
        for v, total in enumerate(masses):
            store(builder, total, builder.add(mass, long(64 * v)))
        return context.get_dummy_value()

    return codegen


@intrinsic
def weigh_integer_tile(
    typingctx, left, row, right, column, steps, offset, unit, tilt, shift, mass, weights
):
    """Turn a tile of logits into weights as ``weigh_tile`` does, from integers.

    Each ``uint32`` holds four bytes, unsigned on the left and signed on the right. The
    integer product starts at ``offset[c]`` and is added to the logits in units of
    ``unit[l]``.
    """

    def codegen(context, builder, signature, args):
        left, row, right, column, steps, offset, unit = args[:7]
        tilt, shift, mass, weights = args[7:]
        first = []
        for c in range(COLUMNS):
            own = load(builder, builder.add(offset, long(4 * c)), _WORD)
            first.extend([_everywhere(builder, WORDS, own)] * VECTORS)
        made = summed(builder, "bytes", first, left, row, right, column, long(4), steps)
        units, raised = vectors(builder, unit), _raised(builder, tilt, shift)
        logits = [
            fma(builder, builder.sitofp(x, FLOATS), units[i % VECTORS], raised[i])
            for i, x in enumerate(made)
        ]
        _weigh(builder, logits, mass, weights)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 11), codegen


def _raised(builder, tilt, shift):
    """``tilt[c] - shift[l]`` for the vectors of a tile."""
    shifts = vectors(builder, shift)
    made: list[Any] = []
    for c in range(COLUMNS):
        own = load(builder, builder.add(tilt, long(4 * c)), ir.FloatType())
        own = _everywhere(builder, FLOATS, own)
        made.extend(builder.fsub(own, x) for x in shifts)
    return made


def _weigh(builder, logits, mass, weights):
    """Write the powers of two of a tile of logits in pairs, and add them to a mass."""
    made = [builder.bitcast(_power_of_two(builder, x, _POWER), WORDS) for x in logits]
    masses, half = vectors(builder, mass), ir.Constant(WORDS, [16] * 16)
    upper = ir.Constant(WORDS, [0xFFFF0000] * 16)
    ones = ir.Constant(WORDS, [0x3F803F80] * 16)
    for c in range(0, COLUMNS, 2):
        for v in range(VECTORS):
            low, high = (made[(c + i) * VECTORS + v] for i in range(2))
            both = builder.or_(builder.lshr(low, half), builder.and_(high, upper))
            masses[v] = _dot(builder, masses[v], both, ones)
            place = builder.add(weights, long(4 * (c // 2 * LANES + 16 * v)))
            store(builder, both, place)
    for v, total in enumerate(masses):
        store(builder, total, builder.add(mass, long(64 * v)))


def summed(builder, kind, first, left, row, right, column, step, steps):
    """Totals after all words are multiplied and added, ``steps`` at least one."""
    columns = [builder.add(right, builder.mul(column, long(c))) for c in range(COLUMNS)]
    before = builder.block
    loop, done = (builder.append_basic_block(x) for x in ("k", "end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    starts = (long(0), left, long(0))
    counters = [_phi(builder, _LONG, (before, x)) for x in starts]
    totals = [_phi(builder, first[0].type, (before, x)) for x in first]
    made = _products(builder, kind, totals, counters[1], columns, counters[2])
    after = [
        builder.add(x, by) for x, by in zip(counters, (long(1), row, step), strict=True)
    ]
    more = builder.icmp_signed("<", after[0], steps)
    for old, new in zip(counters + totals, after + made, strict=True):
        old.add_incoming(new, builder.block)
    builder.cbranch(more, loop, done)
    builder.position_at_end(done)
    return made


def _products(builder, kind, totals, left, columns, offset):
    """Totals after one word of every row and column is multiplied and added."""
    multiply = {"pairs": _dot, "bytes": _dot_integers, "floats": _dot_floats}[kind]
    rows = vectors(builder, left, WORDS)
    made: list[Any] = []
    for c, column in enumerate(columns):
        word = load(builder, builder.add(column, offset), _WORD)
        word = _everywhere(builder, WORDS, word)
        for v, lanes in enumerate(rows):
            made.append(multiply(builder, totals[c * VECTORS + v], lanes, word))
    return made


def _dot(builder, total, left, right):
    kind = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
    call = cgutils.get_or_insert_function(builder.module, kind, _PAIRWISE)
    left, right = (builder.bitcast(x, PAIRS) for x in (left, right))
    return builder.call(call, [total, left, right])


def _dot_integers(builder, total, left, right):
    kind = ir.FunctionType(WORDS, [WORDS] * 3)
    call = cgutils.get_or_insert_function(builder.module, kind, _BYTEWISE)
    return builder.call(call, [total, left, right])


def _dot_floats(builder, total, left, right):
    left, right = (builder.bitcast(x, FLOATS) for x in (left, right))
    return fma(builder, left, right, total)


def fma(builder, x, y, z):
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
    return builder.call(call, [x, y, z])


def _power_of_two(builder, x, coefficients):
    """``2 ** x``: a polynomial of the fractional part, scaled by the integer part."""
    module, all_lanes = builder.module, ir.Constant(ir.IntType(16), 0xFFFF)
    nothing, one = ir.Constant(FLOATS, None), ir.Constant(_WORD, 1)
    # rounding as the processor is set to
    current = ir.Constant(_WORD, 4)
    kinds = FLOATS, [FLOATS, _WORD, FLOATS, ir.IntType(16), _WORD]
    reduce = cgutils.get_or_insert_function(
        module, ir.FunctionType(*kinds), "llvm.x86.avx512.mask.reduce.ps.512"
    )
    # less the integer below
    rest = builder.call(reduce, [x, one, nothing, all_lanes, current])
    *lower, highest = (ir.Constant(FLOATS, [c] * 16) for c in coefficients)
    y = highest
    for c in reversed(lower):
        y = fma(builder, y, rest, c)
    kinds = FLOATS, [FLOATS, FLOATS, FLOATS, ir.IntType(16), _WORD]
    scale = cgutils.get_or_insert_function(
        module, ir.FunctionType(*kinds), "llvm.x86.avx512.mask.scalef.ps.512"
    )
    return builder.call(scale, [y, x, nothing, all_lanes, current])


def _everywhere(builder, kind, number):
    """A vector with one number in all lanes."""
    nothing = ir.Constant(kind, ir.Undefined)
    first, lanes = ir.Constant(_WORD, 0), ir.Constant(WORDS, [0] * 16)
    return builder.shuffle_vector(
        builder.insert_element(nothing, number, first), nothing, lanes
    )


def vectors(builder, address, kind=FLOATS):
    """The vectors at consecutive addresses."""
    places = (builder.add(address, long(64 * v)) for v in range(VECTORS))
    return [load(builder, x, kind) for x in places]


def long(x):
    return ir.Constant(_LONG, x)


def _phi(builder, kind, *incoming):
    phi = builder.phi(kind)
    for block, value in incoming:
        phi.add_incoming(value, block)
    return phi


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def store(builder, vector, address):
    builder.store(vector, _pointer(builder, address, vector.type), align=4)


def load(builder, address, kind):
    return builder.load(_pointer(builder, address, kind), align=4)
