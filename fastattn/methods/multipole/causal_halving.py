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
from fastattn.problem.causal_chunks import Answer, joined, merged, within
from fastattn.problem.head import Head
from fastattn.problem.plan import Attempt
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError

# a rectangle must be predicted to take at most this share of exact attention's time
_WORTH = 0.8
# how often keys are halved at most: what is left is small next to the rectangles
_DEEPEST = 8

# from a rectangle, the work that is of interest, and choices made for a like one
Maker = Callable[[Head, float, Attempt | None], Attempt]


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
            visible=None,
        )


def halves_attempt(head: Head, make: Maker, limit: float) -> Attempt:
    """Choose for one rectangle of every size, the largest first, until it does not pay.

    Raises
    ------
    RefusalError
        If the largest is refused, or all together exceed the limit.
    """
    visible = to_host(head.visible)
    levels: list[Attempt] = []
    work = exact_work(*head.sizes, logits=head.logits)
    while len(levels) < _DEEPEST:
        found = list(_rectangles(visible, len(levels)))
        largest = max(found, key=lambda x: x.logits)
        if not largest.logits:
            break
        exact = exact_work(*head.sizes, logits=largest.logits)
        # what is asked for runs at least once, whatever it takes
        most = _WORTH * exact if levels or math.isfinite(limit) else math.inf
        try:
            attempt = make(largest.of(head), most, None)
        except RefusalError:
            if levels:
                break
            raise
        share = attempt.plan.predicted_seconds / seconds(exact)
        if levels and share > _WORTH:
            break
        area = sum(x.logits for x in found)
        work -= (1 - share) * exact_work(*head.sizes, logits=area)
        levels.append(attempt)
    if not levels:
        raise RefusalError("no row sees enough keys to halve them: use Exact()")
    if work > limit:
        raise RefusalError(
            f"halves of the keys take {work / limit:.1f} times the work allowed"
        )
    return _attempt(levels, make, work)


def _attempt(levels: list[Attempt], make: Maker, work: float) -> Attempt:
    """Describe the choices for all sizes by those for the largest."""
    plan = replace(levels[0].plan, predicted_seconds=seconds(work))

    def again(factor: float) -> Attempt:
        changed = [x.again(factor) for x in levels if x.again is not None]
        return _attempt(changed, make, work)

    known = all(x.again is not None for x in levels)
    return Attempt(plan, _Halves(levels, make), math.inf, again if known else None)


@dataclass(frozen=True, slots=True, eq=False)
class _Halves:
    """The choices for every size of rectangle, and how they are made for another."""

    levels: list[Attempt]
    make: Maker

    def __call__(self, head: Head) -> tuple[Array, ...]:
        """Answer a causal head; the rows' errors are guessed to be alike."""
        visible = to_host(head.visible)
        answer = self._answer(head, visible, 0, int(visible[-1]) + 1, 0)
        return *joined(head, [answer]), np.ones(len(visible))

    def _answer(
        self, head: Head, visible: Array, low: int, high: int, level: int
    ) -> Answer | None:
        """Answer rows that see ``low`` keys but not ``high``, over those beyond."""
        if level == len(self.levels):
            rows = _rows(visible, low, high)
            return within(head, rows, slice(low, min(high, head.sizes[1])))
        middle = (low + high) // 2
        first = self._answer(head, visible, low, middle, level + 1)
        second = self._answer(head, visible, middle, high, level + 1)
        if second is None:
            return first
        rectangle = _Rectangle(_rows(visible, middle, high), slice(low, middle))
        if rectangle.logits:
            second = merged(self._rectangle(rectangle.of(head), level), second)
        return joined(head, [first, second])

    def _rectangle(self, part: Head, level: int) -> Answer:
        """Answer a rectangle as the first of its size was planned, or exactly."""
        try:
            found = self.make(part, math.inf, self.levels[level]).run(part)
            return found[0], found[1], found[2]
        except RefusalError:
            value, logarithm = part.attend()
            return value, logarithm, part.xp.ones_like(logarithm, dtype=part.xp.bool)


def _rectangles(visible: Array, level: int) -> Iterator[_Rectangle]:
    """Yield the rectangles of the ranges that keys are cut into by so many halvings."""
    edges = [0, int(visible[-1]) + 1]
    for _ in range(level):
        halves = [(low + high) // 2 for low, high in pairwise(edges)]
        edges = sorted(edges + halves)
    for low, high in pairwise(edges):
        middle = (low + high) // 2
        yield _Rectangle(_rows(visible, middle, high), slice(low, middle))


def _rows(visible: Array, low: int, high: int) -> slice:
    """Rows that see ``low`` keys but not ``high``."""
    first, last = np.searchsorted(visible, [low, high])
    return slice(int(first), int(last))
