"""Tiles of the backward pass: ``grad V^T``, ``P`` and ``dS`` in registers."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastattn._ops.cpu.tiles import (
    COLUMNS,
    FLOATS,
    PAIRS,
    VECTORS,
    WORDS,
    fma,
    load,
    long,
    store,
    summed,
    vectors,
)

_ROUND = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"


@intrinsic
def change_float_tile(typingctx, left, row, right, column, steps, weights, moment, out):
    """Write a tile of products, and add them times their weights to ``moment``.

    ``sum_k left[k, l] * right[k, c]`` are written to ``out``, whose lines lie as those
    of the weights. Addresses and distances are those of ``weigh_float_tile``.
    """
    return types.void(*[types.intp] * 8), _change_code("floats", _alone)


@intrinsic
def change_pair_tile(typingctx, left, row, right, column, steps, weights, moment, out):
    """As ``change_float_tile``, with products of pairs of bfloat16 numbers.

    Each word that is written holds the rounded weight and, below it, the rounded
    product.
    """
    return types.void(*[types.intp] * 8), _change_code("pairs", _joined)


def _change_code(kind, written):
    def codegen(context, builder, signature, args):
        left, row, right, column, steps, weights, moment, out = args
        zero = [ir.Constant(FLOATS, [0.0] * 16)] * (COLUMNS * VECTORS)
        made = summed(builder, kind, zero, left, row, right, column, long(4), steps)
        moments = vectors(builder, moment)
        for i, total in enumerate(made):
            v, there = i % VECTORS, long(64 * i)
            weight = load(builder, builder.add(weights, there), FLOATS)
            moments[v] = fma(builder, weight, total, moments[v])
            both = written(builder, total, weight)
            store(builder, both, builder.add(out, there))
        for v, total in enumerate(moments):
            store(builder, total, builder.add(moment, long(64 * v)))
        return context.get_dummy_value()

    return codegen


@intrinsic
def slope_float_tile(typingctx, weights, change, share, delta, own, slopes):
    """Write weights ``P`` of a tile, and derivatives ``dS`` by its logits.

    ``P[c, l] = share[l] * weights[c, l]``, cut to at most one, is written to ``own``,
    and ``dS[c, l] = P[c, l] * (change[c, l] - delta[l])`` to ``slopes``. All arguments
    are addresses.
    """

    def codegen(context, builder, signature, args):
        weights, change, share, delta, own, slopes = args
        kept = []
        for i in range(COLUMNS * VECTORS):
            places = (builder.add(x, long(64 * i)) for x in (weights, change))
            kept.append([load(builder, x, FLOATS) for x in places])
        for i, (weight, slope) in enumerate(_slopes(builder, kept, share, delta)):
            there = long(64 * i)
            store(builder, weight, builder.add(own, there))
            store(builder, slope, builder.add(slopes, there))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


@intrinsic
def slope_pair_tile(typingctx, words, share, delta, own, slopes, across):
    """As ``slope_float_tile``, with both factors in one word; results are rounded.

    Neighbouring lanes are pairs; ``across`` receives ``dS`` with neighbouring lines in
    pairs.
    """

    def codegen(context, builder, signature, args):
        words, share, delta, own, slopes, across = args
        kept = []
        for i in range(COLUMNS * VECTORS):
            word = load(builder, builder.add(words, long(64 * i)), WORDS)
            kept.append(_parted(builder, word))
        made = _slopes(builder, kept, share, delta)
        for c in range(COLUMNS):
            lines = made[c * VECTORS : (c + 1) * VECTORS]
            for i, place in enumerate((own, slopes)):
                both = _halves(builder, *(x[i] for x in lines))
                store(builder, both, builder.add(place, long(64 * c)))
        for i in range(0, COLUMNS * VECTORS, 2 * VECTORS):
            for v in range(VECTORS):
                both = _joined(builder, made[i + v][1], made[i + v + VECTORS][1])
                place = builder.add(across, long(64 * (i // 2 + v)))
                store(builder, both, place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


def _slopes(builder, kept, shares, deltas):
    """Weights ``P`` and derivatives ``dS`` by logits, as the vectors of a tile."""
    shares, deltas = vectors(builder, shares), vectors(builder, deltas)
    one, made = ir.Constant(FLOATS, [1.0] * 16), []
    for i, (relative, slope) in enumerate(kept):
        v = i % VECTORS
        weight = builder.fmul(relative, shares[v])
        is_less = builder.fcmp_ordered("<", weight, one)
        share = builder.select(is_less, weight, one)
        made.append((share, builder.fmul(share, builder.fsub(slope, deltas[v]))))
    return made


def _alone(builder, low, high):
    """The first of two vectors; the second is stored in another array."""
    return low


def _joined(builder, low, high):
    """Two vectors rounded to bfloat16, in the upper and lower halves of words."""
    half = ir.Constant(WORDS, [0x8000] * 16)
    low, high = (builder.add(builder.bitcast(x, WORDS), half) for x in (low, high))
    low = builder.lshr(low, ir.Constant(WORDS, [16] * 16))
    high = builder.and_(high, ir.Constant(WORDS, [0xFFFF0000] * 16))
    return builder.bitcast(builder.or_(low, high), FLOATS)


def _parted(builder, word):
    """Undo ``_joined``: the upper halves, and the lower halves."""
    high = builder.and_(word, ir.Constant(WORDS, [0xFFFF0000] * 16))
    low = builder.shl(word, ir.Constant(WORDS, [16] * 16))
    return [builder.bitcast(x, FLOATS) for x in (high, low)]


def _halves(builder, first, second):
    """The 32 numbers of two vectors rounded, one behind the other."""
    kind = ir.FunctionType(PAIRS, [FLOATS, FLOATS])
    call = cgutils.get_or_insert_function(builder.module, kind, _ROUND)
    return builder.bitcast(builder.call(call, [second, first]), FLOATS)


@intrinsic
def fetch(typingctx, address):
    """Prefetch the cache line at an address into second-level cache."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # to read it, twice or so, and it is no code
        options = [ir.Constant(word, x) for x in (0, 2, 1)]
        builder.call(call, [builder.inttoptr(args[0], byte), *options])
        return context.get_dummy_value()

    return types.void(types.intp), codegen
