"""Exact attention over tuples whose scores or sets of tuples are of a special form.

* Windows: query ``i`` sees the last ``w_s`` keys of each factor up to its own number.
* Strassen: scores ``f_i . g_j + g_j . h_k + h_k . f_i`` are sums over pairs, so that
  sums over tuples are products of matrices.
* Path: scores ``f_i . g_j + g_j . h_k + ...`` are summed from the last factor on, one
  softmax attention after the other.
"""

from collections.abc import Sequence
from typing import Any

from fastattn._ops.softmax import attend
from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op

# numbers of a block of products that exist at once
_NUMBERS = 1 << 20
# rows, and keys of the second factor, of a block of Strassen attention
_ROWS, _KEYS = 64, 512


@op("cpu")
def attend_windows(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    starts: tuple[Array, ...],
    stops: tuple[Array, ...],
    *,
    sizes: tuple[int, ...],
    scale: float,
) -> tuple[Array, Array]:
    """Softmax-weighted means of products of values over windows of keys.

    Row ``i`` sees keys ``starts[s][i] <= j < stops[s][i]`` of factor ``s``, at most
    ``sizes[s]``; the answers, ``(n, p)`` and ``(n,)``, are in the dtype of ``query``.
    """
    xp, n, d = array_namespace(query), query.shape[0], query.shape[1]
    before = 1
    for size in sizes[:-1]:
        before *= size
    rows = max(1, _NUMBERS // (before * max(sizes[-1], d)))
    parts = []
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        first, end = ([x[block] for x in side] for side in (starts, stops))
        joined, product, seen = expand(
            query[block, :], keys[:-1], values[:-1], first[:-1], end[:-1], sizes[:-1]
        )
        key, own = _window(keys[-1], first[-1], end[-1], sizes[-1])
        value, _ = _window(values[-1], first[-1], end[-1], sizes[-1])
        scaled = xp.astype(xp.astype(joined, xp.float64) * scale, query.dtype)
        logits = xp.matmul(scaled, xp.matrix_transpose(key))
        seen = xp.logical_and(seen[:, :, None], own[:, None, :])
        logits = xp.where(seen, logits, xp.full_like(logits, -xp.inf))
        parts.append(_softmax(logits, product, value))
    return xp.concat([out for out, _ in parts]), xp.concat([log for _, log in parts])


def expand(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    starts: Sequence[Array],
    stops: Sequence[Array],
    sizes: Sequence[int],
) -> tuple[Array, Array, Array]:
    """Multiply queries by the keys of all tuples of their windows of some factors.

    The answers are ``(b, t, d)``, the products of values, ``(b, t, p)`` or, without
    factors, ``(b, 1, 1)``, and whether a row sees the tuple, ``(b, t)``.
    """
    xp = array_namespace(query)
    joined = query[:, None, :]
    product = xp.ones_like(joined[:, :, :1])
    seen = xp.ones(joined.shape[:2], dtype=xp.bool, device=device_of(query))
    for s, size in enumerate(sizes):
        key, own = _window(keys[s], starts[s], stops[s], size)
        value, _ = _window(values[s], starts[s], stops[s], size)
        joined, product = _pairs(joined, key), _pairs(product, value)
        seen = _pairs(seen[:, :, None], own[:, :, None])[:, :, 0]
    return joined, product, seen


def _window(x: Array, start: Array, stop: Array, size: int) -> tuple[Array, Array]:
    """Rows from ``start`` on, ``(b, size, c)``, and whether each is before ``stop``."""
    xp = array_namespace(x)
    number = start[:, None] + xp.arange(size, device=device_of(x))[None, :]
    inside = number < stop[:, None]
    number = xp.where(inside, number, xp.zeros_like(number))
    taken = xp.take(x, xp.reshape(number, (-1,)), axis=0)
    return xp.reshape(taken, (*number.shape, x.shape[1])), inside


def _pairs(x: Array, y: Array) -> Array:
    """Products of all pairs: ``(b, s, c)`` and ``(b, t, c)`` to ``(b, s t, c)``."""
    xp = array_namespace(x)
    first, second = x[:, :, None, :], y[:, None, :, :]
    both = xp.logical_and(first, second) if x.dtype == xp.bool else first * second
    return xp.reshape(both, (x.shape[0], -1, both.shape[3]))


def _softmax(logits: Array, product: Array, value: Array) -> tuple[Array, Array]:
    """Means of ``product_s o value_t`` under the softmax of logits ``(b, s, t)``."""
    xp = array_namespace(logits)
    peak = xp.max(logits, axis=(1, 2), keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    weights = xp.exp(logits - peak)
    total = xp.sum(weights, axis=(1, 2), dtype=xp.float64)
    sums = xp.astype(xp.matmul(weights, value) * product, xp.float64)
    empty = total == 0
    safe = xp.where(empty, xp.ones_like(total), total)
    mean = xp.sum(sums, axis=1) / safe[:, None]
    logarithm = xp.log(safe) + xp.astype(peak[:, 0, 0], xp.float64)
    logarithm = xp.where(empty, xp.full_like(total, -xp.inf), logarithm)
    return xp.astype(mean, logits.dtype), xp.astype(logarithm, logits.dtype)


def attend_strassen(
    query: Array,
    key: Array,
    other: Array,
    value: Array,
    another: Array,
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Strassen attention by products of matrices, never n x m in memory.

    With ``X = exp(f g^T)``, ``Y = exp(g h^T)``, ``Z = exp(h f^T)``, each less its
    largest logit, the sums of weights are the diagonal of ``X Y Z``, and those of one
    column of values that of ``X diag(v) Y diag(v') Z``. Computed in the dtype of
    ``query``; the answers are ``(n, p)``, the log-sum-exps ``(n,)``, and the sums of
    weights relative to the largest that there could be, which tell underflow.
    """
    xp, n, p = array_namespace(query), query.shape[0], value.shape[1]
    ones = xp.ones_like(value[:, :1])
    # one more column of values: the sum of the weights
    left = xp.concat([value, ones], axis=1)
    right = xp.concat([another, xp.ones_like(another[:, :1])], axis=1)
    top = max(
        float(xp.max(scale * xp.matmul(key, xp.matrix_transpose(other[rows, :]))))
        for rows in _blocks(other.shape[0], _KEYS)
    )
    parts = []
    for rows in _blocks(n, _ROWS):
        first = scale * xp.matmul(query[rows, :], xp.matrix_transpose(key))
        last = scale * xp.matmul(query[rows, :], xp.matrix_transpose(other))
        peaks = xp.max(first, axis=1), xp.max(last, axis=1)
        # (b, p + 1, m): weights of the first keys times their values
        weighted = xp.exp(first - peaks[0][:, None])[:, None, :]
        weighted = weighted * xp.matrix_transpose(left)[None, :, :]
        weighted = xp.reshape(weighted, (-1, key.shape[0]))
        sums = xp.zeros(
            (first.shape[0], p + 1), dtype=query.dtype, device=device_of(query)
        )
        for keys in _blocks(other.shape[0], _KEYS):
            middle = scale * xp.matmul(key, xp.matrix_transpose(other[keys, :]))
            part = xp.matmul(weighted, xp.exp(middle - top))
            part = xp.reshape(part, (first.shape[0], p + 1, -1))
            end = xp.exp(last[:, keys] - peaks[1][:, None])[:, None, :]
            part = part * (end * xp.matrix_transpose(right[keys, :])[None, :, :])
            sums = sums + xp.sum(part, axis=2)
        parts.append((sums, peaks[0] + peaks[1] + top))
    sums = xp.concat([one for one, _ in parts])
    peak = xp.concat([one for _, one in parts])
    total = sums[:, -1]
    safe = xp.where(total > 0, total, xp.ones_like(total))
    return sums[:, :-1] / safe[:, None], xp.log(safe) + peak, total


def _blocks(count: int, size: int) -> list[slice]:
    """Cut a range into slices."""
    return [slice(s, min(s + size, count)) for s in range(0, count, size)]


def attend_path(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    *,
    scale: float,
) -> tuple[Array, Array]:
    """Softmax over tuples with scores ``f . g_j + g_j . h_k + ...``, pair by pair.

    The log-sum-exp of what follows a key is added to its logits, by one more
    coordinate. Computed in the dtype of ``query``; answers ``(n, p)`` and ``(n,)``.
    """
    xp = array_namespace(query)
    sides = (query, *keys)
    value = values[-1]
    bias: Any = xp.zeros_like(value[:, 0])
    for s in range(len(keys) - 1, -1, -1):
        scaled = xp.astype(xp.astype(sides[s], xp.float64) * scale, query.dtype)
        one = xp.ones_like(scaled[:, :1])
        mean, logarithm = attend(
            xp.concat([scaled, one], axis=1)[None, ...],
            xp.concat([keys[s], bias[:, None]], axis=1)[None, ...],
            value[None, ...],
            scale=1.0,
            prefix_lengths=None,
        )
        if s > 0:
            value, bias = values[s - 1] * mean[0, ...], logarithm[0, ...]
    return mean[0, ...], logarithm[0, ...]
