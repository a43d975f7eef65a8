"""Tiles of what derivatives of attention need beside products and weights."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastattn._ops.cpu.tiles import (
    _FLOATS,
    _PAIRS,
    _VECTORS,
    _WORDS,
    COLUMNS,
    _fma,
    _load,
    _long,
    _pointer,
    _summed,
    _vectors,
)

_ROUND = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"


@intrinsic
def change_float_tile(typingctx, left, row, right, column, steps, weights, moment, out):
    """Write a tile of products, and add them times their weights to ``moment``.

    ``sum_k left[k, l] * right[k, c]`` are written to ``out``, whose lines lie as those
    of the weights. Addresses and distances are those of ``weigh_float_tile``.
    """
    return types.void(*[types.intp] * 8), _change_code("floats")


@intrinsic
def change_pair_tile(typingctx, left, row, right, column, steps, weights, moment, out):
    """Do as ``change_float_tile`` with products of pairs."""
    return types.void(*[types.intp] * 8), _change_code("pairs")


def _change_code(kind):
    def codegen(context, builder, signature, args):
        left, row, right, column, steps, weights, moment, out = args
        zero = [ir.Constant(_FLOATS, [0.0] * 16)] * (COLUMNS * _VECTORS)
        made = _summed(builder, kind, zero, left, row, right, column, _long(4), steps)
        moments = _vectors(builder, moment)
        for i, total in enumerate(made):
            v, there = i % _VECTORS, _long(64 * i)
            weight = _load(builder, builder.add(weights, there), _FLOATS)
            moments[v] = _fma(builder, weight, total, moments[v])
            _store(builder, total, builder.add(out, there))
        for v, total in enumerate(moments):
            _store(builder, total, builder.add(moment, _long(64 * v)))
        return context.get_dummy_value()

    return codegen


@intrinsic
def slope_float_tile(typingctx, weights, change, share, drift, own, slopes):
    """Write weights of a tile, and what they make the derivatives by its logits.

    ``share[l] * weights[c, l]``, cut to at most one, are written to ``own``, and those
    times ``change[c, l] - drift[l]`` to ``slopes``. All are addresses.
    """

    def codegen(context, builder, signature, args):
        weights, change, share, drift, own, slopes = args
        for i, (weight, slope) in enumerate(
            _slopes(builder, weights, change, share, drift)
        ):
            there = _long(64 * i)
            _store(builder, weight, builder.add(own, there))
            _store(builder, slope, builder.add(slopes, there))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


@intrinsic
def slope_pair_tile(typingctx, weights, change, share, drift, own, slopes, across):
    """Do as ``slope_float_tile``, and round what is written.

    Neighbouring lanes are pairs; to ``across`` go the slopes with neighbouring lines in
    pairs.
    """

    def codegen(context, builder, signature, args):
        weights, change, share, drift, own, slopes, across = args
        made = _slopes(builder, weights, change, share, drift)
        for c in range(COLUMNS):
            lines = made[c * _VECTORS : (c + 1) * _VECTORS]
            for i, place in enumerate((own, slopes)):
                both = _halves(builder, *(x[i] for x in lines))
                _store(builder, both, builder.add(place, _long(64 * c)))
        half, upper = (ir.Constant(_WORDS, [x] * 16) for x in (0x8000, 0xFFFF0000))
        sixteen = ir.Constant(_WORDS, [16] * 16)
        for i in range(0, COLUMNS * _VECTORS, 2 * _VECTORS):
            for v in range(_VECTORS):
                low, high = (
                    builder.add(builder.bitcast(made[x][1], _WORDS), half)
                    for x in (i + v, i + v + _VECTORS)
                )
                both = builder.or_(
                    builder.lshr(low, sixteen), builder.and_(high, upper)
                )
                there = _long(64 * (i // 2 + v))
                _store(
                    builder, builder.bitcast(both, _FLOATS), builder.add(across, there)
                )
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


def _slopes(builder, weights, change, share, drift):
    """Weights and derivatives by logits, the vectors of a tile in order."""
    shares, drifts = _vectors(builder, share), _vectors(builder, drift)
    one, made = ir.Constant(_FLOATS, [1.0] * 16), []
    for i in range(COLUMNS * _VECTORS):
        v, there = i % _VECTORS, _long(64 * i)
        weight, slope = (
            _load(builder, builder.add(x, there), _FLOATS) for x in (weights, change)
        )
        weight = builder.fmul(weight, shares[v])
        weight = builder.select(builder.fcmp_ordered("<", weight, one), weight, one)
        made.append((weight, builder.fmul(weight, builder.fsub(slope, drifts[v]))))
    return made


def _halves(builder, first, second):
    """The 32 numbers of two vectors rounded, one behind the other."""
    kind = ir.FunctionType(_PAIRS, [_FLOATS, _FLOATS])
    call = cgutils.get_or_insert_function(builder.module, kind, _ROUND)
    return builder.bitcast(builder.call(call, [second, first]), _FLOATS)


@intrinsic
def fetch(typingctx, address):
    """Have the line of cache at an address brought into second-level cache."""

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


def _store(builder, vector, address):
    builder.store(vector, _pointer(builder, address, _FLOATS), align=4)
