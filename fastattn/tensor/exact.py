"""Exact tensor attention: a bound on its rounding error, or else sampled rows."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

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
from fastattn.costs.work import exact_work
from fastattn.problem.plan import HeadAnswer, Plan
from fastattn.tensor.overflow import in_range, lost_of_products, lost_products, size_of
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# bound on the relative rounding error of norms
_SLACK = 1e-2
# least and largest number of keys that a kernel sums before it adds to running sums
_KEYS_A_BLOCK = (320, 1024)


def exact_plan(head: TensorHead, method: Any, reason: str = "requested") -> Plan:
    """The plan of exact tensor attention for this head, with its cost."""
    return Plan(method, 0.0, exact_work(*head.sizes), reason)


def solve_exact(
    head: TensorHead,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
    plan: Plan,
) -> HeadAnswer:
    """Compute the head and certify it, in float64 where float32 is not sufficient.

    Raises
    ------
    RefusalError
        If no precision meets ``tol``.
    """
    if head.sizes[1] == 0:
        return _no_tuples(head, guarantee, plan)
    if guarantee == "proven":
        name, bound = "exact tensor attention", partial(rounding, head)
        return solve_bounded(head, tol, guarantee, plan, head.attend, bound, name=name)
    dtype = head.dtype
    # the log-sum-exps are returned in the dtype of the head, and must be in its range
    fits = head.logit_bounds.logit_bound < largest_number(head.xp, dtype) / 4
    if fits and not in_range(head, dtype):
        dtype = head.xp.float64
    return _solve_sampled(head, tol, rng, plan, dtype)


def _no_tuples(head: TensorHead, guarantee: str, plan: Plan) -> HeadAnswer:
    """Zeros, where there is no tuple to attend to."""
    norm = "max" if guarantee == "proven" else "relative-frobenius"
    source = "exact tensor attention: there is no tuple"
    return HeadAnswer(*head.finish(*head.attend()), 0.0, 0.0, norm, source, plan)


def _solve_sampled(
    head: TensorHead,
    tol: float,
    rng: np.random.Generator,
    plan: Plan,
    dtype: Any,
) -> HeadAnswer:
    """Certify by the bound on the rounding error, or by sampled rows in float64."""
    # the float64 rows of a sample have the rounding error of their weights
    own, bound = 2 * weights_error(head, head.xp.float64), rounding(head, dtype)
    # twice: outputs may exceed all products of values by their rounding error
    if own > tol and bound > 2 * tol * head.logit_bounds.peak:
        raise _refusal(head, tol, own)
    value, normalizer = head.finish(*head.attend(dtype))
    error = relative_bound(head, bound, value)
    failure = 0.0
    source = f"exact tensor attention in {_name(dtype)}: a-priori rounding bound"
    if not error <= tol:
        sampled = certify_rows(head, value, tol, rng)
        # they may underflow, too
        own += lost_products(head, dtype, scaled_frobenius(value))
        error, failure = sampled.upper + own, FAILURE
        source = f"exact tensor attention; {sampled.source}"
    if not error <= tol:
        raise _refusal(head, tol, error)
    norm = "relative-frobenius"
    return HeadAnswer(value, normalizer, error, failure, norm, source, plan)


def _refusal(head: TensorHead, tol: float, error: float) -> RefusalError:
    return RefusalError(
        f"tol={tol:g} is below what {_name(head.dtype)} holds for this head "
        f"({error:.1e}, infinite where logits or sums overflow, or the answer "
        "underflows): pass float64 arrays, a larger tol, or scale query, keys and "
        "values"
    )


def solve_bounded(
    head: TensorHead,
    tol: float,
    guarantee: str,
    plan: Plan,
    compute: Callable[[Any], tuple[Array, Array]],
    bound: Callable[[Any], float],
    *,
    name: str = "",
) -> HeadAnswer:
    """Compute a head in the least precision whose rounding bound meets ``tol``.

    ``compute`` and ``bound`` take a dtype; of the head only the query and the values
    are used. ``name`` is that of the method in the certificate.

    Raises
    ------
    RefusalError
        If no precision meets ``tol``.
    """
    for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
        error, norm = bound(dtype), "max"
        if math.isinf(error):
            continue
        if guarantee == "proven":
            error = stored(head, error)
            if not _meets(head, error, tol):
                continue
            value, normalizer = head.finish(*compute(dtype))
        else:
            value, normalizer = head.finish(*compute(dtype))
            error = relative_bound(head, error, value)
            norm = "relative-frobenius"
            if not error <= tol:
                continue
        source = f"{name or plan.method} in {_name(dtype)}: a-priori rounding bound"
        return HeadAnswer(value, normalizer, error, 0.0, norm, source, plan)
    verb, what = f"met by {plan.method}", "the answer's norm"
    if guarantee == "proven":
        verb, what = "proven", f"values within +-{head.logit_bounds.half:.1e}"
    raise RefusalError(
        f"tol={tol:g} cannot be {verb}: rounding in float64 is bounded by {error:.1e}, "
        f"next to {what}; raise tol or scale the inputs down"
    )


def _meets(head: TensorHead, bound: float, tol: float) -> bool:
    """Whether a proven bound meets the tolerance, which is void for equal values."""
    half = head.logit_bounds.half
    return bound <= tol * half or (half == 0 and bound < math.inf)


def _name(dtype: Any) -> str:
    """The name of a dtype of an array library."""
    return str(dtype).rpartition(".")[2].strip("'>")


def stored(head: TensorHead, error: float) -> float:
    """Add to ``error`` the rounding of outputs to the dtype of the query."""
    return once_stored(head.xp, head.query.dtype, head.logit_bounds.peak, error)


def relative_bound(head: TensorHead, bound: float, value: Array) -> float:
    """Turn a bound on every entry into one relative to the answer's Frobenius norm.

    ``bound`` is about the numbers before they were rounded to the dtype of ``value``.
    """
    n, _, _, p = head.sizes
    size = scaled_frobenius(value)
    if bound > 0 or size[0] > 0:
        bound += smallest_number(head.xp, head.query.dtype)
    # the rounding error of a stored number is relative to it, not to the largest
    own = unit_roundoff(head.xp, head.query.dtype) * (1 + _SLACK)
    return relative_of_max(bound, size, n * p, own)


def rounding(
    head: TensorHead, dtype: Any, terms: int | None = None, extra: float = 0.0
) -> float:
    r"""Bound ``max |computed - exact|`` of nested attention in ``dtype``.

    The weights of a row have the relative error :func:`weights_error`. Products and
    sums of values add errors relative to the largest product. ``terms`` is the number
    of terms of the sums in ``dtype``; by default that of the blocks of the longest
    factor. ``extra`` is added to the bound on the logits.
    """
    logit_bounds = head.logit_bounds
    if not in_range(head, dtype):
        return math.inf
    if logit_bounds.peak == 0:
        return 0.0
    tuples, levels = head.sizes[1], head.order - 2
    sums, _ = _sums_error(head, dtype, terms)
    sums = (2 * sums + 4 * unit_roundoff(head.xp, dtype)) * (levels + 1)
    cut = cut_weights(head.xp, dtype, tuples)
    weights = weights_error(head, dtype, terms, extra)
    return (
        mean_deviation(weights + cut, logit_bounds.half)
        + (sums + cut) * logit_bounds.peak
        + lost_of_products(head, dtype)
    )


def weights_error(
    head: TensorHead, dtype: Any, terms: int | None = None, extra: float = 0.0
) -> float:
    r"""Bound the relative error of the weights of nested attention in ``dtype``.

    As in pairwise attention, a logit has an error of :math:`\gamma_{d+k+2} + 4u` times
    the sum of its absolute terms, and a weight that of the exponentials of all blocks,
    where :math:`k` is the order and :math:`u` the unit roundoff. At each of the
    :math:`k - 2` levels of nesting a row contributes the errors of its weights and of
    its log-sum-exp, which is rounded once more when it is stored.
    """
    u, tiny = unit_roundoff(head.xp, dtype), smallest_number(head.xp, dtype)
    levels, d = head.order - 2, head.sizes[2]
    sums, blocks = _sums_error(head, dtype, terms)
    size = size_of(head.logit_bounds.largest, head.scale)
    logit_bound = head.logit_bounds.logit_bound + extra
    inner = (gamma(d + head.order + 2, u) + 4 * u) * logit_bound
    # a partial product that underflows may be multiplied by large factors later
    inner += EXP * (blocks + 1) * u + d * tiny * size
    logarithm = 4 * u * (logit_bound + math.log(head.sizes[1]) + 1)
    exponent = (2 * levels + 1) * inner + levels * (sums + logarithm + EXP * u)
    return math.expm1(exponent) if exponent < 1 else math.inf


def _sums_error(head: TensorHead, dtype: Any, terms: int | None) -> tuple[float, int]:
    """Relative error of sums of ``terms`` terms, and the number of blocks of keys."""
    u, most = unit_roundoff(head.xp, dtype), max(head.lengths)
    least, longest = _KEYS_A_BLOCK
    blocks = -(-most // least) if head.has_fast_kernel else 1
    if terms is None:
        terms = min(most, longest) + 2 * blocks if head.has_fast_kernel else most
    return gamma(terms + 2, u) + 2 * u, blocks
