"""Quantized attention: softmax attention by int8 or bfloat16 matmul."""

import math
from typing import Any

from sketching._lib.arrays import Array, array_namespace, device_of, place_of
from sketching._lib.op import op

# rows of a block of the reference
_BLOCK = 1024
# a float32 less the excess that this factor makes has eight significant bits (Veltkamp)
_SPLIT = 2.0**16 + 1
# the largest integer of quantized queries and keys
STEPS = 127
# keys, evenly spread, whose largest logit a row's weights are relative to
SAMPLED_KEYS = 64


@op("cpu")
def attend_quantized(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    prefix_lengths: Array | None,
    integers: bool,
) -> tuple[Array, Array]:
    """Softmax-weighted means of ``value`` and the log-sum-exp, by rounded factors.

    ``query`` is ``(n, d)``, ``key`` ``(m, d)``, ``value`` ``(m, p)``; row ``i`` sees
    the first ``prefix_lengths[i]`` keys, all where it is None, and one that sees none
    gets zeros and minus infinity. All are centred in float32 and then rounded to
    bfloat16, and so are the weights; the logits of the mean query are not. With
    ``integers`` the other logits are products of integers up to ``STEPS``: a
    key's in units of the largest of its column, a query's in units of its own largest.
    Sums are in float32. Weights are relative to the largest logit of a few keys that
    the row sees. The logarithm of a row whose weights overflow is NaN. No mean leaves
    the range of the values.
    """
    xp = array_namespace(query, key, value)
    query, key, value = (xp.astype(x, xp.float32) for x in (query, key, value))
    query = query * scale
    m, own = key.shape[0], xp.mean(query, axis=0)
    key_mean, value_mean = (xp.mean(x, axis=0) for x in (key, value))
    key = key - key_mean
    tilt = xp.matmul(key, own)
    step = max(1, m // SAMPLED_KEYS)
    sampled = xp.matrix_transpose(key[::step, :])
    left, right = factors(query - own, key, integers=integers)
    low, high = (end(value, axis=0) for end in (xp.min, xp.max))
    value, number = rounded(value - value_mean), xp.arange(m, device=device_of(key))
    values, normalizers = [], []
    for start in range(0, query.shape[0], _BLOCK):
        rows = slice(start, min(start + _BLOCK, query.shape[0]))
        largest = xp.matmul(query[rows, :], sampled)
        if prefix_lengths is not None:
            # row by row; the first key stands in where none is seen
            unseen = xp.logical_and(number > 0, number >= prefix_lengths[rows, None])
            largest = _or(~unseen[:, ::step], largest, -math.inf)
        shift = xp.max(largest, axis=1, keepdims=True)
        logits = xp.matmul(left[rows, :], xp.matrix_transpose(right))
        weights = rounded(xp.exp(logits + tilt - shift))
        empty: Any = xp.zeros_like(shift) > 0
        if prefix_lengths is not None:
            hidden = number[None, :] >= prefix_lengths[rows, None]
            weights = xp.where(hidden, xp.zeros_like(weights), weights)
            empty = (prefix_lengths[rows] == 0)[:, None]
        total = xp.sum(weights, axis=1, keepdims=True)
        sums = xp.matmul(weights, value) / _or(total > 0, total, math.inf)
        reliable = xp.logical_and(total > 0, xp.isfinite(total))
        norm = xp.log(_or(reliable, total, math.nan)) + shift
        norm = norm + xp.matmul(query[rows, :], key_mean)[:, None]
        mean = xp.minimum(xp.maximum(sums + value_mean, low), high)
        values.append(_or(~empty, mean, 0.0))
        normalizers.append(_or(~empty, norm, -math.inf)[:, 0])
    return xp.concat(values), xp.concat(normalizers)


def factors(query: Array, key: Array, *, integers: bool) -> tuple[Array, Array]:
    """Quantized queries and keys, whose products are the logits."""
    if not integers:
        return rounded(query), rounded(key)
    xp = array_namespace(query, key)
    column = _unit(xp.max(xp.abs(key), axis=0))
    query = query * column
    row = _unit(xp.max(xp.abs(query), axis=1))[:, None]
    return xp.round(query / row) * row, xp.round(key / column)


def _unit(largest: Array) -> Array:
    return _or(largest > 0, largest / STEPS, 1.0)


def _or(condition: Array, x: Array, other: float) -> Array:
    """``x`` where the condition holds, otherwise a number."""
    xp = array_namespace(x)
    return xp.where(condition, x, xp.full_like(x, other))


def rounded(x: Array) -> Array:
    """Round float32 numbers to the nearest bfloat16."""
    carried = x * _SPLIT
    return carried - (carried - x)


def multiplies_quantized(x: Array) -> bool:
    """Whether float32 arrays like this one have a faster int8 or bfloat16 matmul."""
    if place_of(x) != "cpu":
        return False
    # numba is imported no earlier than by the kernel
    from fastattn._ops.cpu.tiles import multiplies_bytes

    return multiplies_bytes()
