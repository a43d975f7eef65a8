"""Causal attention by recursive halving into rectangles without a mask.

The rows that attend to the whole first half of a range of keys form a rectangle with
it, which needs no mask; both halves of the range are cut again, as in HyperAttention
(Han et al., arXiv 2310.05869). Small triangles on the diagonal are computed exactly.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
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

# maps a rectangle, a budget and the method configured for another rectangle of the
# size, if there is one, to a configured method
Maker = Callable[[Head, float, ConfiguredMethod | None], ConfiguredMethod]


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """The first half of a range of keys, and the rows that attend to all of it."""

    rows: slice
    keys: slice

    @property
    def logits(self) -> int:
        """Number of logits."""
        rows, keys = self.rows, self.keys
        return int((rows.stop - rows.start) * (keys.stop - keys.start))

    def of(self, head: Head) -> Head:
        """Return the rectangle as a head without a mask."""
        return replace(
            head,
            query=head.query[self.rows, :],
            key=head.key[self.keys, :],
            value=head.value[self.keys, :],
            prefix_lengths=None,
        )


def configured_halves(head: Head, make: Maker, limit: float) -> ConfiguredMethod:
    """Configure the method for one rectangle of each size, from the largest down.

    Smaller rectangles, for which the method is not faster than exact attention, are
    computed exactly.

    Raises
    ------
    RefusalError
        If the largest rectangle is refused, or the total work exceeds ``limit``.
    """
    prefix_lengths = to_host(head.prefix_lengths)
    levels: list[ConfiguredMethod] = []
    work = exact_work(*head.sizes, logits=head.logits)
    while len(levels) < POLICY.multipole.deepest:
        found = list(_rectangles(prefix_lengths, len(levels)))
        largest = max(found, key=lambda x: x.logits)
        if not largest.logits:
            break
        exact = exact_work(*head.sizes, logits=largest.logits)
        # a method that the user requested runs at the first level whatever the cost
        most = POLICY.time_share * exact if levels or math.isfinite(limit) else math.inf
        try:
            configured = make(largest.of(head), most, None)
        except RefusalError:
            if levels:
                break
            raise
        share = configured.plan.work / exact
        if levels and share > POLICY.time_share:
            break
        area = sum(x.logits for x in found)
        work -= (1 - share) * exact_work(*head.sizes, logits=area)
        levels.append(configured)
    if not levels:
        raise RefusalError("no row attends to enough keys to halve them: use Exact()")
    if work > limit:
        raise RefusalError(f"causal halving takes {work / limit:.1f} times the budget")
    return _configured(levels, make, work)


def _configured(
    levels: list[ConfiguredMethod], make: Maker, work: float
) -> ConfiguredMethod:
    """Combine the levels; the plan names the parameters of the largest rectangle."""
    plan = replace(levels[0].plan, work=work)

    def retighten(factor: float) -> ConfiguredMethod:
        changed = [x.retighten(factor) for x in levels if x.retighten is not None]
        return _configured(changed, make, work)

    known = all(x.retighten is not None for x in levels)
    return ConfiguredMethod(
        plan, _Halves(levels, make), math.inf, retighten if known else None
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Halves:
    """Configured methods for the rectangles of every size."""

    levels: list[ConfiguredMethod]
    make: Maker

    def __call__(self, head: Head) -> tuple[Array, ...]:
        """Compute a causal head, with a uniform error profile."""
        prefix_lengths = to_host(head.prefix_lengths)
        answer = self._answer(head, prefix_lengths, 0, int(prefix_lengths[-1]) + 1, 0)
        return *concat_rows(head, [answer]), np.ones(len(prefix_lengths))

    def _answer(
        self, head: Head, prefix_lengths: Array, low: int, high: int, level: int
    ) -> Answer | None:
        """Compute the rows with low <= prefix length < high, over the keys from low."""
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
        """Compute a rectangle with the parameters of its level, or exactly."""
        try:
            found = self.make(part, math.inf, self.levels[level]).run(part)
            return found[0], found[1], found[2]
        except RefusalError:
            value, logarithm = part.attend()
            return value, logarithm, part.xp.ones_like(logarithm, dtype=part.xp.bool)


def _rectangles(prefix_lengths: Array, level: int) -> Iterator[_Rectangle]:
    """Yield the rectangles of the ranges of keys after ``level`` halvings."""
    edges = [0, int(prefix_lengths[-1]) + 1]
    for _ in range(level):
        halves = [(low + high) // 2 for low, high in pairwise(edges)]
        edges = sorted(edges + halves)
    for low, high in pairwise(edges):
        midpoint = (low + high) // 2
        yield _Rectangle(_rows(prefix_lengths, midpoint, high), slice(low, midpoint))


def _rows(prefix_lengths: Array, low: int, high: int) -> slice:
    """Rows with low <= prefix length < high."""
    first, last = np.searchsorted(prefix_lengths, [low, high])
    return slice(int(first), int(last))
