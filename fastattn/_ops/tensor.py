"""Exact tensor attention: softmax attention nested once for each further factor.

For order 3, ``<q, k1 o k2> = <q o k1, k2>``: every pair of a query and a first key is
a query to the second keys, whose outputs merge by their log-sum-exps. So all products
are the matrix products of :func:`attend`, which also has the fast kernels.
"""

from typing import Any

import numpy as np

from fastattn._ops.softmax import attend
from sketching._lib.arrays import Array, array_namespace, device_of

# pairs of a query and a key that are queries at one time
_ROWS = 1 << 14


# log-sum-exps that overflow leave NaN, which no certificate covers
@np.errstate(over="ignore", invalid="ignore")
def attend_tuples(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    *,
    scale: float,
    prefix_lengths: tuple[Array, ...] | None = None,
) -> tuple[Array, Array]:
    """Softmax-weighted means of products of values, and the log-sum-exps of logits.

    ``query`` is ``(n, d)``, each of ``keys`` ``(m, d)``, each of ``values`` ``(m, p)``.
    Row ``i`` sees the first ``prefix_lengths[s][i]`` keys of factor ``s``, all where
    ``prefix_lengths`` is None; a row that sees none gets zeros and minus infinity.
    Computed in the dtype of ``query``; the answers are ``(n, p)`` and ``(n,)``. Least
    work is done where the last factor is the longest.
    """
    if len(keys) == 1:
        out, normalizer = attend(
            query[None, ...],
            keys[0][None, ...],
            values[0][None, ...],
            scale=scale,
            prefix_lengths=None if prefix_lengths is None else prefix_lengths[0],
        )
        return out[0, ...], normalizer[0, ...]
    xp, n = array_namespace(query), query.shape[0]
    key = xp.astype(keys[0], query.dtype, copy=False)
    value = xp.astype(values[0], xp.float64)
    parts = []
    size = max(1, _ROWS // key.shape[0])
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        seen = (
            None if prefix_lengths is None else tuple(x[rows] for x in prefix_lengths)
        )
        # (b, m, d): one query for each pair
        joined = query[rows, None, :] * key[None, :, :]
        out, logarithm = attend_tuples(
            xp.reshape(joined, (-1, query.shape[1])),
            keys[1:],
            values[1:],
            scale=scale,
            prefix_lengths=None
            if seen is None
            else _repeated(xp, seen[1:], key.shape[0]),
        )
        shape = joined.shape[:2]
        logarithm = xp.reshape(logarithm, shape)
        if seen is not None:
            number = xp.arange(shape[1], device=device_of(query))
            hidden = number[None, :] >= seen[0][:, None]
            nothing = xp.full_like(logarithm, -xp.inf)
            logarithm = xp.where(hidden, nothing, logarithm)
        parts.append(_merge(xp.reshape(out, (*shape, -1)), value, logarithm))
    return xp.concat([out for out, _ in parts]), xp.concat([log for _, log in parts])


def _merge(out: Array, value: Array, logarithm: Array) -> tuple[Array, Array]:
    """Merge the answers of all keys of one factor: ``(b, m, p)`` to ``(b, p)``."""
    xp, dtype = array_namespace(out), out.dtype
    # in float64: as many terms as there are keys
    logarithm = xp.astype(logarithm, xp.float64)
    peak = xp.max(logarithm, axis=1, keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    weight = xp.exp(logarithm - peak)
    total = xp.sum(weight, axis=1, keepdims=True)
    empty = total == 0
    safe = xp.where(empty, xp.ones_like(total), total)
    weighted = xp.astype(out, xp.float64) * (weight / safe)[:, :, None]
    mean = xp.sum(weighted * value[None, :, :], axis=1)
    log_total = xp.log(safe) + peak
    log_total = xp.where(empty, xp.full_like(total, -xp.inf), log_total)[:, 0]
    return xp.astype(mean, dtype), xp.astype(log_total, dtype)


def _repeated(xp: Any, counts: tuple[Array, ...], times: int) -> tuple[Array, ...]:
    """Repeat every entry of each array."""
    return tuple(
        xp.reshape(xp.broadcast_to(x[:, None], (x.shape[0], times)), (-1,))
        for x in counts
    )
