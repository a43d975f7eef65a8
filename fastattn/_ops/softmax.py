"""Exact softmax attention over blocks of rows."""

from fastattn._ops.extreme import attend_scaled, may_overflow
from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op

# queries in a block of the reference
_BLOCK = 1024


@op("cpu", "gpu")
def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    prefix_lengths: Array | None,
    rows: int | None = None,
) -> tuple[Array, Array]:
    """Softmax-weighted means of ``value`` and the log-sum-exp of the logits.

    ``query`` is ``(h, n, d)``, ``key`` ``(h, m, d)``, ``value`` ``(h, m, p)``. Row
    ``i`` sees the first ``prefix_lengths[i]`` keys, all where it is None; a row that
    sees none gets zeros and minus infinity. ``rows`` queries make a block. Computed in
    the dtype of ``query``, or in float64 where logits might overflow in it; the answers
    are ``(h, n, p)`` and ``(h, n)``.
    """
    xp = array_namespace(query, key, value)
    dtype, n, m = query.dtype, query.shape[1], key.shape[1]
    key = xp.matrix_transpose(xp.astype(key, dtype, copy=False))
    value = xp.astype(value, dtype, copy=False)
    number = xp.arange(m, device=device_of(query))
    largest, most = float(xp.max(xp.abs(key))), float(xp.finfo(dtype).max)
    values, normalizers = [], []
    size = _BLOCK if rows is None else rows
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        # in float64: a scale, and a query, of extreme size may only meet halfway
        scaled = xp.astype(query[:, block, :], xp.float64) * scale
        if may_overflow(float(xp.max(xp.abs(scaled))), largest, query.shape[2], most):
            seen = None if prefix_lengths is None else prefix_lengths[block]
            rows_of = query[:, block, :]
            found = attend_scaled(rows_of, xp.matrix_transpose(key), value, scale, seen)
            values.append(found[0])
            normalizers.append(found[1])
            continue
        logits = xp.matmul(xp.astype(scaled, dtype), key)
        if prefix_lengths is not None:
            hidden = number[None, :] >= prefix_lengths[block, None]
            nothing = xp.full_like(logits, -xp.inf)
            logits = xp.where(hidden[None, :, :], nothing, logits)
        peak = xp.max(logits, axis=2, keepdims=True)
        peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
        weights = xp.exp(logits - peak)
        total = xp.sum(weights, axis=2, keepdims=True)
        sums = xp.matmul(weights, value)
        empty = total == 0
        values.append(sums / xp.where(empty, xp.ones_like(total), total))
        log_total = xp.log(xp.where(empty, xp.ones_like(total), total)) + peak
        normalizers.append(
            xp.where(empty, xp.full_like(total, -xp.inf), log_total)[:, :, 0]
        )
    return xp.concat(values, axis=1), xp.concat(normalizers, axis=1)
