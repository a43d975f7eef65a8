r"""Exact attention over keys that are read from a file in blocks.

Outputs over the blocks merge by their log-sum-exps in float64. If the log-sum-exp of
each block has an error of at most :math:`\eta`, the merged mean of numbers within a
range :math:`R` changes by at most :math:`R \tanh(\eta / 2)`; the output of each block
has the rounding error of ``Exact()``.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import (
    FAILURE,
    UNIFORM_MARGIN,
    RatioEstimate,
    relative,
)
from fastattn.certificates.rounding import (
    cut_weights,
    deviation,
    largest_number,
    largest_row,
    smallest_number,
    unit_roundoff,
)
from fastattn.certificates.sampled import TRUTH, lost_norm, scaled_frobenius, statement
from fastattn.methods.exact import Exact, sums_error, weights_error
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import empty_partial, merge_partials
from fastattn.problem.plan import Task
from fastattn.streaming.rows import FileHead, Put, Step
from sketching._lib.arrays import Array, compute_dtype
from sketching._lib.certificate import Certificate, RefusalError

# rows that are compared with float64
_ROWS = 8
# rounding errors, in float64, of one merge
_ROUNDINGS = 32


@dataclass(frozen=True, slots=True)
class HeadBounds:
    """Largest norms of scaled queries and keys, half range and peak of the values."""

    query_norm: float
    key_norm: float
    half: float
    peak: float


def measure(head: FileHead, step: Step) -> HeadBounds:
    """Read all rows once."""
    query_norm = key_norm = peak = 0.0
    low, high = np.full((2, head.sizes[3]), np.inf) * [[1], [-1]]
    for _, query in head.each_block():
        query_norm = max(query_norm, largest_row(query))
    for key, value in head.each_key_block():
        key_norm = max(key_norm, largest_row(key))
        low = np.minimum(low, value.min(axis=0))
        high = np.maximum(high, value.max(axis=0))
        step(1 / head.n_key_blocks)
    peak = float(max(-low.min(), high.max()))
    # halve first: the range of large numbers may overflow
    half = float((high / 2 - low / 2).max())
    return HeadBounds(abs(head.scale) * query_norm, key_norm, half, peak)


def rounding_bound(head: FileHead, bounds: HeadBounds, dtype: Any) -> float:
    """Bound ``max |computed - exact|`` of streamed attention in ``dtype``."""
    _, m, d, _ = head.sizes
    u, tiny = unit_roundoff(np, dtype), smallest_number(np, dtype)
    size = min(m, head.key_block)
    if size * bounds.peak > largest_number(np, dtype) / 4:
        return math.inf
    norms = bounds.query_norm, bounds.key_norm
    sums = sums_error(size, u, is_fast=True)
    weights = weights_error(size, d, *norms, np, dtype, is_fast=True)
    if not weights + sums < 1:
        return math.inf
    merges = _ROUNDINGS * (head.n_key_blocks + 1) * unit_roundoff(np, np.float64)
    exponent = norms[0] * norms[1] + math.log(m)
    eta = -math.log1p(-weights - sums) + 4 * u * (exponent + 1) + merges
    moved = 2 * bounds.half * math.tanh(eta / 2)
    cut = cut_weights(np, dtype, m)
    own = deviation(weights + cut, bounds.half) + (sums + cut) * bounds.peak
    own += 2 * size * tiny
    given = head.query.dtype
    out = unit_roundoff(np, given) * bounds.peak + smallest_number(np, given)
    return own + moved + merges * bounds.peak + out


def stream_exactly(
    head: FileHead,
    query: Array,
    dtype: Any,
    block: int | None = None,
    step: Step = lambda _: None,
) -> tuple[Array, Array]:
    """Answer queries over all keys, block by block; the answer is in float64."""
    found = empty_partial(len(query), head.sizes[3])
    for key, value in head.each_key_block():
        part, logarithm = Head(query, key, value, head.scale).attend(dtype, block)
        # an overflow leaves infinities or NaN in the answer
        with np.errstate(over="ignore", invalid="ignore"):
            found = merge_partials(
                found, (part.astype(np.float64), logarithm.astype(np.float64))
            )
        step(1 / head.n_key_blocks)
    return found


def rounded(head: FileHead, value: Array, logarithm: Array) -> tuple[Array, Array]:
    """Round an answer to the dtype of the query, log-sum-exps to the working dtype."""
    dtype = head.query.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        return (
            value.astype(dtype, copy=False),
            logarithm.astype(compute_dtype(np, dtype), copy=False),
        )


def solve_exactly(
    task: Task[FileHead], method: Exact, put: Put, step: Step
) -> Certificate:
    """Answer all queries and bound the rounding, as ``Exact()`` does."""
    head, tol, guarantee, rng = task
    blocks = -(-head.sizes[0] // head.block)

    def step_of_all(share: float) -> None:
        step(share / (blocks + 1))

    bounds = measure(head, step_of_all)
    dtype, error = compute_dtype(np, head.query.dtype), math.nan
    if guarantee == "proven":
        dtype, error = _proven(head, bounds, tol)
    n, _, _, p = head.sizes
    rows = np.sort(rng.choice(n, min(n, _ROWS), replace=False))
    answer = _attend(head, rows, dtype, method.block, put, step_of_all)
    source = (
        f"exact attention in {np.dtype(dtype)}, streamed in {head.n_key_blocks} "
        "blocks: a-priori rounding bound"
    )
    if guarantee == "proven":
        return Certificate(error, 0.0, "max", source)
    if math.isfinite(answer.peak):
        bound, root = rounding_bound(head, bounds, dtype), math.sqrt(n * p)
        error = bound
        if answer.peak:
            error = relative(bound / answer.peak * root, answer.norm)
        if error <= tol:
            return Certificate(error, 0.0, "relative-frobenius", source)
    return _sampled(head, rows, answer, bounds.peak, tol)


def _proven(head: FileHead, bounds: HeadBounds, tol: float) -> tuple[Any, float]:
    """The dtype whose proven bound meets the tolerance, and that bound."""
    own = compute_dtype(np, head.query.dtype)
    for dtype in dict.fromkeys([own, np.float64]):
        bound = rounding_bound(head, bounds, dtype)
        if bound <= tol * bounds.half or (bounds.half == 0 and math.isfinite(bound)):
            return dtype, bound
    raise RefusalError(
        f"tol={tol:g} cannot be proven: rounding in float64 is bounded by {bound:.1e} "
        f"where the half range of the values is {bounds.half:.1e}"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """Norm of an answer, its largest log-sum-exp, and the sampled rows."""

    peak: float
    norm: float
    exponent: float
    rows: Array


def _attend(
    head: FileHead,
    rows: Array,
    dtype: Any,
    block: int | None,
    put: Put,
    step: Step,
) -> _Answer:
    """Answer all queries, block by block."""
    peak = norm = exponent = 0.0
    sampled = []
    for start, query in head.each_block():
        found = stream_exactly(head, query, dtype, block, step)
        value, logarithm = rounded(head, *found)
        put(start, value, logarithm)
        own = (rows >= start) & (rows < start + len(query))
        sampled.append(value[rows[own] - start])
        exponent = max(exponent, float(np.abs(logarithm).max()))
        with np.errstate(invalid="ignore"):
            unit, size = scaled_frobenius(value.astype(np.float64))
        if not math.isfinite(unit):
            peak = math.inf
        elif unit > peak:
            peak, norm = unit, math.hypot(norm * peak / unit, size)
        elif unit:
            norm = math.hypot(norm, size * unit / peak)
    return _Answer(peak, norm, exponent, np.concatenate(sampled))


def _sampled(
    head: FileHead, rows: Array, answer: _Answer, values: float, tol: float
) -> Certificate:
    """Compare some rows with float64, in another pass over the keys."""
    n, own = head.sizes[0], head.query.dtype
    dtype = compute_dtype(np, own)
    squares = np.full(len(rows), np.inf)
    if math.isfinite(answer.peak):
        truth, _ = stream_exactly(head, head.query.take(rows), np.float64)
        squares = ((answer.rows - truth) / (answer.peak or 1.0)) ** 2
        squares = squares.sum(axis=1)
    if not np.isfinite(squares).all():
        raise RefusalError(
            f"tol={tol:g} cannot be met: logits or sums overflow {dtype}; scale query, "
            "key or value down or pass float64 arrays"
        )
    rounding = TRUTH * np.finfo(dtype).eps * (1 + answer.exponent)
    rounding += np.finfo(own).eps / 2
    lost = lost_norm(np, dtype, own, head.sizes, values, answer.peak)
    found = statement(
        RatioEstimate(squares, n),
        UNIFORM_MARGIN,
        FAILURE,
        answer.norm,
        rounding=float(rounding),
        lost=lost,
    )
    if found.upper > tol:
        raise RefusalError(
            f"tol={tol:g} is below what {dtype} holds for this head "
            f"({found.upper:.1e}): pass float64 arrays or a larger tol"
        )
    source = f"exact attention, streamed in {head.n_key_blocks} blocks; {found.source}"
    return Certificate(found.upper, FAILURE, "relative-frobenius", source)
