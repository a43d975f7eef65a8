"""Tiles of what derivatives of attention need beside products and weights."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastattn._ops.cpu.tiles import (
    _FLOATS,
    _VECTORS,
    COLUMNS,
    _fma,
    _load,
    _long,
    _pointer,
    _summed,
    _vectors,
)


@intrinsic
def change_float_tile(typingctx, left, row, right, column, steps, weights, moment, out):
    """Write a tile of products, and add them times their weights to ``moment``.

    ``sum_k left[k, l] * right[k, c]`` are written to ``out``, whose lines lie as those
    of the weights. Addresses and distances are those of ``weigh_float_tile``.
    """

    def codegen(context, builder, signature, args):
        left, row, right, column, steps, weights, moment, out = args
        zero = [ir.Constant(_FLOATS, [0.0] * 16)] * (COLUMNS * _VECTORS)
        made = _summed(
            builder, "floats", zero, left, row, right, column, _long(4), steps
        )
        moments = _vectors(builder, moment)
        for i, total in enumerate(made):
            v, there = i % _VECTORS, _long(64 * i)
            weight = _load(builder, builder.add(weights, there), _FLOATS)
            moments[v] = _fma(builder, weight, total, moments[v])
            _store(builder, total, builder.add(out, there))
        for v, total in enumerate(moments):
            _store(builder, total, builder.add(moment, _long(64 * v)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), codegen


@intrinsic
def slope_float_tile(typingctx, weights, change, share, drift, own, slopes):
    """Write weights of a tile, and what they make the derivatives by its logits.

    ``share[l] * weights[c, l]``, cut to at most one, are written to ``own``, and those
    times ``change[c, l] - drift[l]`` to ``slopes``. All are addresses.
    """

    def codegen(context, builder, signature, args):
        weights, change, share, drift, own, slopes = args
        shares, drifts = _vectors(builder, share), _vectors(builder, drift)
        one = ir.Constant(_FLOATS, [1.0] * 16)
        for i in range(COLUMNS * _VECTORS):
            v, there = i % _VECTORS, _long(64 * i)
            weight, slope = (
                _load(builder, builder.add(x, there), _FLOATS)
                for x in (weights, change)
            )
            weight = builder.fmul(weight, shares[v])
            weight = builder.select(builder.fcmp_ordered("<", weight, one), weight, one)
            slope = builder.fmul(weight, builder.fsub(slope, drifts[v]))
            _store(builder, weight, builder.add(own, there))
            _store(builder, slope, builder.add(slopes, there))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


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
