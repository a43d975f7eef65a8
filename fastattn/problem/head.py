"""One head of attention."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._ops.softmax import attend
from fastattn.problem.row_lengths import row_lengths
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    device_of,
    place_of,
    to_host,
)
from sketching._lib.lazy import lazy


class AttentionHead:
    """What the inputs of one head are to a certificate, whatever a row attends to."""

    query: Array

    @lazy
    def xp(self) -> Any:
        """The namespace of the arrays."""
        return array_namespace(self.query)

    @lazy
    def dtype(self) -> Any:
        """The dtype of computation."""
        return compute_dtype(self.xp, self.query.dtype)

    @lazy
    def sizes(self) -> tuple[int, int, int, int]:
        """n, number of keys or tuples of keys, d and p."""
        raise NotImplementedError

    @lazy
    def largest_value(self) -> float:
        """Bound on the largest absolute value, or product of values."""
        raise NotImplementedError

    @property
    def has_fast_kernel(self) -> bool:
        """Whether a kernel in ``_ops/cpu`` or ``_ops/gpu`` runs for this head."""
        return place_of(self.query) is not None

    def with_rows(self, rows: Array) -> "AttentionHead":
        """Return the same head for the queries with indices ``rows`` only."""
        raise NotImplementedError

    def attend(self, dtype: Any = None) -> tuple[Array, Array]:
        """Exact outputs and log-sum-exps, in ``dtype`` (default: the head's own)."""
        raise NotImplementedError

    def finish(self, value: Array, log_normalizer: Array) -> tuple[Array, Array]:
        """Round an output to the dtype of the query, log-sum-exps to the head's."""
        return rounded_answer(value, log_normalizer, self.query.dtype, self.dtype)


@dataclass(frozen=True, eq=False)
class Head(AttentionHead):
    """The inputs of one head.

    Parameters
    ----------
    query, key, value : array, shapes (n, d), (m, d), (m, p)
        Arrays of one library.
    scale : float
        The factor of the logits.
    prefix_lengths : integer array, shape (n,), or None
        Row ``i`` attends to the first ``prefix_lengths[i]`` keys; None means all.
    """

    query: Array
    key: Array
    value: Array
    scale: float
    prefix_lengths: Array | None = None

    @lazy
    def sizes(self) -> tuple[int, int, int, int]:
        """n, m, d and p."""
        n, d = self.query.shape
        m, p = self.value.shape
        return n, m, d, p

    @lazy
    def logits(self) -> int:
        """Number of logits: pairs of a query and a key that it attends to."""
        n, m, _, _ = self.sizes
        return (
            n * m
            if self.prefix_lengths is None
            else int(self.xp.sum(self.prefix_lengths))
        )

    @lazy
    def largest_value(self) -> float:
        """The largest absolute value."""
        xp = self.xp
        low, high = (float(f(self.value)) for f in (xp.min, xp.max))
        return max(-low, high)

    @lazy
    def query_squares(self) -> Array:
        """Squared norms of the queries, in the dtype of computation, on the host."""
        return row_lengths(self.query)

    @lazy
    def key_squares(self) -> Array:
        """Squared norms of the keys, in the dtype of computation, on the host."""
        return row_lengths(self.key)

    def trimmed(self) -> "Head":
        """Return the same head without the last keys that no row attends to."""
        if self.prefix_lengths is None:
            return self
        seen = int(self.xp.max(self.prefix_lengths))
        return replace(self, key=self.key[:seen, :], value=self.value[:seen, :])

    def unmasked(self) -> "Head":
        """Return the head without a causal mask."""
        return replace(self, prefix_lengths=None)

    def slice(self, rows: slice) -> "Head":
        """Return the same head for a range of its queries only."""
        prefix_lengths = self.prefix_lengths
        return replace(
            self,
            query=self.query[rows, :],
            prefix_lengths=None if prefix_lengths is None else prefix_lengths[rows],
        )

    def with_rows(self, rows: Array) -> "Head":
        """Return the same head for the queries with indices ``rows`` only."""
        prefix_lengths = self.prefix_lengths
        return replace(
            self,
            query=gather_rows(self.query, rows),
            prefix_lengths=None
            if prefix_lengths is None
            else gather_rows(prefix_lengths, rows),
        )

    def attend(self, dtype: Any = None, rows: int | None = None) -> tuple[Array, Array]:
        """Compute the head exactly, in ``dtype`` (default: the head's own)."""
        xp = self.xp
        dtype = self.dtype if dtype is None else dtype
        n, m, _, p = self.sizes
        if m == 0:
            device = device_of(self.query)
            return (
                xp.zeros((n, p), dtype=dtype, device=device),
                xp.full((n,), -xp.inf, dtype=dtype, device=device),
            )
        out, normalizer = attend(
            xp.astype(self.query, dtype, copy=False)[None, ...],
            self.key[None, ...],
            self.value[None, ...],
            scale=self.scale,
            prefix_lengths=self.prefix_lengths,
            rows=rows,
        )
        return out[0, ...], normalizer[0, ...]


def rounded_answer(
    value: Array, log_normalizer: Array, dtype: Any, log_dtype: Any
) -> tuple[Array, Array]:
    """Round outputs and log-sum-exps to the dtypes in which they are returned.

    Only rows that attend to no key get the log-sum-exp minus infinity.
    """
    xp = array_namespace(value)
    # outputs that overflow become infinite: no certificate covers those
    with np.errstate(over="ignore"):
        value = xp.astype(value, dtype, copy=False)
        if log_normalizer.dtype == log_dtype:
            return value, log_normalizer
        rounded = xp.astype(log_normalizer, log_dtype)
    least = xp.full_like(rounded, float(xp.finfo(log_dtype).min))
    lost = xp.logical_and(rounded == -xp.inf, xp.isfinite(log_normalizer))
    return value, xp.where(lost, least, rounded)


def gather_rows(x: Array, rows: Array | None) -> Array:
    """Rows of an array; None means all."""
    if rows is None:
        return x
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(rows, device=device_of(x)), axis=0)


def host_rows(x: Array, rows: Array) -> Array:
    """Copy the given rows to the host, in float32 or float64."""
    xp = array_namespace(x)
    dtype = compute_dtype(xp, x.dtype)
    return to_host(xp.astype(gather_rows(x, rows), dtype, copy=False))
