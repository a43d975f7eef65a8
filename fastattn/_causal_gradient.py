"""The derivative of a causal low rank: sums over what comes before, and behind.

A row is differentiated over the chunks of keys before its own by the sums over those
keys, and exactly within its own chunk. What a key gets comes from its own chunk too,
and from the sums over all rows of the chunks behind.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from fastattn._backward import Backward, Slopes, spread, take
from fastattn._causal_prefixes import LowRankPrefix, lowrank_prefixes
from fastattn._lowrank import LowRank
from fastattn._lowrank_passes import key_slopes, query_slopes
from fastattn._probes import join
from fastattn._problem import Head
from fastattn.causal import chunks_of, each, part_of
from sketching._lib.arrays import Array, device_of, to_host


def causal_slopes(
    head: Head, grad: Array, empty: LowRank, hard: Array
) -> tuple[Slopes, Backward]:
    """Differentiate a causal head, whose last row sees all keys, over a basis.

    Rows that are ``hard``, boolean ``(n,)``, and rows out of reach add nothing, and
    have infinite normalizers in the second answer.
    """
    chunks = chunks_of(to_host(head.visible))
    counts = [keys.start for _, keys in chunks[1:]]
    prefixes = [x for some in lowrank_prefixes(head, empty, counts) for x in some]
    causal = _Causal(head, grad, hard, chunks, prefixes, _far_keys(prefixes))
    found = causal.by_rows()
    xp, (query, key, value, normalizer, drift, sums) = head.xp, zip(*found, strict=True)
    state = Backward(head, grad, xp.concat(list(normalizer)), xp.concat(list(drift)))
    # no row is behind the keys of the last chunk, which are none
    behind = list(accumulate(sums[:0:-1]))[::-1]
    more = causal.by_keys(behind)
    slopes = (
        xp.concat(list(query)),
        xp.concat(list(key)) + xp.concat([x for x, _ in more]),
        xp.concat(list(value)) + xp.concat([x for _, x in more]),
    )
    return causal.with_far_keys(slopes, state), state


def _far_keys(prefixes: list[LowRankPrefix]) -> Array:
    return np.flatnonzero(np.concatenate([to_host(x.far) for x in prefixes]))


@dataclass(frozen=True, slots=True, eq=False)
class _Causal:
    """A causal head in chunks, with a structure over the keys before each.

    Parameters
    ----------
    head, grad, hard : Head, array, boolean array
        As in ``causal_slopes``.
    chunks : list of pairs of slices
        Rows and keys.
    prefixes : list of LowRankPrefix
        For every chunk but the first.
    far : integer array
        Numbers of the far keys.
    """

    head: Head
    grad: Array
    hard: Array
    chunks: list[tuple[slice, slice]]
    prefixes: list[LowRankPrefix]
    far: Array

    def by_rows(self) -> list[tuple[Array, ...]]:
        """Differentiate every chunk; also say what is known of rows, and their sums."""
        return each(self.head, self._rows, range(len(self.chunks)))

    def by_keys(self, behind: list[Array]) -> list[tuple[Array, Array]]:
        """What keys and values of every chunk get from the sums of those behind."""

        def work(k: int) -> tuple[Array, Array]:
            keys, prefix = self.chunks[k][1], self.prefixes[k]
            key, value = self.head.key[keys, :], self.head.value[keys, :]
            return key_slopes(key, value, prefix.far, prefix.structure, behind[k])

        return each(self.head, work, range(len(behind)))

    def with_far_keys(self, slopes: Slopes, state: Backward) -> Slopes:
        """Add what rows make of the far keys of the chunks before their own."""
        if not len(self.far):
            return slopes
        seen = [np.full(x.stop - x.start, keys.start) for x, keys in self.chunks]
        visible = self.head.xp.asarray(
            np.concatenate(seen), device=device_of(self.head.query)
        )
        state = replace(state, head=replace(self.head, visible=visible))
        more, m = state.exact(None, self.far), self.head.sizes[1]
        return (
            slopes[0] + more[0],
            slopes[1] + spread(more[1], self.far, m),
            slopes[2] + spread(more[2], self.far, m),
        )

    def _rows(self, k: int) -> tuple[Array, ...]:
        xp, (rows, keys) = self.head.xp, self.chunks[k]
        part, grad = part_of(self.head, rows, keys), self.grad[rows, :]
        sums = np.zeros((len(self.prefixes[0].structure.sums), grad.shape[1] + 1))
        if rows.start == rows.stop:
            slopes = (
                xp.zeros_like(x, dtype=grad.dtype)
                for x in (part.query, part.key, part.value)
            )
            return *slopes, grad[:, 0], grad[:, 0], sums
        answer, normalizer = self._beside(part, keys.start)
        normalizer = xp.where(self.hard[rows], xp.inf, normalizer)
        drift, slope = xp.sum(grad * answer, axis=1), None
        if k:
            prefix = self.prefixes[k - 1]
            slope, sums, normalizer, drift = query_slopes(
                part, grad, prefix.structure, normalizer, drift, prefix.near_mean
            )
        query, *rest = Backward(part, grad, normalizer, drift).exact(None, None)
        query = query if slope is None else query + slope
        return query, *rest, normalizer, drift, sums

    def _beside(self, part: Head, start: int) -> tuple[Array, Array]:
        """Answer rows over what is exact: their chunk, and far keys before it."""
        own, far = part.attend(), self.far[: np.searchsorted(self.far, start)]
        if not len(far):
            return own
        key, value = (take(x, far) for x in (self.head.key, self.head.value))
        return join(own, replace(part, key=key, value=value, visible=None).attend())
