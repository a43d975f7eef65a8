"""The derivative of exact softmax attention over blocks of rows."""

from collections.abc import Callable

from fastattn._ops.quantized import multiplies_quantized
from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op

# queries in a block of the reference
_BLOCK = 1024


@op("cpu")
def attend_vjp(
    query: Array,
    key: Array,
    value: Array,
    grad: Array,
    *,
    scale: float,
    prefix_lengths: Array | None,
    log_normalizer: Array | None = None,
    delta: Array | None = None,
    beside: Callable[[slice, Array, Array], tuple[Array, Array]] | None = None,
    low_precision: bool = False,  # noqa: ARG001
) -> tuple[Array, Array, Array]:
    r"""Derivatives of ``sum(grad * attention)`` by query, key and value of one head.

    With the weights :math:`P`, ``dV = P^T grad``, ``dP = grad V^T``, ``dS = P * (dP -
    delta)``, ``dQ = scale dS K``, ``dK = scale dS^T Q``; the delta of a row is ``sum(P
    * dP)`` (Dao, FlashAttention-2, arXiv 2307.08691). ``query`` is ``(n, d)``, ``key``
    ``(m, d)``, ``value`` ``(m, p)``, ``grad`` ``(n, p)``. Row ``i`` sees the first
    ``prefix_lengths[i]`` keys, all if None; a row that sees none adds nothing. If
    ``log_normalizer`` and ``delta``, ``(n,)``, are given they are those over all keys,
    of which ``key`` is a part, and ``P`` is ``exp(logits - log_normalizer)``. If they
    are not known yet, ``beside`` is a function that returns them: its arguments are a
    slice of rows, and their log-sum-exps and deltas over these keys. Computed in the
    dtype of ``query``; with ``low_precision`` a kernel may round the factors of
    products to bfloat16, if no normalizers are given.
    """
    xp = array_namespace(query, key, value, grad)
    dtype, n, m = query.dtype, query.shape[0], key.shape[0]
    key, value, grad = (xp.astype(x, dtype, copy=False) for x in (key, value, grad))
    number = xp.arange(m, device=device_of(query))
    query_parts, key_sum, value_sum = [], xp.zeros_like(key), xp.zeros_like(value)
    for start in range(0, n, _BLOCK):
        block = slice(start, min(start + _BLOCK, n))
        # in float64: a scale, and a query, of extreme size may only meet halfway
        scaled = xp.astype(xp.astype(query[block, :], xp.float64) * scale, dtype)
        logits, change = _products(scaled, key), _products(grad[block, :], value)
        if prefix_lengths is not None:
            hidden = number[None, :] >= prefix_lengths[block, None]
            logits = xp.where(hidden, xp.full_like(logits, -xp.inf), logits)
        if log_normalizer is None or delta is None:
            weights, known = softmax(logits)
            mean = xp.sum(weights * change, axis=1)
            if beside is not None:
                known, mean = beside(block, known, mean)
        else:
            known, mean = log_normalizer[block], delta[block]
        if log_normalizer is not None or beside is not None:
            # hidden keys have no weight, whatever is known
            less = xp.where(logits == -xp.inf, logits, logits - known[:, None])
            weights = xp.exp(xp.where(less < 0, less, xp.zeros_like(less)))
        change = weights * (change - mean[:, None])
        value_sum = value_sum + _products(weights.T, grad[block, :].T)
        key_sum = key_sum + _products(change.T, scaled.T)
        slope = xp.astype(xp.matmul(change, key), xp.float64) * scale
        query_parts.append(xp.astype(slope, dtype))
    return xp.concat(query_parts, axis=0), key_sum, value_sum


def multiplies_in_low_precision(
    query: Array, key: Array, value: Array, grad: Array
) -> bool:
    """Whether low precision is allowed and faster for arrays like these."""
    if not multiplies_quantized(query):
        return False
    # numba is imported no earlier than by the kernel
    from fastattn._ops.cpu.gradient_tiles import serves

    is_served: bool = serves(query, key, value, grad)  # type: ignore[no-untyped-call]
    return is_served


def softmax(logits: Array) -> tuple[Array, Array]:
    """Weights of each row, zeros where no logit is finite, and log-sum-exps."""
    xp = array_namespace(logits)
    if logits.shape[1] == 0:
        return logits, xp.sum(logits, axis=1) - xp.inf
    peak = xp.max(logits, axis=1, keepdims=True)
    weights = xp.exp(logits - xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak)))
    total = xp.sum(weights, axis=1, keepdims=True)
    safe = xp.where(total == 0, xp.ones_like(total), total)
    return weights / safe, (peak + xp.log(safe))[:, 0]


def _products(x: Array, y: Array) -> Array:
    """Inner products of the rows of two matrices."""
    xp = array_namespace(x, y)
    return xp.matmul(x, xp.matrix_transpose(y))
