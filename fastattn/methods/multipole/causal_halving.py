"""Causal attention by halving: rectangles without a mask, exact where they are small.

The rows that see all of the first half of the keys meet it in one rectangle, and both
halves are cut again, as HyperAttention does (Han et al., arXiv 2310.05869).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fastattn.costs.work import exact_work, seconds
from fastattn.problem.causal_chunks import (
    Answer,
    concat_rows,
    merge_chunk_partials,
    within,
)
from fastattn.problem.head import Head
from fastattn.problem.plan import ConfiguredMethod
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError

# a rectangle must be predicted to take at most this share of exact attention's time
_TIME_SHARE = 0.8
# how often keys are halved at most: what is left is small next to the rectangles
_DEEPEST = 8

# from a rectangle, the work that is of interest, and choices made for a like one
Maker = Callable[[Head, float, ConfiguredMethod | None], ConfiguredMethod]


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Rows that see all of the first half of a range of keys, and that half."""

    rows: slice
    keys: slice

    @property
    def logits(self) -> int:
        """Number of pairs."""
        rows, keys = self.rows, self.keys
        return int((rows.stop - rows.start) * (keys.stop - keys.start))

    def of(self, head: Head) -> Head:
        """Cut it out of a head."""
        return replace(
            head,
            query=head.query[self.rows, :],
            key=head.key[self.keys, :],
            value=head.value[self.keys, :],
            prefix_lengths=None,
        )


def configured_halves(head: Head, make: Maker, limit: float) -> ConfiguredMethod:
    """Choose for one rectangle of every size, the largest first, until it does not pay.

    Raises
    ------
    RefusalError
        If the largest is refused, or all together exceed the limit.
    """
    prefix_lengths = to_host(head.prefix_lengths)
    levels: list[ConfiguredMethod] = []
    work = exact_work(*head.sizes, logits=head.logits)
    while len(levels) < _DEEPEST:
        found = list(_rectangles(prefix_lengths, len(levels)))
        largest = max(found, key=lambda x: x.logits)
        if not largest.logits:
            break
        exact = exact_work(*head.sizes, logits=largest.logits)
        # what is asked for runs at least once, whatever it takes
        most = _TIME_SHARE * exact if levels or math.isfinite(limit) else math.inf
        try:
            configured = make(largest.of(head), most, None)
        except RefusalError:
            if levels:
                break
            raise
        share = configured.plan.predicted_seconds / seconds(exact)
        if levels and share > _TIME_SHARE:
            break
        area = sum(x.logits for x in found)
        work -= (1 - share) * exact_work(*head.sizes, logits=area)
        levels.append(configured)
    if not levels:
        raise RefusalError("no row sees enough keys to halve them: use Exact()")
    if work > limit:
        raise RefusalError(
            f"halves of the keys take {work / limit:.1f} times the work allowed"
        )
    return _configured(levels, make, work)


def _configured(
    levels: list[ConfiguredMethod], make: Maker, work: float
) -> ConfiguredMethod:
    """Describe the choices for all sizes by those for the largest."""
    plan = replace(levels[0].plan, predicted_seconds=seconds(work))

    def retighten(factor: float) -> ConfiguredMethod:
        changed = [x.retighten(factor) for x in levels if x.retighten is not None]
        return _configured(changed, make, work)

    known = all(x.retighten is not None for x in levels)
    return ConfiguredMethod(
        plan, _Halves(levels, make), math.inf, retighten if known else None
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Halves:
    """The choices for every size of rectangle, and how they are made for another."""

    levels: list[ConfiguredMethod]
    make: Maker

    def __call__(self, head: Head) -> tuple[Array, ...]:
        """Answer a causal head; the rows' errors are guessed to be alike."""
        prefix_lengths = to_host(head.prefix_lengths)
        answer = self._answer(head, prefix_lengths, 0, int(prefix_lengths[-1]) + 1, 0)
        return *concat_rows(head, [answer]), np.ones(len(prefix_lengths))

    def _answer(
        self, head: Head, prefix_lengths: Array, low: int, high: int, level: int
    ) -> Answer | None:
        """Answer rows that see ``low`` keys but not ``high``, over those beyond."""
        if level == len(self.levels):
            rows = _rows(prefix_lengths, low, high)
            return within(head, rows, slice(low, min(high, head.sizes[1])))
        midpoint = (low + high) // 2
        first = self._answer(head, prefix_lengths, low, midpoint, level + 1)
        second = self._answer(head, prefix_lengths, midpoint, high, level + 1)
        if second is None:
            return first
        rectangle = _Rectangle(
            _rows(prefix_lengths, midpoint, high), slice(low, midpoint)
        )
        if rectangle.logits:
            second = merge_chunk_partials(
                self._rectangle(rectangle.of(head), level), second
            )
        return concat_rows(head, [first, second])

    def _rectangle(self, part: Head, level: int) -> Answer:
        """Answer a rectangle as the first of its size was planned, or exactly."""
        try:
            found = self.make(part, math.inf, self.levels[level]).run(part)
            return found[0], found[1], found[2]
        except RefusalError:
            value, logarithm = part.attend()
            return value, logarithm, part.xp.ones_like(logarithm, dtype=part.xp.bool)


def _rectangles(prefix_lengths: Array, level: int) -> Iterator[_Rectangle]:
    """Yield the rectangles of the ranges that keys are cut into by so many halvings."""
    edges = [0, int(prefix_lengths[-1]) + 1]
    for _ in range(level):
        halves = [(low + high) // 2 for low, high in pairwise(edges)]
        edges = sorted(edges + halves)
    for low, high in pairwise(edges):
        midpoint = (low + high) // 2
        yield _Rectangle(_rows(prefix_lengths, midpoint, high), slice(low, midpoint))


def _rows(prefix_lengths: Array, low: int, high: int) -> slice:
    """Rows that see ``low`` keys but not ``high``."""
    first, last = np.searchsorted(prefix_lengths, [low, high])
    return slice(int(first), int(last))
