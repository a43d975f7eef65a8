"""Rows of 16-bit integers, with one scale for each row.

The error of a number is at most half a step, and a step is 1/32767 of the largest of
its row: for usual row lengths eight to a hundred times smaller than that of a 16-bit
float.
"""

import numpy as np

from sketching._lib.arrays import Array

# steps from zero to the largest number of a row
STEPS = 32767


def halved(rows: Array) -> tuple[Array, Array]:
    """Round rows, ``(..., n, m)``, to integers; return them and the steps of rows."""
    largest = np.maximum(rows.max(axis=-1), -rows.min(axis=-1))
    # so that no row is divided by zero, and no step is rounded to it
    tiny = float(np.finfo(np.float32).tiny)
    steps = np.maximum(largest / STEPS, tiny).astype(np.float32)
    scaled = rows / steps[..., None]
    np.rint(scaled, out=scaled)
    # with a step that was rounded down, the largest number exceeds the integers
    return np.clip(scaled, -STEPS, STEPS, out=scaled).astype(np.int16), steps


def widened(codes: Array, steps: Array) -> Array:
    """Rows of single precision again."""
    return codes.astype(np.float32) * steps[..., None]


def int16_steps(rows: Array, largest: Array) -> tuple[Array, Array]:
    """Round rows to integers, in steps that are multiples of a float32's spacing.

    ``largest``, ``(n,)``, bounds the numbers of a row and those that are added to it
    later. Their sums with multiples of the spacing are then exact in float32.
    """
    spacing = np.spacing(largest.astype(np.float32)).astype(np.float64)
    top = np.maximum(np.abs(rows).max(axis=1), float(np.finfo(np.float32).tiny))
    steps = (np.ceil(top / STEPS / spacing) * spacing).astype(np.float32)
    codes = np.rint(rows / steps[:, None])
    return np.clip(codes, -STEPS, STEPS, out=codes).astype(np.int16), steps
