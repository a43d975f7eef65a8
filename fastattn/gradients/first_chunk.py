"""How long the first chunk must be for the derivative of a causal low rank.

Landmarks serve queries; what a key gets is the slope of what they make of the key, and
errs by half of itself however many there are. But early rows, whose weights are large,
hold most of a causal derivative: where those are exact, the others may err by as much.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastattn._ops.gradient import softmax
from fastattn.gradients.exact import exact_vjp
from fastattn.gradients.lowrank_passes import whole_vjp
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.causal_chunks import cuts_of
from fastattn.problem.head import Head
from fastattn.problem.rows import gather_rows, row_mask
from sketching._lib.arrays import Array, device_of, to_host

# first chunks that are looked at: so many parts of all keys
_PARTS = 1 / 4, 3 / 8, 7 / 16, 1 / 2, 9 / 16, 5 / 8
# rows and keys of a pilot
_ROWS, _KEYS = 192, 4096
# strata of the rows, the first row after the first of them, and rows of each that are
# looked at, of no more logits than that
_STRATA, _EARLY, _EACH = 12, 16, 48
_LARGEST = 1 << 20


def first_chunk(
    head: Head, grad: Array, empty: LowRank, wanted: float, rng: np.random.Generator
) -> int | None:
    """Return the shortest first chunk beyond which a low rank may serve, if any does.

    Derivatives are predicted to have a relative error of at most ``wanted``.
    """
    prefix_lengths = to_host(head.prefix_lengths)
    seen = int(prefix_lengths[-1])
    parts = [cuts_of(seen)[1], *(int(part * seen) for part in _PARTS)]
    firsts = sorted({x for x in parts if x < seen})
    starts = np.searchsorted(prefix_lengths, firsts)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        shares = _shares(head, grad, starts, rng)
        lacking = _lacking(head, grad, empty, rng)
    met = (
        first
        for first, share in zip(firsts, shares, strict=True)
        if lacking * math.sqrt(share) <= wanted
    )
    return next(met, None)


def _lacking(
    head: Head, grad: Array, empty: LowRank, rng: np.random.Generator
) -> float:
    """The largest relative error of what a few rows make of some keys."""
    n, m, _, _ = head.sizes
    rows, keys = (
        np.sort(rng.choice(count, min(count, most), replace=False))
        for count, most in ((n, _ROWS), (m, _KEYS))
    )
    few = replace(
        head.with_rows(rows),
        key=gather_rows(head.key, keys),
        value=gather_rows(head.value, keys),
        prefix_lengths=None,
    )
    some, no_row = gather_rows(grad, rows), row_mask(rows[:0], few.query)
    found, state = whole_vjp(few, some, empty, no_row)
    exact_rows = np.flatnonzero(to_host(state.normalizer) == math.inf)
    found = state.with_exact(exact_rows).with_recomputed(found, exact_rows)
    truth = exact_vjp(few, some)
    errors = [
        float(np.linalg.norm(to_host(x) - to_host(y)) / np.linalg.norm(to_host(y)))
        for x, y in zip(found, truth, strict=True)
    ]
    # of what is not finite nothing is promised
    return max(x if math.isfinite(x) else math.inf for x in errors)


def _shares(
    head: Head, grad: Array, starts: Array, rng: np.random.Generator
) -> list[float]:
    """The shares of the squared derivative that rows from each start on hold."""
    n = head.sizes[0]
    edges = np.geomspace(min(_EARLY, n), n, _STRATA).astype(int)
    edges = np.unique([0, *edges, *starts])
    means = [_mean_square(head, grad, lo, hi, rng) for lo, hi in pairwise(edges)]
    sizes = np.diff(edges) * means
    total = float(sizes.sum())
    if not (total > 0 and math.isfinite(total)):
        return [math.inf] * len(starts)
    return [float(sizes[edges[:-1] >= start].sum()) / total for start in starts]


def _mean_square(
    head: Head, grad: Array, lo: int, hi: int, rng: np.random.Generator
) -> float:
    """Mean square of what a row between two makes the keys' derivatives."""
    xp, prefix_lengths = head.xp, to_host(head.prefix_lengths)
    each = max(1, min(_EACH, _LARGEST // max(int(prefix_lengths[hi - 1]), 1)))
    rows = np.sort(rng.integers(lo, hi, each))
    seen = max(int(prefix_lengths[rows[-1]]), 1)
    query, grad = (
        xp.astype(gather_rows(x, rows), grad.dtype) for x in (head.query, grad)
    )
    key, value = (xp.astype(x[:seen, :], grad.dtype) for x in (head.key, head.value))
    counts = xp.asarray(prefix_lengths[rows], device=device_of(query))
    number = xp.arange(seen, device=device_of(query))
    logits = head.scale * xp.matmul(query, xp.matrix_transpose(key))
    logits = xp.where(number[None, :] < counts[:, None], logits, -xp.inf)
    weights, _ = softmax(logits)
    change = xp.matmul(grad, xp.matrix_transpose(value))
    change = change - xp.sum(weights * change, axis=1, keepdims=True)
    squares = xp.sum((weights * change) ** 2, axis=1) * xp.sum(query**2, axis=1)
    return float(xp.mean(squares))
