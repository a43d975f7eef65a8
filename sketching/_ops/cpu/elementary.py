"""exp and max of scalars that LLVM turns into vector code.

numba's ``np.exp`` calls libm one number at a time, and its ``max`` keeps NaN
semantics that stop vectorisation. In a loop over a contiguous row these two run at
a few tenths and a few hundredths of a nanosecond a number.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from sketching._ops.cpu.compile import njit

# sums may be reordered, so that they vectorise; NaN and infinity keep their meaning
REASSOCIATE = {"reassoc", "contract", "nsz"}
# exp relies on a subtraction in two steps, which reordering would undo
CONTRACT = {"contract", "nsz"}


@intrinsic
def power_of_two(typingctx, exponent, like):
    """``2.0 ** exponent`` in the type of ``like`` by writing the exponent's bits."""
    target, bits, bias = {
        types.float32: (ir.FloatType(), 23, 127),
        types.float64: (ir.DoubleType(), 52, 1023),
    }[like]
    integer = types.int32 if like is types.float32 else types.int64

    def codegen(context, builder, signature, args):
        width = ir.IntType(32 if like is types.float32 else 64)
        shifted = builder.shl(
            builder.add(args[0], ir.Constant(width, bias)), ir.Constant(width, bits)
        )
        return builder.bitcast(shifted, target)

    return like(integer, like), codegen


@intrinsic
def maximum(typingctx, x, y):
    """The larger of two numbers that are not NaN."""
    kinds = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}

    def codegen(context, builder, signature, args):
        kind = kinds[signature.return_type]
        function = builder.module.declare_intrinsic(
            "llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind])
        )
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return x(x, x), codegen


@njit(fastmath=CONTRACT, error_model="numpy", cache=True)
def _exp32(x):
    x = maximum(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * (r * r) + r + np.float32(1.0)) * power_of_two(np.int32(n), x)


@njit(fastmath=CONTRACT, error_model="numpy", cache=True)
def _exp64(x):
    x = maximum(x, -708.0)
    n = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693145751953125
    r = r - n * 1.4286068203094173e-6
    # Taylor to degree 13: the remainder on |r| <= ln(2)/2 is below 5e-18
    p = 1.6059043836821613e-10
    p = p * r + 2.08767569878681e-9
    p = p * r + 2.505210838544172e-8
    p = p * r + 2.755731922398589e-7
    p = p * r + 2.7557319223985893e-6
    p = p * r + 2.48015873015873e-5
    p = p * r + 1.984126984126984e-4
    p = p * r + 1.388888888888889e-3
    p = p * r + 8.333333333333333e-3
    p = p * r + 4.1666666666666664e-2
    p = p * r + 1.6666666666666666e-1
    p = p * r + 0.5
    return (p * (r * r) + r + 1.0) * power_of_two(np.int64(n), x)


def exp(x):
    """Exponential of a float up to 88 (float32) or 709; low arguments are clamped."""
    raise NotImplementedError("exp runs inside jitted code only")


@overload(exp, jit_options={"fastmath": CONTRACT, "error_model": "numpy"})
def _choose_exp(x):
    if x is types.float32:
        return lambda x: _exp32(x)  # noqa: PLW0108 (numba wants a pure function)
    if x is types.float64:
        return lambda x: _exp64(x)  # noqa: PLW0108
    return None
