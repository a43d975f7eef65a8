"""What a mode is asked: the parts of an index, and what was promised of them."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching.index.points import Points


@dataclass(frozen=True, slots=True)
class Request:
    """Points, metric and promise; for an answer the sketch and the queries as well."""

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
        # a platform that does not say
        return float("inf")
