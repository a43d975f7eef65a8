r"""Cost of a causal low rank over prefixes, and the tolerance of its rows.

Low ranks are planned on rows that attend to all keys; a causal head applies them to
rows over prefixes. Two effects change the relative error. The error of an approximation
is proportional to how much outputs over the same keys vary between rows, which depends
on the prefix length. And the rows of the first chunk are exact; where values average
out, they have the largest norms, so that the other rows may have a relative error above
the tolerance of the head. Both are estimated from a few exact rows.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work, lowrank_work
from fastattn.problem.causal_chunks import cuts_of
from fastattn.problem.head import Head
from sketching._lib.arrays import Array, to_host


def causal_tolerance_factor(head: Head, rng: np.random.Generator) -> float:
    r"""Factor of the tolerance that an error measured over all keys may have.

    With outputs :math:`o_i` over the prefix of row ``i``, outputs :math:`w_i` over all
    keys, and variances :math:`\sigma^2` of both between rows over the same keys, it is

    .. math:: \sqrt{\frac{\sum_i |o_i|^2}{\sum_{i \ge s} \sigma^2(o_i)} \cdot
        \frac{\sigma^2(w)}{E |w|^2}},

    where the rows from ``s`` on are approximated and the rows before, those of the
    first chunk, are exact. Sums are estimated by strata of rows, geometric in their
    index; a stratum uses the prefix length of its median row.

    Parameters
    ----------
    head : Head
        A causal head.
    rng : Generator
        Draws the rows.

    Returns
    -------
    float
        1 where nothing is approximated or the ratio is not finite.
    """
    policy = POLICY.low_rank
    prefix_lengths = to_host(head.prefix_lengths)
    start = int(np.searchsorted(prefix_lengths, cuts_of(int(prefix_lengths[-1]))[1]))
    n = len(prefix_lengths)
    if start == n:
        return 1.0
    total, varies = _early(head, start, rng), 0.0
    edges = np.geomspace(max(start, 1), n, policy.strata + 1).astype(int)
    edges = np.unique([start, *edges[1:-1], n])
    for lo, hi in pairwise(edges):
        # all rows of a stratum over the prefix of its median row
        size, spread = _sizes(
            head, int(prefix_lengths[(lo + hi) // 2]), lo, hi, policy.stratum_rows, rng
        )
        total += (hi - lo) * size
        varies += (hi - lo) * spread
    size, spread = _sizes(head, head.sizes[1], start, n, policy.whole_rows, rng)
    found = total * spread / (varies * size) if varies * size > 0 else 1.0
    return math.sqrt(found) if math.isfinite(found) and found > 0 else 1.0


def _early(head: Head, start: int, rng: np.random.Generator) -> float:
    """Estimate the squared norm of the outputs in the first chunk, rows < ``start``."""
    policy = POLICY.low_rank
    early = min(policy.early_rows, start)
    rows = np.concatenate(
        [np.arange(early), _spread(early, start, policy.some_rows, rng)]
    )
    if not len(rows):
        return 0.0
    answer = to_host(head.with_rows(rows).attend()[0]).astype(np.float64)
    squares = np.sum(answer**2, axis=1)
    others = squares[early:].mean() if start > early else 0.0
    return float(squares[:early].sum() + (start - early) * others)


def _spread(lo: int, hi: int, count: int, rng: np.random.Generator) -> Array:
    """Row indices at equal distances, from a random start."""
    step = max(1, (hi - lo) // count)
    return np.arange(lo + rng.integers(step), hi, step)


def _sizes(
    head: Head, seen: int, lo: int, hi: int, count: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Mean squared norm, and variance, of outputs of rows over the first keys."""
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
    """Return the work, in multiply-adds, as a function of rank and landmarks.

    Parameters
    ----------
    head : Head
        One head, causal or not.
    first : int, optional
        Keys in the first chunk of a causal head.

    Returns
    -------
    callable
        ``cost(rank, landmarks)`` with ``r`` polynomials and ``c`` landmarks. A causal
        head adds exact attention within the chunks and, for each chunk, a projection
        of ``(r + c) (p + 1)`` sums onto the landmarks.
    """
    if head.prefix_lengths is None:
        return lambda rank, landmarks: lowrank_work(*head.sizes, rank, landmarks)
    p = head.sizes[3]
    chunks, *within = chunk_work(head, first)

    def cost(rank: int, landmarks: int) -> float:
        work = lowrank_work(*head.sizes, rank, landmarks) + sum(within)
        # in float64: states are added, and projected onto the landmarks
        projected = (rank + landmarks) * (p + 1) * (2 * landmarks + 16)
        return work + chunks * projected

    return cost


def chunk_work(head: Head, first: int | None = None) -> tuple[int, float, float]:
    """Number of chunks of a causal head, work of exact chunks, and fixed work."""
    prefix_lengths = to_host(head.prefix_lengths)
    cuts = np.asarray(cuts_of(int(prefix_lengths[-1]), first))
    before = cuts[np.searchsorted(cuts, prefix_lengths, side="right") - 1]
    exact = exact_work(*head.sizes, logits=int(np.sum(prefix_lengths - before)))
    return len(cuts), exact, len(cuts) * POLICY.low_rank.chunk_work
