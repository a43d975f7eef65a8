"""The gradients of causal low-rank attention: key-value states of chunks, both ways.

Rows and keys are cut into chunks. The gradient of a query is exact over the keys of its
own chunk, and low-rank over the keys of all earlier chunks, from the key-value state of
those keys. The gradients of a key and its value are exact over the rows of its own
chunk, and low-rank over the rows of all later chunks, from sums over those rows.
"""

from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

import numpy as np

from fastattn._ops.gradient import attend_vjp
from fastattn.gradients.backward import Backward
from fastattn.gradients.lowrank_passes import key_pass, query_pass
from fastattn.methods.lowrank.prefixes import LowRankPrefix, lowrank_prefixes
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.causal_chunks import chunks_of, part_of
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head, gather_rows
from fastattn.problem.partial_softmax import merge_partials
from fastattn.problem.rows import scatter_rows
from sketching._lib.arrays import Array, device_of, to_host
from sketching._lib.threads import parallel_map


def causal_vjp(
    head: Head,
    grad: Array,
    empty: LowRank,
    outlier_mask: Array,
    first: int | None = None,
) -> tuple[Gradients, Backward, Gradients]:
    """Low-rank gradients of a causal head whose last row attends to all keys.

    Parameters
    ----------
    head : Head
        With ``prefix_lengths``, of which the last is the number of keys.
    grad : array, shape (n, p)
        Gradient of the loss with respect to the output.
    empty : LowRank
        The basis, without keys.
    outlier_mask : boolean array, shape (n,)
        Rows that are to be computed exactly by the caller.
    first : int or None
        Number of keys of the first chunk, which is exact; None for the default.

    Returns
    -------
    gradients : tuple of array
        With respect to query, key and value.
    state : Backward
        Log-sum-exps and deltas. Outlier rows, and rows whose softmax denominator is
        too small for the low rank, contribute zero, and have infinite log-sum-exps.
    far : tuple of array
        The low-rank part of the gradients; the rest is exact.
    """
    chunks = chunks_of(to_host(head.prefix_lengths), first)
    counts = [keys.start for _, keys in chunks[1:]]
    prefixes = [x for some in lowrank_prefixes(head, empty, counts) for x in some]
    causal = _Causal(head, grad, outlier_mask, chunks, prefixes, _far_keys(prefixes))
    found = causal.by_rows()
    xp, columns = head.xp, zip(*found, strict=True)
    query, key, value, far_query, normalizer, delta, sums = columns
    state = Backward(head, grad, xp.concat(list(normalizer)), xp.concat(list(delta)))
    # no rows come after the last chunk
    behind = list(accumulate(sums[:0:-1]))[::-1]
    more = causal.by_keys(behind)
    far: Gradients = (
        xp.concat(list(far_query)),
        xp.concat([x for x, _ in more]),
        xp.concat([x for _, x in more]),
    )
    gradients = (
        xp.concat(list(query)) + far[0],
        xp.concat(list(key)) + far[1],
        xp.concat(list(value)) + far[2],
    )
    return causal.with_far_keys(gradients, state), state, far


def _far_keys(prefixes: list[LowRankPrefix]) -> Array:
    return np.flatnonzero(np.concatenate([to_host(x.far) for x in prefixes]))


@dataclass(frozen=True, slots=True, eq=False)
class _Causal:
    """A causal head in chunks, with a structure over the keys before each.

    Parameters
    ----------
    head, grad, outlier_mask : Head, array, boolean array
        As in ``causal_vjp``.
    chunks : list of pairs of slices
        Rows and keys.
    prefixes : list of LowRankPrefix
        For every chunk but the first.
    far : integer array
        Numbers of the far keys.
    """

    head: Head
    grad: Array
    outlier_mask: Array
    chunks: list[tuple[slice, slice]]
    prefixes: list[LowRankPrefix]
    far: Array

    def by_rows(self) -> list[tuple[Array, ...]]:
        """Gradients, log-sum-exps, deltas and sums over the rows of each chunk."""
        return parallel_map(self._rows, range(len(self.chunks)), self.head.query)

    def by_keys(self, behind: list[Array]) -> list[tuple[Array, Array]]:
        """Gradients of keys and values of each chunk from the rows of later chunks."""

        def work(k: int) -> tuple[Array, Array]:
            keys, prefix = self.chunks[k][1], self.prefixes[k]
            key, value = self.head.key[keys, :], self.head.value[keys, :]
            return key_pass(key, value, prefix.far, prefix.structure, behind[k])

        return parallel_map(work, range(len(behind)), self.head.query)

    def with_far_keys(self, gradients: Gradients, state: Backward) -> Gradients:
        """Add the exact gradients over far keys of earlier chunks."""
        if not len(self.far):
            return gradients
        seen = [np.full(x.stop - x.start, keys.start) for x, keys in self.chunks]
        prefix_lengths = self.head.xp.asarray(
            np.concatenate(seen), device=device_of(self.head.query)
        )
        state = replace(state, head=replace(self.head, prefix_lengths=prefix_lengths))
        more, m = state.exact(None, self.far), self.head.sizes[1]
        return (
            gradients[0] + more[0],
            gradients[1] + scatter_rows(more[1], self.far, m),
            gradients[2] + scatter_rows(more[2], self.far, m),
        )

    def _rows(self, k: int) -> tuple[Array, ...]:
        xp, (rows, keys) = self.head.xp, self.chunks[k]
        part, grad = part_of(self.head, rows, keys), self.grad[rows, :]
        if rows.start == rows.stop:
            sums = np.zeros((len(self.prefixes[0].structure.sums), grad.shape[1] + 1))
            gradients = (
                xp.zeros_like(x, dtype=grad.dtype)
                for x in (part.query, part.key, part.value, part.query)
            )
            return *gradients, grad[:, 0], grad[:, 0], sums
        found = {}

        def beside(some: slice, normalizer: Array, delta: Array) -> tuple[Array, Array]:
            some = slice(rows.start + some.start, rows.start + some.stop)
            found[some.start] = self._before(k, some, normalizer, delta)
            return found[some.start][:2]

        query, key, value = attend_vjp(
            xp.astype(part.query, grad.dtype, copy=False),
            part.key,
            part.value,
            grad,
            scale=part.scale,
            prefix_lengths=part.prefix_lengths,
            beside=beside,
            low_precision=self.prefixes[0].structure.low_precision,
        )
        normalizer, delta, gradient, more = zip(
            *(found[start] for start in sorted(found)), strict=True
        )
        known = (xp.concat(list(x)) for x in (gradient, normalizer, delta))
        return query, key, value, *known, reduce(add, more)

    def _before(
        self, k: int, rows: slice, normalizer: Array, delta: Array
    ) -> tuple[Any, ...]:
        """Add the keys of earlier chunks to some rows of chunk ``k``.

        Parameters
        ----------
        k : int
            The chunk.
        rows : slice
            Some of its rows.
        normalizer, delta : array, shape (b,)
            Log-sum-exps and deltas of the rows over the keys of their own chunk.

        Returns
        -------
        normalizer, delta : array, shape (b,)
            The same over all keys.
        gradient : array, shape (b, d)
            With respect to the queries, over earlier keys that are not far.
        sums : array
            Sums over the rows, for the gradients of earlier keys.
        """
        head, grad, start = self.head, self.grad[rows, :], self.chunks[k][1].start
        xp, few = head.xp, replace(head, query=head.query[rows, :], prefix_lengths=None)
        far = self.far[: np.searchsorted(self.far, start)]
        if len(far):
            key, value = (gather_rows(x, far) for x in (head.key, head.value))
            answer, more = replace(few, key=key, value=value).attend()
            moved = xp.sum(grad * answer, axis=1)
            both, normalizer = merge_partials(
                (delta[:, None], normalizer), (moved[:, None], more)
            )
            delta = both[:, 0]
        normalizer = xp.where(self.outlier_mask[rows], xp.inf, normalizer)
        if k == 0:
            return normalizer, delta, xp.zeros_like(few.query, dtype=grad.dtype), 0.0
        prefix = self.prefixes[k - 1]
        gradient, sums, normalizer, delta = query_pass(
            few, grad, prefix.structure, normalizer, delta, prefix.near_mean
        )
        return normalizer, delta, gradient, sums
