"""Causal attention in chunks of keys, by methods without a mask.

Row ``i`` attends to the first ``prefix_lengths[i]`` keys. The keys are cut into chunks.
A row uses an approximation over all chunks before its own and exact attention within
its own chunk; the two outputs are merged by their log-sum-exps, as in FlashAttention.
(The alternative, halving the keys recursively, is ``multipole.causal_halving``.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np

from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import merge_partials
from sketching._lib.arrays import Array, array_namespace, to_host
from sketching._lib.threads import parallel_map

# most bytes of chunk states that exist at once
_LARGEST_PANEL = 1 << 25

# outputs, log-sum-exps, and whether each row is reliable
Answer: TypeAlias = tuple[Array, Array, Array]

# keys in a chunk; the first chunk has a share of all keys, up to a maximum
_CHUNK = 768
_FIRST, _MOST_FIRST = 1 / 8, 4096


class Prefix(Protocol):
    """A structure over the first keys of a head."""

    def query(self, query: Array) -> Answer:
        """Compute the output of rows that attend to all of these keys."""
        ...


def cuts_of(seen: int, first: int | None = None) -> list[int]:
    """Return the chunk boundaries of ``seen`` keys, from 0 to ``seen``.

    The first chunk is longer: where values average out, the outputs of rows with short
    prefixes have the largest norms, so that their errors weigh most.
    """
    if first is None:
        first = int(min(max(_FIRST * seen, _CHUNK), _MOST_FIRST, seen))
    return [0, *range(first, seen, _CHUNK), seen]


def chunks_of(
    prefix_lengths: Array, first: int | None = None
) -> list[tuple[slice, slice]]:
    """Cut rows and keys into chunks.

    The rows of a chunk attend to all keys of earlier chunks and to no key of later
    ones. The last chunk has no keys: its rows attend to all of them.
    """
    cuts = cuts_of(int(prefix_lengths[-1]), first)
    # chunk k has the rows with cuts[k] <= prefix length < cuts[k + 1]
    rows = [
        *(int(i) for i in np.searchsorted(prefix_lengths, cuts)),
        len(prefix_lengths),
    ]
    return [
        (slice(*some), slice(*keys))
        for some, keys in zip(pairwise(rows), pairwise([*cuts, cuts[-1]]), strict=True)
    ]


def largest_chunk(seen: int) -> int:
    """Largest number of keys in a chunk, over which attention is exact."""
    return max(high - low for low, high in pairwise(cuts_of(seen)))


def by_prefixes(
    head: Head, prefixes: Callable[[list[int]], Iterable[Sequence[Prefix]]]
) -> Answer:
    """Compute a causal head with approximations over prefixes of its keys.

    Parameters
    ----------
    head : Head
        A head whose ``prefix_lengths`` does not decrease.
    prefixes : callable
        Maps increasing numbers of keys to structures over the first so many keys,
        yielded a few at a time.

    Returns
    -------
    value, log_normalizer, reliable : array, shapes (n, p), (n,) and (n,)
        Outputs, log-sum-exps, and whether each row is reliable.
    """
    chunks = chunks_of(to_host(head.prefix_lengths))
    parts = [within(head, *chunks[0])]
    for structures in prefixes([keys.start for _, keys in chunks[1:]]):
        tasks = [
            (*chunks[k], structure)
            for k, structure in enumerate(structures, len(parts))
        ]
        parts += parallel_map(lambda task: _beyond(head, *task), tasks, head.query)
    return concat_rows(head, parts)


def concat_rows(head: Head, parts: list[Answer | None]) -> Answer:
    """Concatenate the outputs of consecutive rows."""
    columns = zip(*(part for part in parts if part is not None), strict=True)
    value, logarithm, reliable = (head.xp.concat(list(column)) for column in columns)
    return value, logarithm, reliable


def merge_chunk_partials(one: Answer, other: Answer) -> Answer:
    """Merge outputs of the same rows over disjoint sets of keys."""
    xp = array_namespace(one[0])
    value, logarithm = merge_partials(one[:2], other[:2])
    return value, logarithm, xp.logical_and(one[2], other[2])


def within(head: Head, rows: slice, keys: slice) -> Answer | None:
    """Compute exact attention of some rows over some keys, up to their prefixes."""
    if rows.start == rows.stop:
        return None
    value, logarithm = part_of(head, rows, keys).attend()
    return value, logarithm, head.xp.ones_like(logarithm, dtype=head.xp.bool)


def part_of(head: Head, rows: slice, keys: slice) -> Head:
    """Return the head of some rows and some keys, with prefix lengths within these."""
    prefix_lengths = head.prefix_lengths
    return replace(
        head,
        query=head.query[rows, :],
        key=head.key[keys, :],
        value=head.value[keys, :],
        prefix_lengths=None
        if prefix_lengths is None
        else prefix_lengths[rows] - keys.start,
    )


def causal_error_profile(head: Head) -> Array:
    """Error profile of a causal head: squared errors fall as 1 / prefix length."""
    if head.prefix_lengths is None:
        return np.ones(head.sizes[0])
    prefix_lengths = to_host(head.prefix_lengths)
    # the first chunk is exact; beyond it, errors average out with the keys
    first = cuts_of(int(prefix_lengths[-1]))[1]
    return np.where(prefix_lengths < first, 0.0, 1 / np.maximum(prefix_lengths, 1))


def panels(counts: list[int], nbytes: int) -> Iterator[list[slice]]:
    """Yield the keys between the counts, a few chunks at a time."""
    size = max(1, _LARGEST_PANEL // max(nbytes, 1))
    chunks = [slice(*pair) for pair in pairwise([0, *counts])]
    for start in range(0, len(chunks), size):
        yield chunks[start : start + size]


def _beyond(head: Head, rows: slice, keys: slice, before: Prefix) -> Answer | None:
    """Merge the approximation over earlier keys with exact attention over own ones."""
    own = within(head, rows, keys)
    if own is None:
        return None
    value, logarithm, reliable = before.query(head.query[rows, :])
    dtype = own[0].dtype
    xp = head.xp
    value = xp.astype(value, dtype, copy=False)
    logarithm = xp.astype(logarithm, dtype, copy=False)
    return merge_chunk_partials((value, logarithm, reliable), own)
