"""The arguments of a mode: the parts of an index, eps and delta."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching.index.points import Points


@dataclass(frozen=True, slots=True)
class Request:
    """Points, metric, eps and delta; for an answer also the sketch and the queries."""

    points: Points
    factor: Array
    eps: float
    delta: float
    rng: np.random.Generator
    sketch: Any = None
    queries: Any = None


def half_of_memory() -> float:
    """Half of the machine's memory, in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (ValueError, OSError, AttributeError):
        # the platform does not tell
        return float("inf")
