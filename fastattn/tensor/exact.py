"""Exact tensor attention with a bound on its rounding, and a check where that fails."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from fastattn.certificates.apriori import relative_of_max
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.rounding import (
    EXP,
    cut_weights,
    gamma,
    largest_number,
    mean_deviation,
    once_stored,
    smallest_number,
    unit_roundoff,
)
from fastattn.certificates.sampled import certify_rows, scaled_frobenius
from fastattn.costs.work import exact_work, seconds
from fastattn.problem.head import Head
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.tensor.logit_bounds import LogitBounds, in_range, size_of
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# norms of rounded numbers are off by less than this
_SLACK = 1e-2
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
    if head.sizes[1] == 0:
        return _nothing(head, guarantee, plan)
    logit_bounds = LogitBounds.of(head)
    bounds = {}
    for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
        bound = bounds[dtype] = rounding(head, logit_bounds, dtype)
        if guarantee == "proven":
            bound = stored(head, logit_bounds.peak, bound)
            if bound <= tol * logit_bounds.half or _is_constant(logit_bounds, bound):
                value, normalizer = head.finish(*head.attend(dtype))
                source = (
                    f"exact tensor attention in {_name(dtype)}: a-priori rounding bound"
                )
                return HeadAnswer(value, normalizer, bound, 0.0, "max", source, plan)
    if guarantee == "proven":
        raise RefusalError(
            f"tol={tol:g} cannot be proven: rounding in float64 is bounded by "
            f"{bound:.1e} where the half range of the products of values is "
            f"{logit_bounds.half:.1e}"
        )
    dtype = head.dtype
    # the log-sum-exps are returned in it, and must fit
    if logit_bounds.logit_bound < largest_number(head.xp, dtype) / 4 and not in_range(
        head, dtype
    ):
        dtype = head.xp.float64
    return _solve_sampled(head, tol, rng, plan, dtype, bounds[dtype])


def _nothing(head: TensorHead, guarantee: str, plan: Plan) -> HeadAnswer:
    """Zeros, where there is no tuple to see."""
    norm = "max" if guarantee == "proven" else "relative-frobenius"
    source = "exact tensor attention: there is no tuple"
    return HeadAnswer(*head.finish(*head.attend()), 0.0, 0.0, norm, source, plan)


def _solve_sampled(
    head: TensorHead,
    tol: float,
    rng: np.random.Generator,
    plan: Plan,
    dtype: Any,
    bound: float,
) -> HeadAnswer:
    """Certify by the bound on the rounding, or by rows in float64."""
    value, normalizer = head.finish(*head.attend(dtype))
    error = relative_bound(head, bound, value)
    failure = 0.0
    source = f"exact tensor attention in {_name(dtype)}: a-priori rounding bound"
    if not error <= tol:
        # a tensor head has all that rows are certified by
        sampled = certify_rows(cast(Head, head), value, tol, rng)
        error, failure = sampled.upper, FAILURE
        source = f"exact tensor attention; {sampled.source}"
    if not error <= tol:
        raise RefusalError(
            f"tol={tol:g} is below what {_name(head.dtype)} holds for this head "
            f"({error:.1e}, infinite where logits or sums overflow, or the answer "
            "underflows): pass float64 arrays, a larger tol, or scale query, keys and "
            "values"
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
    logit_bounds: LogitBounds,
) -> HeadAnswer:
    """Compute a head in the least precision whose rounding bound meets ``tol``.

    ``compute`` and ``bound`` take a dtype; the extent of the values is what counts.

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
            error = stored(head, logit_bounds.peak, error)
            if not (
                error <= tol * logit_bounds.half or _is_constant(logit_bounds, error)
            ):
                continue
            value, normalizer = head.finish(*compute(dtype))
        else:
            value, normalizer = head.finish(*compute(dtype))
            error = relative_bound(head, error, value)
            norm = "relative-frobenius"
            if not error <= tol:
                continue
        source = f"{plan.method} in {_name(dtype)}: a-priori rounding bound"
        return HeadAnswer(value, normalizer, error, 0.0, norm, source, plan)
    what = (
        "the answer's norm"
        if guarantee == "sampled"
        else f"values within +-{logit_bounds.half:.1e}"
    )
    raise RefusalError(
        f"tol={tol:g} cannot be met by {plan.method}: rounding in float64 is bounded "
        f"by {error:.1e}, next to {what}; raise tol or scale the inputs down"
    )


def _is_constant(logit_bounds: LogitBounds, bound: float) -> bool:
    """Whether no tolerance is asked for: there is one product of values only."""
    return logit_bounds.half == 0 and bound < math.inf


def _name(dtype: Any) -> str:
    """The name of a dtype of any library."""
    return str(dtype).rpartition(".")[2].strip("'>")


def stored(head: TensorHead, peak: float, error: float) -> float:
    """Bound an ``error`` of numbers up to ``peak`` in the dtype of the query."""
    return once_stored(head.xp, head.query.dtype, peak, error)


def relative_bound(head: TensorHead, bound: float, value: Array) -> float:
    """Turn a bound on every entry into one relative to the answer's Frobenius norm.

    What is bounded was computed before it was stored in ``value``.
    """
    n, _, _, p = head.sizes
    size = scaled_frobenius(value)
    if bound > 0 or size[0] > 0:
        bound += smallest_number(head.xp, head.query.dtype)
    # a stored number is off by its own size, not by the largest there is
    own = unit_roundoff(head.xp, head.query.dtype) * (1 + _SLACK)
    return relative_of_max(bound, size, n * p, own)


def rounding(
    head: TensorHead, logit_bounds: LogitBounds, dtype: Any, terms: int | None = None
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
    blocks = -(-lengths[-1] // least) if head.has_fast_kernel else 1
    if terms is None:
        terms = lengths[-1]
        if head.has_fast_kernel:
            terms = min(terms, longest) + 2 * blocks
    if not in_range(head, dtype):
        return math.inf
    if logit_bounds.peak == 0:
        return 0.0
    tuples, size = head.sizes[1], size_of((head.query, *head.keys), head.scale)
    inner = (gamma(d + head.order + 2, u) + 4 * u) * logit_bounds.logit_bound
    # what underflows on the way may be multiplied by all that comes after
    inner += EXP * (blocks + 1) * u + d * tiny * size
    sums = gamma(terms + 2, u) + 2 * u
    logarithm = 4 * u * (logit_bounds.logit_bound + math.log(tuples) + 1)
    exponent = (2 * levels + 1) * inner + levels * (sums + logarithm + EXP * u)
    weights = math.expm1(exponent) if exponent < 1 else math.inf
    sums = (2 * sums + 4 * u) * (levels + 1)
    cut = cut_weights(head.xp, dtype, tuples)
    return (
        mean_deviation(weights + cut, logit_bounds.half)
        + (sums + cut) * logit_bounds.peak
        + 2 * tuples * tiny * size_of(head.values)
    )
