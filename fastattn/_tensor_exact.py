"""Exact tensor attention with a bound on its rounding, and a check where that fails."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from fastattn._costs import exact_work, seconds
from fastattn._problem import Head, HeadAnswer, Plan
from fastattn._rounding import (
    EXP,
    deviation,
    gamma,
    largest_number,
    smallest_number,
    unit_roundoff,
)
from fastattn._sampling import FAILURE, certify_rows, relative, scaled_frobenius
from fastattn._tensor_extent import Extent
from fastattn._tensor_problem import TensorHead
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.certificate import RefusalError

# keys that a fast body sums before it adds to the running sums: least and most
_KEYS_A_BLOCK = (320, 1024)


def exact_plan(head: TensorHead, method: Any, reason: str = "asked for") -> Plan:
    """Say what exact tensor attention costs for this head."""
    return Plan(method, 0.0, seconds(exact_work(*head.sizes)), reason)


def solve_exact(
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
    plan: Plan,
) -> HeadAnswer:
    """Compute the head and bound the rounding, in float64 where float32 is too short.

    Raises
    ------
    RefusalError
        If no precision can promise ``tol``.
    """
    extent = Extent.of(head) if head.sizes[1] else None
    bounds = {}
    for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
        bound = bounds[dtype] = 0.0 if extent is None else rounding(head, extent, dtype)
        if guarantee == "proven":
            half = 0.0 if extent is None else extent.half
            if bound <= tol * half or (half == 0 and math.isfinite(bound)):
                value, normalizer = head.finish(*head.attend(dtype))
                source = f"exact tensor attention in {dtype}: a-priori rounding bound"
                return HeadAnswer(value, normalizer, bound, 0.0, "max", source, plan)
    if guarantee == "proven":
        raise RefusalError(
            f"tol={tol:g} cannot be proven: rounding in float64 is bounded by "
            f"{bound:.1e} where the half range of the products of values is {half:.1e}"
        )
    return _solve_sampled(head, tol, rng, plan, bounds[head.dtype])


def _solve_sampled(
    head: TensorHead, tol: float, rng: np.random.Generator, plan: Plan, bound: float
) -> HeadAnswer:
    value, normalizer = head.finish(*head.attend())
    error = relative_bound(head, bound, *scaled_frobenius(value))
    failure = 0.0
    source = f"exact tensor attention in {head.dtype}: a-priori rounding bound"
    if not error <= tol:
        # a tensor head has all that rows are certified by
        sampled = certify_rows(cast(Head, head), value, tol, rng)
        error, failure = sampled.upper, FAILURE
        source = f"exact tensor attention; {sampled.source}"
    if not error <= tol:
        raise RefusalError(
            f"tol={tol:g} is below what {head.dtype} holds for this head ({error:.1e}, "
            "infinite where logits or sums overflow): pass float64 arrays, a larger "
            "tol, or scale query, keys and values down"
        )
    norm = "relative-frobenius"
    return HeadAnswer(value, normalizer, error, failure, norm, source, plan)


def solve_bounded(
    head: TensorHead,
    tol: float,
    guarantee: str,
    plan: Plan,
    compute: Callable[[Any], tuple[Array, Array]],
    bound: Callable[[Any], float],
    half: float,
) -> HeadAnswer:
    """Compute a head in the least precision whose rounding bound meets ``tol``.

    ``compute`` and ``bound`` take a dtype; ``half`` is half the range of the products
    of values.

    Raises
    ------
    RefusalError
        If no precision can promise ``tol``.
    """
    for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
        error, norm = bound(dtype), "max"
        if math.isinf(error):
            continue
        if guarantee == "proven":
            if not (error <= tol * half or half == 0):
                continue
            value, normalizer = head.finish(*compute(dtype))
        else:
            value, normalizer = head.finish(*compute(dtype))
            error = relative_bound(head, error, *scaled_frobenius(value))
            norm = "relative-frobenius"
            if not error <= tol:
                continue
        source = f"{plan.method} in {dtype}: a-priori rounding bound"
        return HeadAnswer(value, normalizer, error, 0.0, norm, source, plan)
    what = (
        "the answer's norm" if guarantee == "sampled" else f"values within +-{half:.1e}"
    )
    raise RefusalError(
        f"tol={tol:g} cannot be met by {plan.method}: rounding in float64 is bounded "
        f"by {error:.1e}, next to {what}; raise tol or scale the inputs down"
    )


def relative_bound(head: TensorHead, bound: float, peak: float, norm: float) -> float:
    """Turn a bound on every entry into one relative to the answer's Frobenius norm.

    ``norm`` is that of the answer in units of ``peak``.
    """
    n, _, _, p = head.sizes
    if not math.isfinite(peak):
        return math.inf
    if peak == 0:
        # an answer of zeros: right if there are only zeros to average
        return 0.0 if bound == 0 else math.inf
    return relative(bound / peak * math.sqrt(n * p), norm)


def rounding(
    head: TensorHead, extent: Extent, dtype: Any, terms: int | None = None
) -> float:
    r"""Bound ``max |computed - exact|`` of nested attention in ``dtype``.

    As in pairwise attention a logit is off by :math:`\gamma_{d+k+2} + 4u` of the sum of
    its absolute terms and its weight by the exps of all blocks. A nested row enters
    twice, by its weights and by its log-sum-exp, at each of the ``k - 2`` levels; the
    log-sum-exp is stored, and weighed, with one more rounding of its size. Products
    and sums of values add their own, relative to the largest product. ``terms`` are
    added in ``dtype``; by default as many as the blocks of the longest factor have.
    """
    u, tiny = unit_roundoff(head.xp, dtype), smallest_number(head.xp, dtype)
    levels, d = head.order - 2, head.sizes[2]
    lengths = sorted(head.lengths)
    least, longest = _KEYS_A_BLOCK
    blocks = -(-lengths[-1] // least) if head.has_fast_body else 1
    if terms is None:
        terms = lengths[-1]
        if head.has_fast_body:
            terms = min(terms, longest) + 2 * blocks
    tuples = head.sizes[1]
    size = _size((head.query, *head.keys)) * (abs(head.scale) + 1)
    if not max(size, tuples * _size(head.values)) < largest_number(head.xp, dtype) / 4:
        return math.inf
    inner = (gamma(d + head.order + 2, u) + 4 * u) * extent.reach
    # what underflows on the way may be multiplied by all that comes after
    inner += EXP * (blocks + 1) * u + d * tiny * size
    sums = gamma(terms + 2, u) + 2 * u
    logarithm = 4 * u * (extent.reach + math.log(tuples) + 1)
    exponent = (2 * levels + 1) * inner + levels * (sums + logarithm + EXP * u)
    weights = math.expm1(exponent) if exponent < 1 else math.inf
    sums = (2 * sums + 4 * u) * (levels + 1)
    own = head.query.dtype
    out = unit_roundoff(head.xp, own) * extent.peak + smallest_number(head.xp, own)
    # an exp below the least normal number is cut off there
    cut = 4 * tuples * float(head.xp.finfo(dtype).smallest_normal)
    return (
        deviation(weights + cut, extent.half)
        + (sums + cut) * extent.peak
        + 2 * tuples * tiny
        + out
    )


def _size(arrays: tuple[Array, ...]) -> float:
    """Bound on products of an entry of each array, or of some of them."""
    xp = array_namespace(*arrays)
    return math.prod(max(1.0, float(xp.max(xp.abs(x)))) for x in arrays)
