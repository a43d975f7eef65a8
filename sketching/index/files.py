"""Indexes as files: an ``.npz`` with a JSON header, and no code in it."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.files import (
    check_sums,
    naming_the_file,
    read_arrays,
    write_arrays,
)
from sketching._lib.validation import check_flag, check_integer, check_number
from sketching.index.bounds import ProjectionBounds
from sketching.index.engine import IndexEngine
from sketching.index.modes import Adaptive, Exact, Filter
from sketching.index.points import Points
from sketching.index.sketches import Ensemble
from sketching.index.state import Mode
from sketching.metric.mahalanobis import MahalanobisMetric

PathLike: TypeAlias = str | os.PathLike[str]

_KIND = "sketching.MahalanobisIndex"
_VERSION = 1
_MODES: dict[str, type[Mode]] = {x.__name__: x for x in (Exact, Filter, Adaptive)}
_SKETCHES: dict[str, type[ProjectionBounds | Ensemble]] = {
    "Filter": ProjectionBounds,
    "Adaptive": Ensemble,
}


def write_index(path: Path, engine: IndexEngine) -> None:
    """Write the parts of an index that holds points."""
    engine.filled  # noqa: B018 (raises where there are none)
    engine.flush()
    sketch = {} if engine.sketch is None else engine.sketch.arrays()
    arrays = {
        "factor": engine.metric.factor,
        **{f"points.{name}": x for name, x in engine.filled.arrays().items()},
        **{f"sketch.{name}": x for name, x in sketch.items()},
    }
    streams = (engine.draws, engine.samples)
    header = {
        "format": _KIND,
        "version": _VERSION,
        "mode": type(engine.running).__name__,
        "options": asdict(engine.running),
        "eps": engine.eps,
        "delta": engine.delta,
        "answered": engine.answered,
        "picks": engine.picks,
        "drawn_from": engine.drawn_from,
        "streams": [x.bit_generator.state for x in streams],
    }
    with naming_the_file(path):
        write_arrays(path, arrays, header)


def read_index(path: Path, memory: int | None = None) -> IndexEngine:
    """Read the parts of an index, of at most ``memory`` bytes."""
    with naming_the_file(path):
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        arrays, header = read_arrays(path, kind=_KIND, version=_VERSION, memory=memory)
        for name, x in arrays.items():
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                raise ValueError(f"{name} has entries that are not finite")
        engine = _engine_of(arrays, header)
        check_sums(arrays, header)
        return engine


def _engine_of(arrays: dict[str, Array], header: dict[str, Any]) -> IndexEngine:
    mode = _MODES[header["mode"]](**header["options"])
    metric = MahalanobisMetric(arrays["factor"])
    eps, delta = (check_number(x, header[x], above=0) for x in ("eps", "delta"))
    promise = eps, delta
    engine = IndexEngine(metric, mode, promise, np.random.default_rng(0))
    engine.points = Points.of_arrays(_part(arrays, "points."))
    if header["mode"] in _SKETCHES:
        kind = _SKETCHES[header["mode"]]
        engine.sketch = kind.of_arrays(_part(arrays, "sketch."))
    for stream, state in zip(
        (engine.draws, engine.samples), header["streams"], strict=True
    ):
        stream.bit_generator.state = state
    engine.answered = check_integer("answered", header["answered"], least=0)
    engine.drawn_from = check_integer("drawn_from", header["drawn_from"], least=0)
    engine.picks = check_flag("picks", header["picks"])
    _check_shapes(engine)
    return engine


def _part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    found = {name: x for name, x in arrays.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): x for name, x in found.items()}


def _check_shapes(engine: IndexEngine) -> None:
    """Raise where the parts do not belong to one index."""
    points, (k, d) = engine.filled, engine.metric.shape
    n = points.size
    wanted = {
        "stats": (points.stats.shape, (3, n)),
        "numbers": (points.numbers.shape, (n,)),
        "center": (points.center.shape, (d,)),
        "rows": (points.rows.shape, (n, d)),
    }
    if points.steps is not None:
        wanted["steps"] = (points.steps.shape, (n,))
    if engine.sketch is not None:
        wanted["sketch"] = (engine.sketch.fits, (n, k))
    for name, (got, want) in wanted.items():
        if got != want:
            raise ValueError(f"{name} has shape {got}, expected {want}")
    known = points.slots("numbers", points.numbers)
    if not np.array_equal(known, np.arange(n)):
        raise ValueError("the numbers of the points contradict each other")
