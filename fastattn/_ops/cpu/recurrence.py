"""Recurrences of polynomials for many rows at once, and energies of rows."""

from typing import NamedTuple

import numpy as np

from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE


class Recurrence(NamedTuple):
    """The parents of polynomials, their parents, and the factors of both."""

    parent: np.ndarray
    grandparent: np.ndarray
    coordinate: np.ndarray
    factor: np.ndarray
    lower: np.ndarray

    @staticmethod
    def of(parent, coordinate, power, dtype, *, hermite):
        """Polynomials with the norm one: Hermite polynomials, or plain powers."""
        back = np.sqrt((power - 1) / power) if hermite else np.zeros(len(parent))
        factor = (1 / np.sqrt(power)).astype(dtype)
        return Recurrence(
            parent, parent[parent], coordinate, factor, back.astype(dtype)
        )


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def add_polynomials(x, recurrence, features):
    # each from its parent, and for Hermite polynomials that one's parent
    parent, grandparent, coordinate, factor, lower = recurrence
    for j in range(1, parent.size):
        row, source, side = features[j], features[parent[j]], x[coordinate[j]]
        w = factor[j]
        for i in range(row.size):
            row[i] = source[i] * side[i] * w
        if lower[j] != 0:
            back, v = features[grandparent[j]], lower[j]
            for i in range(row.size):
                row[i] -= v * back[i]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def energies(x, spread):
    # of columns: their squares, weighted by the spread of each coordinate
    energy = np.zeros(x.shape[1], dtype=x.dtype)
    for l in range(spread.size):
        for i in range(x.shape[1]):
            energy[i] += spread[l] * x[l, i] * x[l, i]
    return energy
