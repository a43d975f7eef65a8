"""What an index does with checked arguments: points, sketch and waiting updates."""

from dataclasses import replace
from typing import Any

import numpy as np

from sketching._exact_scan import Queries, lengths_of_differences
from sketching._head_tail import SAMPLE, sampled
from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate, RefusalError
from sketching._mode_choice import Choice, choose
from sketching._points import Points, blocks
from sketching._request import Request
from sketching._sample_exact import sample_exact
from sketching._waiting_updates import WaitingUpdates
from sketching.distance_modes import Adaptive, Exact, Filter
from sketching.metric import MahalanobisMetric, add_update

Mode = Exact | Filter | Adaptive
# numbers of one block of distances
_BLOCK = 1 << 22


class Engine:
    """The parts of an index, kept in step."""

    def __init__(
        self,
        metric: MahalanobisMetric,
        mode: Mode | None,
        promise: tuple[float, float],
        generator: np.random.Generator,
    ) -> None:
        self.metric, self.mode, self.picks = metric, mode, mode is None
        self.eps, self.delta = promise
        self.choice: Choice | None = None
        self.points: Points | None = None
        self.sketch: Any = None
        self.waiting = WaitingUpdates(metric.shape)
        # at least the norm of the factor
        self.scale = float(np.linalg.norm(metric.factor))
        # how many points the mode and the directions of a head were drawn from
        self.drawn_from = 0
        self.seed(generator)

    def seed(self, generator: np.random.Generator) -> None:
        """Start the two streams: what sketches are drawn by, what queries sample."""
        seeds = generator.integers(2**63, size=2)
        self.draws, self.samples = (
            np.random.Generator(np.random.PCG64(int(seed))) for seed in seeds
        )
        self.answered = 0

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

    def request(self, queries: Queries | None = None) -> Request:
        """What the mode is asked."""
        return Request(
            self.filled,
            self.metric.factor,
            self.eps,
            self.delta,
            self.samples,
            self.sketch,
            queries,
        )

    def insert(self, x: Array) -> Array:
        """Insert points; the first ones set precision, centre and mode."""
        if self.points is None:
            self.metric.refuse_covariance_of(x)
            center = x.mean(axis=0, dtype=np.float64)
            is_half = isinstance(self.mode, Exact) and self.mode.half_width
            points = Points(center, x.dtype, half_width=is_half)
            numbers = points.append(self._placed("X", points, x), 0)
            self.points = points
            try:
                self.draw()
            except RefusalError:
                self.points = None
                raise
        else:
            points = self.points
            numbers = points.append(self._placed("X", points, x), len(self.waiting))
            if self._has_outgrown():
                self.draw()
                self._encode_all()
                return numbers
        self.encode(np.arange(points.size - len(x), points.size))
        return numbers

    def _placed(self, name: str, points: Points, x: Array) -> Array:
        """Centre rows, and refuse those whose squares would not be finite."""
        rows = points.centred(x)
        with np.errstate(over="ignore"):
            longest = np.sqrt(np.max(np.einsum("nd,nd->n", rows, rows), initial=0))
        points.refuse_overflow(name, self.scale, float(longest))
        return rows

    def _has_outgrown(self) -> bool:
        """Whether few points decided what many would decide better."""
        depends = self.picks or isinstance(self.mode, Filter)
        few = self.drawn_from < min(SAMPLE, self.filled.size // 4)
        return depends and few

    def draw(self) -> None:
        """Draw the sketch that the mode asks for; pick the mode if there is none."""
        request = replace(self.request(), rng=self.draws)
        points, factor = request.points, request.factor
        slots, images = np.arange(0), np.empty((0, len(factor)))
        if self.picks or isinstance(self.mode, Filter):
            slots = sampled(points.size, self.draws)
            images = points.mapped(slots, factor)
        if self.picks:
            self.choice = choose(request, images, slots)
            self.mode = self.choice.mode
        self.drawn_from = points.size
        self.sketch = self.running.draw(request, images)

    def encode(self, slots: Array) -> None:
        """Measure and sketch points under the metric of now."""
        points = self.filled
        if self.sketch is not None:
            self.sketch.resize(points.size)
        for some in blocks(slots):
            images = points.mapped(some, self.metric.factor)
            if self.sketch is not None:
                self.sketch.encode(some, images)

    def remove(self, slots: Array) -> None:
        """Remove points."""
        points = self.filled
        movers, holes = points.remove(slots)
        if self.sketch is not None:
            self.sketch.move(movers, holes, points.size)

    def write(self, slots: Array, x: Array) -> None:
        """Move points."""
        points = self.filled
        points.write(slots, self._placed("X", points, x), len(self.waiting))
        self.encode(slots)

    def update(self, left: Array, right: Array) -> None:
        """Change the metric; the points follow when an answer needs it."""
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            scale = self.scale + float(lengths.sum())
        if self.points is not None:
            longest = float(self.points.stats[2].max(initial=0))
            self.points.refuse_overflow("a, b", scale, longest)
        images = add_update(self.metric, left, right)
        if self.points is not None:
            self.waiting.append(left, right, images)
        self.scale = scale

    def flush(self) -> None:
        """Bring norms and sketches to the metric of now."""
        points, waiting = self.filled, self.waiting
        if not waiting:
            return
        if waiting.overflowed:
            self._encode_all()
            return
        left, right = waiting.left, waiting.right
        keep = self.sketch is not None
        w = points.absorb(left, right, waiting.images, keep=keep)
        if keep:
            self.sketch.absorb(left, right, w, points)
        waiting.clear()
        stale = points.stale()
        if isinstance(self.mode, Adaptive):
            if self.sketch.is_stale(points):
                self._encode_all()
                return
            stale = np.union1d(stale, self.sketch.stale(points))
        if stale.size:
            self.encode(stale)

    def _encode_all(self) -> None:
        points = self.filled
        self.scale = float(np.linalg.norm(self.metric.factor))
        if self.sketch is not None:
            self.sketch.refresh(self.metric.factor)
        self.encode(np.arange(points.size))
        self.waiting.clear()
        points.forget_updates()

    def queries(self, name: str, x: Array) -> Queries:
        """Centre queries, with the points up to date."""
        points = self.filled
        self.flush()
        return Queries(points, self.metric.factor, self._placed(name, points, x))

    def distances(self, queries: Queries) -> tuple[Array, Certificate]:
        """Distances to all points."""
        self._count(len(queries))
        found: tuple[Array, Certificate] = self.running.distances(self.request(queries))
        return found

    def nearest(
        self, queries: Queries, k: int
    ) -> tuple[Array, Array, Array, Certificate]:
        """Nearest points, where they are, how many were looked at."""
        self._count(len(queries))
        found: tuple[Array, Array, Array, Certificate] = self.running.nearest(
            self.request(queries), k
        )
        return found

    def within(
        self, queries: Queries, radius: float
    ) -> tuple[Array, Array, Array, Certificate]:
        """Points within a radius, nearest first, their numbers, how many looked at."""
        request, q = self.request(queries), len(queries)
        values, numbers = np.empty(q, dtype=object), np.empty(q, dtype=object)
        looked = np.full(q, self.filled.size)
        is_exact = isinstance(self.mode, Exact)
        step = max(1, _BLOCK // self.filled.size)
        for start in range(0, q, step):
            some = queries[start : start + step]
            rows, certificate = self.distances(some)
            # estimates only rule points out
            error = 0.0 if is_exact else float(certificate.error)
            for j, row in enumerate(rows):
                near = np.flatnonzero(row <= radius * (1 + error))
                found = row[near] if is_exact else some.some_distances(j, near)
                looked[start + j] = len(row) if is_exact else len(near)
                near, found = near[found <= radius], found[found <= radius]
                order = np.argsort(found, kind="stable")
                values[start + j] = found[order]
                numbers[start + j] = self.filled.numbers[near[order]]
        mode = self.running if isinstance(self.mode, Adaptive) else Exact()
        return values, numbers, looked, mode.guarantee(request)

    def pairs(self, left: Array, right: Array) -> Array:
        """Distances between points."""
        points, factor = self.filled, self.metric.factor
        if not isinstance(self.mode, Adaptive):
            others = points.some(right).astype(np.float64)
            return lengths_of_differences(factor, points, left, others)
        self.flush()
        self._count(1)
        sampled = self.mode.sample(self.request())
        pairs: Array = self.sketch.pairs(points, factor, left, right, sampled, self.eps)
        return pairs

    def sample(self, queries: Queries, size: int, power: int) -> Array:
        """Places in proportion to distance."""
        estimates, certificate = self.distances(queries)
        error = float(certificate.error)
        if error > self.eps:
            estimates, error = queries.distances(), 0.0
        return sample_exact(
            estimates[0],
            error,
            lambda slots: queries.some_distances(0, slots),
            size,
            power,
            self.samples,
        )

    def guarantee(self) -> Certificate:
        """What an answer promises."""
        return self.running.guarantee(self.request())

    def redraw(self, generator: np.random.Generator) -> None:
        """Centre anew and draw new sketches."""
        self.filled.recentre()
        self.seed(generator)
        self.waiting.clear()
        try:
            self.draw()
        finally:
            # the norms are those of the old centre
            self._encode_all()

    def _count(self, asked: int) -> None:
        """Refuse answers beyond those that the sketches are good for."""
        most = self.mode.queries if isinstance(self.mode, Adaptive) else None
        if most is not None and self.answered + asked > most:
            raise RefusalError(
                f"{self.mode}: {self.answered} of {most} queries were answered, "
                f"{asked} more were asked: redraw() starts anew"
            )
        self.answered += asked

    @property
    def nbytes(self) -> int:
        """Bytes of metric, points and sketch."""
        total = int(self.metric.factor.nbytes)
        for part in (self.points, self.sketch):
            total += 0 if part is None else part.nbytes
        return total
