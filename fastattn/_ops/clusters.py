"""Partitions of rows into clusters: by bisection, and by one round of k-means.

A partition is ``order``, the numbers of the rows part after part, and ``start``, a
NumPy array on every device: part ``c`` is ``order[start[c] : start[c + 1]]``.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from sketching._lib.arrays import Array, array_namespace, device_of, to_host
from sketching._lib.op import op

# rows that the direction of a cut is found from, at least
SAMPLE = 128
# steps of the power iteration that finds it
STEPS = 4
_BLOCK = 1024


@op("cpu")
def partition(x: Array, *, parts: int, least: int, most: int) -> tuple[Array, Any]:
    """Halve the widest part until there are ``parts``, and until none is too long.

    A part is cut across its leading principal direction, at its mean; where a half
    would have fewer than ``least`` rows, it gets so many. The widest part is the one
    with the largest sum of squared deviations; parts of more than ``most`` rows are
    cut first. Parts of fewer than ``2 * least`` rows are not cut, so that fewer parts
    may come out. ``x`` is ``(n, d)``.
    """
    xp = array_namespace(x)
    pieces = [xp.arange(x.shape[0], device=device_of(x))]
    found = [_direction(x, pieces[0])]
    while True:
        sizes = [piece.shape[0] for piece in pieces]
        able = [i for i, size in enumerate(sizes) if size >= 2 * least]
        long = [i for i in able if sizes[i] > most]
        able = long or (able if len(pieces) < parts else [])
        if not able:
            break
        widest = max(able, key=lambda i: found[i][0])
        halves = _split(x, pieces[widest], *found[widest][1:], least)
        pieces[widest : widest + 1] = halves
        found[widest : widest + 1] = [_direction(x, half) for half in halves]
    return xp.concat(pieces), np.cumsum([0, *sizes])


@op("cpu", "gpu")
def regroup(x: Array, order: Array, *, start: Any) -> tuple[Array, Any]:
    """Assign each row to the part with the nearest mean: one round of k-means.

    Empty parts are dropped; rows keep their order within a part.
    """
    xp = array_namespace(x)
    spans = list(pairwise(start))
    mean = xp.stack([xp.mean(_rows(x, order[lo:hi]), axis=0) for lo, hi in spans])
    half = xp.sum(mean**2, axis=1) / 2
    labels = []
    for lo in range(0, x.shape[0], _BLOCK):
        block = x[lo : min(lo + _BLOCK, x.shape[0]), :]
        product = xp.matmul(block, xp.matrix_transpose(mean))
        labels.append(xp.argmax(product - half, axis=1))
    label = xp.concat(labels)
    counts = np.bincount(to_host(label), minlength=len(spans))
    order = xp.argsort(label, stable=True)
    return order, np.cumsum([0, *counts[counts > 0]])


def _rows(x: Array, numbers: Array) -> Array:
    return array_namespace(x).take(x, numbers, axis=0)


def _direction(x: Array, piece: Array) -> tuple[float, Array, Array]:
    """Sum of squares, mean and principal direction of rows, estimated on a few."""
    xp = array_namespace(x)
    size = piece.shape[0]
    few = _rows(x, piece[:: max(1, size // SAMPLE)])
    mean = xp.mean(few, axis=0)
    few = few - mean
    length = xp.sum(few**2, axis=1)
    # from the farthest row on, the power iteration needs few steps
    w = few[int(xp.argmax(length)), :]
    for _ in range(STEPS):
        w = xp.matmul(xp.matmul(few, w), few)
        w = w / (xp.sqrt(xp.sum(w**2)) + xp.finfo(x.dtype).smallest_normal)
    # the half that has the first row comes first
    w = -w if float(xp.sum(few[0, :] * w)) > 0 else w
    return float(xp.mean(length)) * size, mean, w


def _split(
    x: Array, piece: Array, mean: Array, direction: Array, least: int
) -> tuple[Array, Array]:
    """Cut rows in two across a direction."""
    xp, size = array_namespace(x), piece.shape[0]
    place = xp.matmul(_rows(x, piece) - mean, direction)
    below = place < 0
    count = int(xp.count_nonzero(below))
    if least <= count <= size - least:
        return piece[below], piece[xp.logical_not(below)]
    rank = xp.argsort(place, stable=True)
    cut = min(max(count, least), size - least)
    return xp.take(piece, rank[:cut]), xp.take(piece, rank[cut:])
