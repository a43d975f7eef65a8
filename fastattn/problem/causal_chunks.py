"""Causal attention by parts, each answered by a method that knows no mask.

Row ``i`` sees the first ``prefix_lengths[i]`` keys. In prefix form the keys are cut
into chunks: a row is answered by a structure over the chunks before its own, exactly
within its own, and the two answers are merged by their log-sum-exps. By halving, the
rows that see all of the first half of the keys meet it in a rectangle without a mask,
and both halves are cut again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import merge_partials
from sketching._lib.arrays import Array, array_namespace, place_of, to_host
from sketching._lib.threads import run_blocks

# sums over chunks that exist at once stay below this many bytes
_LARGEST_PANEL = 1 << 25

# values, log-sum-exps, and whether each row can be trusted
Answer: TypeAlias = tuple[Array, Array, Array]
_T = TypeVar("_T")
_S = TypeVar("_S")

# keys of a chunk; and of the first, a share of all keys up to a most
_CHUNK = 768
_FIRST, _MOST_FIRST = 1 / 8, 4096


class Prefix(Protocol):
    """A structure over the first keys of a head."""

    def query(self, query: Array) -> Answer:
        """Answer rows that see all of these keys."""
        ...


def cuts_of(seen: int, first: int | None = None) -> list[int]:
    """Cut ``seen`` keys into chunks, from 0 to ``seen``.

    The first is longer: where values average out, its rows are by far the largest, and
    an error there would count most.
    """
    if first is None:
        first = int(min(max(_FIRST * seen, _CHUNK), _MOST_FIRST, seen))
    return [0, *range(first, seen, _CHUNK), seen]


def chunks_of(
    prefix_lengths: Array, first: int | None = None
) -> list[tuple[slice, slice]]:
    """Cut rows and keys alike: rows see all keys before theirs, but none behind them.

    The keys of the last chunk are none.
    """
    cuts = cuts_of(int(prefix_lengths[-1]), first)
    # chunk k serves the rows that see cuts[k] keys, but not yet cuts[k + 1]
    rows = [
        *(int(i) for i in np.searchsorted(prefix_lengths, cuts)),
        len(prefix_lengths),
    ]
    return [
        (slice(*some), slice(*keys))
        for some, keys in zip(pairwise(rows), pairwise([*cuts, cuts[-1]]), strict=True)
    ]


def largest_chunk(seen: int) -> int:
    """Largest number of keys within which a row is answered exactly."""
    return max(high - low for low, high in pairwise(cuts_of(seen)))


def by_prefixes(
    head: Head, prefixes: Callable[[list[int]], Iterable[Sequence[Prefix]]]
) -> Answer:
    """Answer a head by structures over prefixes of its keys.

    Parameters
    ----------
    head : Head
        A head whose ``prefix_lengths`` does not decrease.
    prefixes : callable
        From numbers of keys, which increase, to structures over so many first keys, a
        few at a time.

    Returns
    -------
    value, log_normalizer, reliable : array, shapes (n, p), (n,) and (n,)
    """
    chunks = chunks_of(to_host(head.prefix_lengths))
    parts = [within(head, *chunks[0])]
    for structures in prefixes([keys.start for _, keys in chunks[1:]]):
        tasks = [
            (*chunks[k], structure)
            for k, structure in enumerate(structures, len(parts))
        ]
        parts += parallel_map(head, lambda task: _beyond(head, *task), tasks)
    return concat_rows(head, parts)


def parallel_map(head: Head, work: Callable[[_T], _S], items: Sequence[_T]) -> list[_S]:
    """Return ``work`` of every item, done side by side on the CPU."""
    if place_of(head.query) != "cpu":
        return [work(item) for item in items]
    found: list[Any] = [None] * len(items)

    def one(number: int) -> None:
        found[number] = work(items[number])

    run_blocks(one, range(len(items)))
    return found


def concat_rows(head: Head, parts: list[Answer | None]) -> Answer:
    """Put the answers to consecutive rows together."""
    columns = zip(*(part for part in parts if part is not None), strict=True)
    value, logarithm, reliable = (head.xp.concat(list(column)) for column in columns)
    return value, logarithm, reliable


def merge_chunk_partials(one: Answer, other: Answer) -> Answer:
    """Merge answers to the same rows over disjoint sets of keys."""
    xp = array_namespace(one[0])
    value, logarithm = merge_partials(one[:2], other[:2])
    return value, logarithm, xp.logical_and(one[2], other[2])


def within(head: Head, rows: slice, keys: slice) -> Answer | None:
    """Answer some rows exactly over those of some keys that they see."""
    if rows.start == rows.stop:
        return None
    value, logarithm = part_of(head, rows, keys).attend()
    return value, logarithm, head.xp.ones_like(logarithm, dtype=head.xp.bool)


def part_of(head: Head, rows: slice, keys: slice) -> Head:
    """Cut out some rows with those of some keys that they see."""
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
    """How the squared errors of rows compare that see different numbers of keys."""
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
    """Answer some rows over the keys before some, and over those they see of them."""
    own = within(head, rows, keys)
    if own is None:
        return None
    value, logarithm, reliable = before.query(head.query[rows, :])
    dtype = own[0].dtype
    xp = head.xp
    value = xp.astype(value, dtype, copy=False)
    logarithm = xp.astype(logarithm, dtype, copy=False)
    return merge_chunk_partials((value, logarithm, reliable), own)
