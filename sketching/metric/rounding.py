"""Rounding errors of sums of products, as a bound that is rarely exceeded."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# rounding errors are modelled as independent with mean zero: a sum of products then
# exceeds so many deviations with at most this probability (Higham and Mary,
# A new approach to probabilistic rounding error analysis, 2019, theorem 3.1)
_DEVIATIONS = 8.0
UNLIKELY = 2 * math.exp(-(_DEVIATIONS**2) / 2)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding errors of sums of products, and distances that stay accurate."""

    unit: float
    tolerance: float

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(dtype: Any, d: int) -> "Rounding":
        """For products of ``d`` terms."""
        eps = float(np.finfo(dtype).eps)
        unit = eps / 2 * _DEVIATIONS * (1 + math.sqrt(d))
        return Rounding(unit, 4 * math.sqrt(eps / 2))
