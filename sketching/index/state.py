"""The contents of an index, as a value: every change makes another one.

Changes of rows in place are returned as writes, which the index makes when nobody
reads; all else is computed before.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.cell import Cell
from sketching.index.bounds import SAMPLE, sampled
from sketching.index.columns import Write, make
from sketching.index.mode_choice import Choice, choose
from sketching.index.modes import Adaptive, Exact, Filter
from sketching.index.pending_updates import PendingUpdates
from sketching.index.points import Placed, Points, blocks
from sketching.index.queries import Queries
from sketching.index.request import Request
from sketching.metric.mahalanobis import MahalanobisMetric, updated_metric

Mode = Exact | Filter | Adaptive
Streams = tuple[np.random.Generator, np.random.Generator]


@dataclass(frozen=True, slots=True)
class State:
    """The parts of an index, consistent but for pending updates."""

    metric: MahalanobisMetric
    mode: Mode | None
    # whether the index picks the mode itself
    picks: bool
    promise: tuple[float, float]
    # random streams of the sketches, and of the queries' samples
    draws: np.random.Generator
    samples: np.random.Generator
    pending: PendingUpdates
    # at least the norm of the factor
    scale: float
    points: Points | None = None
    sketch: Any = None
    choice: Choice | None = None
    # how many points the mode and the directions of a head were drawn from
    drawn_from: int = 0
    # queries that were answered by these sketches
    answered: Cell[int] = field(default_factory=lambda: Cell(0))

    @staticmethod
    def empty(
        metric: MahalanobisMetric,
        mode: Mode | None,
        promise: tuple[float, float],
        generator: np.random.Generator,
    ) -> "State":
        """No points yet."""
        return State(
            metric,
            mode,
            mode is None,
            promise,
            *streams(generator),
            PendingUpdates.none(metric.shape),
            float(np.linalg.norm(metric.factor)),
        )

    @property
    def filled(self) -> Points:
        """The points; an error where there are none."""
        if self.points is None or not self.points.size:
            raise ValueError("the index is empty: insert points first")
        return self.points

    @property
    def running(self) -> Mode:
        """The mode, which the first insertion has picked."""
        if self.mode is None:
            raise ValueError("the index is empty: insert points first")
        return self.mode

    @property
    def nbytes(self) -> int:
        """Bytes of metric, points and sketch."""
        total = int(self.metric.factor.nbytes)
        for part in (self.points, self.sketch):
            total += 0 if part is None else part.nbytes
        return total

    def request(self, queries: Queries | None = None) -> Request:
        """The arguments of a mode."""
        return Request(
            self.filled,
            self.metric._factor,
            *self.promise,
            self.samples,
            self.sketch,
            queries,
        )

    def inserted(self, x: Array) -> "State":
        """With more points; the first ones set precision, centre and mode."""
        if self.points is None:
            self.metric.refuse_covariance_of(x)
            is_half = isinstance(self.mode, Exact) and self.mode.half_width
            points = Points.around(x, half_width=is_half)
            new = self._placed("X", points, x)
            full = points.extended(new, np.zeros((3, len(x))), 0)
            return replace(self, points=full).drawn().encoded()
        new = self._placed("X", self.points, x)
        stats, codes = self._encode(self.points, new)
        points = self.points.extended(new, stats, len(self.pending))
        sketch = self.sketch
        if sketch is not None:
            sketch = sketch.with_table(sketch.table.extended(**codes))
        state = replace(self, points=points, sketch=sketch)
        if points.is_scattered():
            state = replace(state, points=points.recentred()).encoded()
        return state.drawn().encoded() if state._has_outgrown() else state

    def _placed(self, name: str, points: Points, x: Array) -> Placed:
        """Round points as they are stored; raise if their squares are not finite."""
        check_length(name, points, points.centred(x), self.scale)
        return points.placed(x)

    def _has_outgrown(self) -> bool:
        """Whether mode and directions were drawn from far fewer points."""
        depends = self.picks or isinstance(self.mode, Filter)
        few = self.drawn_from < min(SAMPLE, self.filled.size // 4)
        return depends and few

    def drawn(self) -> "State":
        """With the sketch of the mode, and the mode if there was none.

        The new sketch is without points.
        """
        draws = copy.deepcopy(self.draws)
        request = replace(self.request(), rng=draws)
        points, factor = request.points, request.factor
        slots, images = np.arange(0), np.empty((0, len(factor)))
        mode, choice = self.mode, self.choice
        if self.picks or isinstance(mode, Filter):
            slots = sampled(points.size, draws)
            images, _ = points.measured(points.kept(slots), points.take(slots), factor)
        if self.picks:
            choice = choose(request, images, slots)
            mode = choice.mode
        assert mode is not None
        return replace(
            self,
            mode=mode,
            choice=choice,
            drawn_from=points.size,
            sketch=mode.draw(request, images),
            draws=draws,
        )

    def _encode(self, points: Points, new: Placed) -> tuple[Array, dict[str, Array]]:
        """Measure and sketch points under the current metric."""
        factor, n = self.metric.factor, len(new)
        stats = np.empty((3, n))
        codes = {} if self.sketch is None else self.sketch.blank(n)
        for some in blocks(np.arange(n)):
            part = slice(some[0], some[-1] + 1)
            kept, rows = new.kept[part], new.take(part)
            images, stats[:, part] = points.measured(kept, rows, factor)
            if self.sketch is not None:
                self.sketch.encode(codes, part, images)
        return stats, codes

    def _encode_slots(self, slots: Array) -> tuple[Array, dict[str, Array]]:
        """Measure and sketch stored points under the current metric."""
        points = self.filled
        stats = np.empty((3, len(slots)))
        codes = {} if self.sketch is None else self.sketch.blank(len(slots))
        for some in blocks(np.arange(len(slots))):
            part, at = slice(some[0], some[-1] + 1), slots[some]
            kept, rows = points.kept(at), points.take(at)
            images, stats[:, part] = points.measured(kept, rows, self.metric.factor)
            if self.sketch is not None:
                self.sketch.encode(codes, part, images)
        return stats, codes

    def encoded(self) -> "State":
        """With all points measured and sketched anew; no update is pending."""
        points, factor = self.filled, self.metric.factor
        state = self
        if self.sketch is not None:
            state = replace(self, sketch=self.sketch.refreshed(factor))
        stats, codes = state._encode_slots(np.arange(points.size))
        sketch = state.sketch
        if sketch is not None:
            sketch = sketch.with_table(sketch.table.replaced(**codes))
        return replace(
            state,
            points=points.with_stats(stats),
            sketch=sketch,
            pending=PendingUpdates.none(self.metric.shape),
            scale=float(np.linalg.norm(factor)),
        )

    def removed(self, slots: Array) -> tuple["State", list[Write]]:
        """Without some points."""
        points, writes, moves = self.filled.removed(slots)
        sketch = self.sketch
        if sketch is not None:
            table, more = sketch.table.closed(*moves)
            sketch, writes = sketch.with_table(table), writes + more
        return replace(self, points=points, sketch=sketch), writes

    def moved(self, slots: Array, x: Array) -> tuple["State", list[Write]]:
        """With points at other places."""
        new = self._placed("X", self.filled, x)
        stats, codes = self._encode(self.filled, new)
        points, writes = self.filled.written(slots, new, stats, len(self.pending))
        if self.sketch is not None:
            writes += self.sketch.table.written(slots, **codes)
        return replace(self, points=points), writes

    def well_centred(self) -> "State":
        """With another centre, if too many rows do not determine their points."""
        if self.points is None or not self.points.size:
            return self
        if not self.points.is_scattered():
            return self
        return replace(self, points=self.points.recentred()).encoded()

    def private(self) -> "State":
        """With rows that nobody else reads."""
        points = None if self.points is None else self.points.private()
        sketch = self.sketch
        if sketch is not None:
            sketch = sketch.with_table(sketch.table.private())
        return replace(self, points=points, sketch=sketch)

    def updated(self, left: Array, right: Array, out: Array | None) -> "State":
        """With another metric; the points follow when an answer needs it."""
        squares = (np.einsum("rd,rd->r", x, x) for x in (left, right))
        with np.errstate(over="ignore"):
            lengths = np.multiply(*map(np.sqrt, squares))
            scale = self.scale + float(lengths.sum())
        if self.points is not None:
            longest = float(self.points.stats[2].max(initial=0))
            self.points.refuse_overflow("a, b", scale, longest)
        metric, images = updated_metric(self.metric, left, right, out)
        pending = self.pending
        if self.points is not None:
            pending = pending.extended(left, right, images)
        return replace(self, metric=metric, pending=pending, scale=scale)

    def flushed(self) -> "State":
        """With norms and sketches of the current metric."""
        pending = self.pending
        if not pending or self.points is None or not self.points.size:
            return self
        if pending.overflowed:
            return self.encoded()
        left, right, keep = pending.left, pending.right, self.sketch is not None
        points, w = self.filled.absorbed(left, right, pending.images, keep=keep)
        sketch: Any = self.sketch.absorbed(left, right, w, points) if keep else None
        none = PendingUpdates.none(self.metric.shape)
        state = replace(self, points=points, sketch=sketch, pending=none)
        stale = points.stale()
        if isinstance(self.mode, Adaptive):
            if sketch.is_stale(points):
                return state.encoded()
            stale = np.union1d(stale, sketch.stale(points))
        if stale.size:
            stats, codes = state._encode_slots(stale)
            # nobody has seen these columns yet
            make(points.table.written(stale, stats=stats))
            if sketch is not None:
                make(sketch.table.written(stale, **codes))
        return state

    def redrawn(self, generator: np.random.Generator) -> "State":
        """With another centre and new sketches."""
        draws, samples = streams(generator)
        state = replace(
            self,
            points=self.filled.recentred(),
            draws=draws,
            samples=samples,
            pending=PendingUpdates.none(self.metric.shape),
            answered=Cell(0),
        )
        return state.drawn().encoded()


def check_length(name: str, points: Points, rows: Array, scale: float) -> None:
    """Refuse centred rows whose squares would not be finite."""
    # sums of products do not warn
    squares = np.einsum("nd,nd->n", rows, rows)
    points.refuse_overflow(name, scale, math.sqrt(squares.max(initial=0)))


def streams(generator: np.random.Generator) -> Streams:
    """Start the two random streams: of the sketches, and of the queries' samples."""
    seeds = generator.integers(2**63, size=2)
    draws, samples = (np.random.Generator(np.random.PCG64(int(seed))) for seed in seeds)
    return draws, samples
