r"""Gradients of linear attention: one pass over queries and one over keys.

With the state :math:`S = \phi(K)^\top [V, 1]`, shape :math:`(r, p + 1)`, and :math:`Z =
\phi(Q) S`, whose last column is the sum of the weights, :math:`d\phi(Q) = dZ\,S^\top`
and :math:`d\phi(K) = [V, 1]\,dS^\top` with :math:`dS = \phi(Q)^\top dZ`.
"""

from typing import Any

import numpy as np

from fastattn._ops.linear import prefix_products, reciprocal
from fastattn.linear.heads import LinearHead, extend
from sketching._lib.arrays import Array, array_namespace, mover

Gradients = tuple[Array, Array, Array]


def vjp_of(part: LinearHead, grad: Array) -> Gradients:
    """Gradients of ``sum(grad * output)`` of one head: of query, key and value."""
    head, dtype = part.head, part.features.dtype
    if head.sizes[1] == 0:
        query, key, value = (
            head.xp.zeros_like(x, dtype=dtype)
            for x in (head.query, head.key, head.value)
        )
        return query, key, value
    if part.is_sequential:
        return _causal(part, grad)
    return _whole(part, grad)


def _whole(part: LinearHead, grad: Array) -> Gradients:
    """Gradients without a causal mask, block by block."""
    xp, size, state = part.head.xp, part.rows, part.state()
    (n, m, _, p), flip = part.head.sizes, xp.matrix_transpose
    query_parts, key_parts, value_parts, total = [], [], [], None
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        features, log = part.query(rows)
        mixed = xp.matmul(features, state.total)
        change = _change(part, rows, mixed, (log, state.log), grad[rows, :])
        own = xp.matmul(flip(features), change)
        total = own if total is None else total + own
        query_parts.append(_by_query(part, rows, xp.matmul(change, flip(state.total))))
    for start in range(0, m, size):
        keys = slice(start, min(start + size, m))
        features, log, value = part.key(keys)
        extended, _ = extend(value, log, state.log)
        value_parts.append(_by_value(xp.matmul(features, total), log, state.log, p))
        key_parts.append(_by_key(part, keys, xp.matmul(extended, flip(total))))
    return xp.concat(query_parts), xp.concat(key_parts), xp.concat(value_parts)


def _causal(part: LinearHead, grad: Array) -> Gradients:
    """Gradients with prefix lengths: three products by chunks.

    All features are stored, since the backward products run from the last row to the
    first.
    """
    xp, (n, m, _, p) = part.head.xp, part.head.sizes
    rows, keys = slice(0, n), slice(0, m)
    prefix_lengths, place = part.prefix_lengths, part.place
    left, row_log = part.query(rows)
    right, key_log, value = part.key(keys)
    extended, top = extend(value, key_log)
    forward = {"prefix_lengths": prefix_lengths, **part.fading(keys, rows, place)}
    mixed = _products(left, right, extended, forward)
    change = _change(part, rows, mixed, (row_log, top), grad)
    by_left = _products(change, extended, right, forward)
    # the first row that attends to key j; all later rows do so too
    first = np.searchsorted(prefix_lengths, np.arange(m), side="right")
    backward: dict[str, Any] = {"prefix_lengths": (n - first)[::-1]}
    if part.decay is not None:
        end = max(int(place[-1]), int(part.column[-1]))
        backward |= {
            "decay": part.decay,
            "row": end - part.column[::-1],
            "column": end - place[::-1],
        }
    flipped = [xp.flip(x, axis=0) for x in (left, change, right, extended)]
    left, change, right, extended = flipped
    by_right = xp.flip(_products(extended, change, left, backward), axis=0)
    by_value = xp.flip(_products(right, left, change, backward), axis=0)
    return (
        _by_query(part, rows, by_left),
        _by_key(part, keys, by_right),
        _by_value(by_value, key_log, top, p),
    )


def _products(
    left: Array, right: Array, value: Array, options: dict[str, Any]
) -> Array:
    """``prefix_products`` from an empty state."""
    empty = mover(left, left.dtype)(np.zeros((left.shape[1], value.shape[1])))
    found: Array = prefix_products(left, right, value, empty, **options)[0]
    return found


def _change(
    part: LinearHead,
    rows: slice,
    mixed: Array,
    logs: tuple[Array | None, Array | None],
    grad: Array,
) -> Array:
    """Gradient with respect to ``Z``: sums of values and, last, of weights."""
    xp, (row_log, key_log) = part.head.xp, logs
    value, total, log = part.finish(mixed, row_log, key_log)
    part.check_weights(total, rows)
    if not part.normalize:
        if row_log is not None:
            grad = grad * xp.exp(log)[:, None]
        return xp.concat([grad, xp.zeros_like(grad[:, :1])], axis=1)
    minus_delta = -xp.sum(grad * value, axis=1, keepdims=True)
    return xp.concat([grad, minus_delta], axis=1) * reciprocal(total)[:, None]


def _by_query(part: LinearHead, rows: slice, grad: Array) -> Array:
    """Gradient of queries from that of their features."""
    position = np.arange(rows.start, rows.stop)
    return part.features.query_vjp(part.head.query[rows, :], position, grad)


def _by_key(part: LinearHead, keys: slice, grad: Array) -> Array:
    """Gradient of keys from that of their features."""
    return part.features.key_vjp(part.head.key[keys, :], part.column[keys], grad)


def _by_value(grad: Array, log: Array | None, top: Array | None, p: int) -> Array:
    """Gradient of values from that of ``[value, 1]`` times the keys' factors."""
    grad = grad[:, :p]
    return grad if log is None else grad * array_namespace(grad).exp(log - top)
