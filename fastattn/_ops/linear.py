r"""Linear attention: feature maps of rows, and causal products by chunks.

With features of queries and keys, a causal row is :math:`\sum_{j \le i} (\phi_i \cdot
\psi_j) v_j`. Chunks of rows see earlier keys by one sum, :math:`\sum_j \psi_j
v_j^\top`, and only their own keys one by one (Katharopoulos et al., 2020).
"""

from typing import Any

import numpy as np

from sketching._lib.arrays import Array, array_namespace, device_of, mover
from sketching._lib.op import op

# rows that see each other's keys one by one: about the width of the values is fastest
CHUNK = 64


@op("cpu", "gpu")
def elu_plus_one(x: Array) -> Array:
    """``x + 1`` where ``x`` is positive, otherwise ``exp(x)``."""
    xp = array_namespace(x)
    return xp.where(x > 0, x + 1, xp.exp(xp.where(x > 0, xp.zeros_like(x), x)))


@op("cpu")
def positive(x: Array) -> Array:
    """The larger of ``x``, which has no NaN, and zero."""
    xp = array_namespace(x)
    return xp.maximum(x, xp.zeros((), dtype=x.dtype, device=device_of(x)))


@op("cpu")
def exponentials(x: Array) -> tuple[Array, Array]:
    """``exp(x - peak)`` with the largest entry of each row, ``(..., n, 1)``."""
    xp = array_namespace(x)
    peak = xp.max(x, axis=-1, keepdims=True)
    return xp.exp(x - peak), peak


@op("cpu")
def key_sums(right: Array, value: Array) -> Array:
    """Sum of ``right_j [value_j, 1]^T`` over all keys, ``(r, p + 1)``."""
    xp = array_namespace(right, value)
    extended = xp.concat([value, xp.ones_like(value[:, :1])], axis=1)
    return xp.matmul(xp.matrix_transpose(right), extended)


@op("cpu")
def row_means(
    left: Array, sums: Array, *, offset: float, normalize: bool, out: Any = None
) -> tuple[Array, Array]:
    """Rows ``[sum, total]`` of ``left @ sums`` as ``sum / (total + offset)`` and total.

    ``sums`` is ``(r, p + 1)``, for example of ``key_sums``. Without ``normalize``
    sums are not divided. ``out``, ``(n, p)``, is memory that the result may use.
    """
    xp = array_namespace(left, sums)
    found = xp.matmul(left, sums)
    value, total = found[:, :-1], found[:, -1] + offset
    if normalize:
        value, total = divided(found, offset=offset, out=out)
    return value, total


@op("cpu")
def divided(sums: Array, *, offset: float, out: Any = None) -> tuple[Array, Array]:  # noqa: ARG001
    """Rows ``[sum, total]`` as ``sum / (total + offset)`` and ``total + offset``.

    ``sums`` is ``(n, p + 1)``; a row whose total is zero gets zeros. ``out`` is memory
    that the result may use.
    """
    total = sums[..., -1:] + offset
    return sums[..., :-1] * reciprocal(total), total[..., 0]


def reciprocal(total: Array) -> Array:
    """One over each number, zero for zero."""
    xp = array_namespace(total)
    empty = total == 0
    found = 1 / xp.where(empty, xp.ones_like(total), total)
    return xp.where(empty, xp.zeros_like(total), found)


@op("cpu", "gpu")
def squares(x: Array) -> Array:
    """One, the entries of ``x``, their squares over ``sqrt(2)`` and their products.

    ``x`` is ``(..., d)``, the answer ``(..., 1 + d + d (d + 1) / 2)``: the product of
    two rows is ``1 + t + t^2 / 2`` of the product ``t`` of theirs.
    """
    xp = array_namespace(x)
    d = x.shape[-1]
    half = [x[..., a : a + 1] * x[..., a:] for a in range(d)]
    # the first of each run is a square, the others are pairs
    half = [xp.concat([y[..., :1] * 0.5**0.5, y[..., 1:]], axis=-1) for y in half]
    return xp.concat([xp.ones_like(x[..., :1]), x, *half], axis=-1)


@op("cpu", "gpu")
def prefix_products(
    left: Array,
    right: Array,
    value: Array,
    state: Array,
    *,
    prefix_lengths: Any,
    decay: float | None = None,
    row: Any = None,
    column: Any = None,
    origin: int = 0,
) -> tuple[Array, Array]:
    """``left_i @ state + sum_j (left_i . right_j) value_j`` over the keys of row i.

    ``left`` is ``(n, r)``, ``right`` ``(m, r)``, ``value`` ``(m, p)`` and ``state``,
    the sum of ``right_j value_j^T`` over earlier keys, ``(r, p)``. Row ``i`` sees the
    first ``prefix_lengths[i]`` keys, a number that does not fall. A key loses the
    factor ``decay`` for every position that the row is ahead of it: rows are at
    ``row``, which does not fall, keys at ``column``, and ``state`` refers to position
    ``origin``. These are NumPy integer arrays. Returns the sums, ``(n, p)``, and the
    state of the keys that the last row sees, at the position of that row.
    """
    xp = array_namespace(left, right, value, state)
    move = mover(left, left.dtype)
    fading = _Fading(1.0 if decay is None else decay, row, column)
    n, out, done, seen = left.shape[0], [], 0, origin
    for start in range(0, n, CHUNK):
        end = min(start + CHUNK, n)
        early, last = int(prefix_lengths[start]), int(prefix_lengths[end - 1])
        # a few keys that all rows of the chunk see are done with its own
        if early - done > CHUNK:
            keys = slice(done, early)
            state = state * float(fading.row(start, seen))
            state = state + _outer(right, value, keys, move(fading.keys(keys, start)))
            done, seen = early, fading.place(start)
        some, keys = left[start:end, :], slice(done, last)
        near = xp.matmul(some, xp.matrix_transpose(right[keys, :]))
        near = near * move(fading.weights(prefix_lengths, start, end, keys))
        far = (
            xp.matmul(some, state) * move(fading.row(slice(start, end), seen))[:, None]
        )
        out.append(far + xp.matmul(near, value[keys, :]))
        state = state * float(fading.row(end - 1, seen))
        state = state + _outer(right, value, keys, move(fading.keys(keys, end - 1)))
        done, seen = last, fading.place(end - 1)
    return xp.concat(out, axis=0), state


class _Fading:
    """Decay factors of keys, computed on the host."""

    def __init__(self, decay: float, row: Any, column: Any) -> None:
        self.decay, self.rows, self.columns = decay, row, column

    def place(self, number: int) -> int:
        """Position of a row; 0 where positions do not matter."""
        return 0 if self.rows is None else int(self.rows[number])

    def row(self, rows: Any, seen: int) -> Any:
        """Factors for rows of a state that refers to an earlier position."""
        if self.rows is None:
            return np.ones(rows.stop - rows.start if isinstance(rows, slice) else ())
        return self.decay ** (self.rows[rows] - seen)

    def keys(self, keys: slice, number: int) -> Any:
        """Factors of some keys for one row that sees them, ``(c, 1)``."""
        if self.rows is None:
            return np.ones((keys.stop - keys.start, 1))
        return self.decay ** (self.rows[number] - self.columns[keys, None])

    def weights(self, prefix_lengths: Any, start: int, end: int, keys: slice) -> Any:
        """Factors of some keys for each row, zero where it does not see them."""
        seen = np.arange(keys.start, keys.stop) < prefix_lengths[start:end, None]
        if self.rows is None:
            return seen
        gap = self.rows[start:end, None] - self.columns[keys]
        return seen * self.decay ** np.maximum(gap, 0)


def _outer(right: Array, value: Array, keys: slice, fade: Array) -> Array:
    xp = array_namespace(right, value)
    return xp.matmul(xp.matrix_transpose(right[keys, :]), value[keys, :] * fade)
