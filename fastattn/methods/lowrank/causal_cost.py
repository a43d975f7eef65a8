"""What a causal head costs by prefixes, and how much error its rows may have.

An approximation whose relative error over all keys is known errs, over prefixes, with
what varies between the rows that see one prefix. The first rows are exact, and where
the values average out they are the largest by far: the others may then err by more
than the tolerance of the whole head.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastattn.costs.work import exact_work, lowrank_work
from fastattn.problem.causal_chunks import cuts_of
from fastattn.problem.head import Head
from sketching._lib.arrays import Array, to_host

# strata of the rows beyond the first chunk, and rows of each that are looked at
_STRATA, _ROWS = 6, 12
# rows that are looked at over all keys
_WHOLE = 32
# rows of the first chunk that are looked at: the first of all, and some of the others
_EARLY, _SOME = 256, 96
# what a chunk costs beside its products: calls, and arrays that are read again
_CHUNK_WORK = 4e7


def causal_tolerance_factor(head: Head, rng: np.random.Generator) -> float:
    """How many times the tolerance a structure may err that is judged on all keys."""
    prefix_lengths = to_host(head.prefix_lengths)
    start = int(np.searchsorted(prefix_lengths, cuts_of(int(prefix_lengths[-1]))[1]))
    n = len(prefix_lengths)
    if start == n:
        return 1.0
    total, varies = _early(head, start, rng), 0.0
    edges = np.geomspace(max(start, 1), n, _STRATA + 1).astype(int)
    edges = np.unique([start, *edges[1:-1], n])
    for lo, hi in pairwise(edges):
        # rows of a stratum as if all saw as many keys as the one in the middle
        size, spread = _sizes(
            head, int(prefix_lengths[(lo + hi) // 2]), lo, hi, _ROWS, rng
        )
        total += (hi - lo) * size
        varies += (hi - lo) * spread
    size, spread = _sizes(head, head.sizes[1], start, n, _WHOLE, rng)
    found = total * spread / (varies * size) if varies * size > 0 else 1.0
    return math.sqrt(found) if math.isfinite(found) and found > 0 else 1.0


def _early(head: Head, start: int, rng: np.random.Generator) -> float:
    """Sum of the squares of the answers to the first rows, those of the first chunk."""
    early = min(_EARLY, start)
    rows = np.concatenate([np.arange(early), _spread(early, start, _SOME, rng)])
    if not len(rows):
        return 0.0
    answer = to_host(head.with_rows(rows).attend()[0]).astype(np.float64)
    squares = np.sum(answer**2, axis=1)
    others = squares[early:].mean() if start > early else 0.0
    return float(squares[:early].sum() + (start - early) * others)


def _spread(lo: int, hi: int, count: int, rng: np.random.Generator) -> Array:
    """Row numbers at even distances, the first of them at random."""
    step = max(1, (hi - lo) // count)
    return np.arange(lo + rng.integers(step), hi, step)


def _sizes(
    head: Head, seen: int, lo: int, hi: int, count: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Mean square of answers over the first keys, and of what varies in them."""
    rows = _spread(lo, hi, count, rng)
    part = replace(
        head, key=head.key[:seen, :], value=head.value[:seen, :], prefix_lengths=None
    )
    answer: Array = to_host(part.with_rows(rows).attend()[0]).astype(np.float64)
    spread = answer - answer.mean(axis=0)
    return (
        float(np.sum(answer**2)) / len(rows),
        float(np.sum(spread**2)) / max(len(rows) - 1, 1),
    )


def lowrank_cost(head: Head, first: int | None = None) -> Callable[[int, int], float]:
    """Work of a head from the numbers of polynomials and landmarks.

    Of a causal head the ``first`` keys are one chunk.
    """
    if head.prefix_lengths is None:
        return lambda rank, landmarks: lowrank_work(*head.sizes, rank, landmarks)
    p = head.sizes[3]
    chunks, *within = chunk_work(head, first)

    def cost(rank: int, landmarks: int) -> float:
        work = lowrank_work(*head.sizes, rank, landmarks) + sum(within)
        # double precision: sums are added, and projected onto the landmarks
        projected = (rank + landmarks) * (p + 1) * (2 * landmarks + 16)
        return work + chunks * projected

    return cost


def chunk_work(head: Head, first: int | None = None) -> tuple[int, float, float]:
    """Number of chunks of a causal head, its exact work and that of calls."""
    prefix_lengths = to_host(head.prefix_lengths)
    cuts = np.asarray(cuts_of(int(prefix_lengths[-1]), first))
    before = cuts[np.searchsorted(cuts, prefix_lengths, side="right") - 1]
    exact = exact_work(*head.sizes, logits=int(np.sum(prefix_lengths - before)))
    return len(cuts), exact, len(cuts) * _CHUNK_WORK
