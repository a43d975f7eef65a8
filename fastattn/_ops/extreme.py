"""Softmax attention whose logits may leave the range of the dtype of computation.

Sums of products that overflow on the way become infinities of either sign, or NaN, and
weights made of them are of any size. Here rows and keys are scaled by powers of two
first, so that no product of them overflows; a difference of logits is scaled back, and
is infinite only where it should be.
"""

import math
from typing import Any

import numpy as np

from sketching._lib.arrays import Array, array_namespace, device_of

# a product of scaled entries is at most so large, in units of the largest number
_SHARE = 1 / 8
# of float64
_LARGEST_EXPONENT = 1023


def may_overflow(query: float, key: float, d: int, dtype_max: float) -> bool:
    """Whether entries, or ``d`` products of them, may overflow, or are NaN."""
    most = _SHARE * dtype_max
    return not (query < most and d * query * key < most)


# powers beyond the range of float64 are infinite, or zero
@np.errstate(over="ignore", under="ignore", invalid="ignore")
def attend_scaled(
    query: Array, key: Array, value: Array, scale: float, prefix_lengths: Array | None
) -> tuple[Array, Array]:
    """Answer queries ``(..., n, d)`` in float64, whatever the size of the logits.

    The arguments are those of ``softmax.attend``, which are finite, and so is the dtype
    of the answers. Log-sum-exps beyond its range are infinite, or its least number:
    of the answers. Log-sum-exps beyond its range are infinite, or its least number:
    minus infinity is reserved for rows that see no key.
    """
    xp, dtype = array_namespace(query, key, value), query.dtype
    query, key, value = (xp.astype(x, xp.float64) for x in (query, key, value))
    query_power = _powers(query, axis=-1)
    key_power = _powers(key, axis=(-2, -1))
    mantissa, power = math.frexp(scale)
    query, key = _raised(query * mantissa, -query_power), _raised(key, -key_power)
    logits = xp.matmul(query, xp.matrix_transpose(key))
    if prefix_lengths is not None:
        number = xp.arange(key.shape[-2], device=device_of(query))
        hidden = number[None, :] >= prefix_lengths[:, None]
        logits = xp.where(hidden, xp.full_like(logits, -xp.inf), logits)
    peak = xp.max(logits, axis=-1, keepdims=True)
    empty = peak == -xp.inf
    peak = xp.where(empty, xp.zeros_like(peak), peak)
    power = query_power + key_power + power
    # equal logits differ by zero in any unit; only others may overflow
    weights = xp.exp(_raised(logits - peak, power))
    total = xp.sum(weights, axis=-1, keepdims=True)
    total = xp.where(empty, xp.ones_like(total), total)
    normalizer = _raised(peak, power) + xp.log(total)
    least = xp.full_like(peak, float(xp.finfo(dtype).min))
    normalizer = xp.where(normalizer < least, least, normalizer)
    normalizer = xp.where(empty, xp.full_like(peak, -xp.inf), normalizer)
    mean = xp.matmul(weights, value) / total
    return xp.astype(mean, dtype), xp.astype(normalizer[..., 0], dtype)


def _powers(x: Array, axis: Any) -> Array:
    """Exponents of two of the largest entries, which are no larger."""
    xp = array_namespace(x)
    largest = xp.max(xp.abs(x), axis=axis, keepdims=True)
    return xp.floor(xp.log2(xp.where(largest > 0, largest, xp.ones_like(largest))))


def _raised(x: Array, power: Array) -> Array:
    """``x * 2 ** power``, where neither factor need be in range; zero stays zero."""
    xp = array_namespace(x)
    for _ in range(4):
        step = xp.clip(power, -_LARGEST_EXPONENT + 1, _LARGEST_EXPONENT)
        x = x * xp.pow(xp.full_like(step, 2.0), step)
        power = power - step
    return x
