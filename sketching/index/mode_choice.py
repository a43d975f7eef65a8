"""Which mode an index runs when none was given: the one that reads least."""

from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array
from sketching.index.bounds import ProjectionBounds
from sketching.index.modes import Exact, Filter
from sketching.index.queries import Queries
from sketching.index.request import Request

# cost of a bound in addition to its code, in numbers
_BOUND = 8
# queries of the pilot run
_PILOTS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """A mode and what each would read for a query, in numbers a point."""

    mode: Exact | Filter
    reads: dict[str, float]

    def __str__(self) -> str:
        table = ", ".join(f"{name} {reads:.0f}" for name, reads in self.reads.items())
        return f"{self.mode}: least of the numbers read for a point ({table})"


def choose(request: Request, images: Array, slots: Array) -> Choice:
    """Compare the modes whose eps holds for adaptive queries.

    Sketches that are safe in every direction take more numbers than the points.
    """
    d, k = request.points.rows.shape[1], images.shape[1]
    modes: list[tuple[Exact | Filter, float]] = [(Exact(), float(d))]
    size = min(k, 128) if 2 * k > d else k
    # with few points, the directions of the head say little about later points
    if size == k or (4 * size <= d and len(slots) >= 4 * size):
        share = _open_share(request, images, slots, size)
        modes.append((Filter(size=size), size + _BOUND + d * share))
    mode, _ = min(modes, key=lambda pair: pair[1])
    return Choice(mode, {type(mode).__name__: reads for mode, reads in modes})


def _open_share(request: Request, images: Array, slots: Array, size: int) -> float:
    """Measure on some points the share of distances that codes leave undecided."""
    rng = np.random.default_rng(0)
    sketch: ProjectionBounds = Filter(size=size).draw(request, images)
    codes = sketch.blank(len(slots))
    sketch.encode(codes, slice(0, len(slots)), images)
    sketch = sketch.with_table(sketch.table.extended(**codes))
    pilots = slots[rng.choice(len(slots), min(_PILOTS, len(slots)), replace=False)]
    points = request.points
    queries = Queries(points, request.factor, points.kept(pilots))
    return sketch.open_share(queries, request.eps)
