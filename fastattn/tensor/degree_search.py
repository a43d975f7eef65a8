"""The least degree that meets a tolerance on a sample of one tensor head."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastattn.certificates.sampled import FLOAT64_BELOW, scaled_frobenius
from fastattn.costs.policy import POLICY
from fastattn.methods.polynomial.expansions import (
    LARGEST_BOUND,
    LARGEST_DEGREE,
    least_degree,
    rank_of,
)
from fastattn.methods.polynomial.method import Polynomial
from fastattn.methods.polynomial.polynomial_expansion import (
    LARGEST_RANK,
    check_rank,
    coefficients_of,
)
from fastattn.methods.polynomial.proven_degree import NARROWEST
from fastattn.problem.head import gather_rows
from fastattn.tensor.logit_bounds import LogitBounds
from fastattn.tensor.polynomial import (
    TensorPolynomialExpansion,
    bounded_expansion,
    index_set,
    shifted,
)
from fastattn.tensor.problem import TensorHead
from fastattn.tensor.sampled import certify_tuples, furthest_rows, row_work
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError


def apriori_expansion(head: TensorHead, tol: float) -> TensorPolynomialExpansion | None:
    """Find the least degree whose proven bound meets a relative tolerance.

    None where it is no cheaper than the exact rows of a sampled certificate. The norm
    of the output, to which the bound is relative, is that of a polynomial of degree 1.
    """
    logit_bounds = head.logit_bounds
    bound, d = max(logit_bounds.bound, NARROWEST), head.sizes[2]
    if not (bound <= LARGEST_BOUND and 0 < logit_bounds.half < math.inf):
        return None
    linear = bounded_expansion(head, 1, None, head.dtype)
    value, _, reliable = linear.answer(head)
    peak, norm = scaled_frobenius(value)
    if not (bool(head.xp.all(reliable)) and 0 < peak < math.inf):
        return None
    wanted = (
        POLICY.tensor.sure
        * tol
        / (1 + tol)
        * norm
        * peak
        / math.sqrt(math.prod(value.shape))
    )
    first = least_degree(bound, wanted / (logit_bounds.half + wanted))
    if first is None:
        return None
    for degree in range(first, min(first + 2, LARGEST_DEGREE) + 1):
        if rank_of(d, degree) > LARGEST_RANK:
            return None
        for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
            expansion = bounded_expansion(head, degree, None, dtype)
            if expansion.plan(head, "").work > row_work(head):
                return None
            if expansion.bound <= wanted:
                return expansion
    return None


def sampled_expansion(
    head: TensorHead, method: Polynomial, tol: float, rng: np.random.Generator
) -> TensorPolynomialExpansion:
    """Choose the degree or rank that ``method`` does not give, by a sample.

    Raises
    ------
    RefusalError
        If the interval of sampled logits is too wide, or there are too many monomials.
    """
    logit_bounds = whole = head.logit_bounds
    if not math.isfinite(logit_bounds.logit_bound):
        raise RefusalError("logits may overflow: scale the inputs down")
    rows, keys = _sample(head, rng)
    some = _part(head, rows, keys)
    logit_bounds = _narrowed(logit_bounds, some)
    if not logit_bounds.bound <= LARGEST_BOUND:
        raise RefusalError(
            f"sampled logits lie between {logit_bounds.low:.3g} and "
            f"{logit_bounds.high:.3g}, wider than +-{LARGEST_BOUND:g}: "
            "scale the inputs down, or use Exact()"
        )
    dtype = head.xp.float64 if tol < FLOAT64_BELOW else head.dtype

    def make(degree: int) -> TensorPolynomialExpansion:
        check_rank(head.sizes[2], degree, method.rank)
        expansion = _expansion(head, logit_bounds, degree, method, dtype)
        return replace(expansion, low=whole.low, high=whole.high)

    if method.degree is not None:
        return make(method.degree)
    if method.rank is None:
        return _least(head, some, tol, make, rng)
    degree = 2
    while rank_of(head.sizes[2], degree) < method.rank and degree < LARGEST_DEGREE:
        degree += 1
    return make(degree)


def _least(
    head: TensorHead,
    some: TensorHead,
    tol: float,
    make: Callable[[int], TensorPolynomialExpansion],
    rng: np.random.Generator,
) -> TensorPolynomialExpansion:
    """The least degree that meets the tolerance and that sampled tuples can certify.

    The standard error of sampled tuples falls with the error of the polynomial, so that
    a larger degree may save exact rows. If no degree suffices for that, the least that
    meets the tolerance.
    """
    policy = POLICY.tensor
    truth = to_host(some.attend(head.xp.float64)[0])[: policy.queries]
    # squares of extreme values would leave the range of float64
    peak = float(np.abs(truth).max()) or 1.0
    truth = truth / peak
    # causal rows have no sampled tuples, see ``planning._certify``
    few_rows_are_quick = (
        head.prefix_lengths is not None or row_work(head) <= policy.quick_work
    )
    first, degree = None, 0
    while True:
        degree += 1
        if first is not None and (
            degree > first.degree + policy.extra_degrees
            or rank_of(head.sizes[2], degree) > policy.largest_extra
        ):
            return first
        expansion = make(degree)
        for dtype in dict.fromkeys([expansion.dtype, head.xp.float64]):
            expansion = replace(expansion, dtype=dtype)
            answer, normalizer, reliable = expansion.answer(some)
            off = to_host(answer)[: policy.queries].astype(np.float64) / peak - truth
            error = float(np.linalg.norm(off) / (np.linalg.norm(truth) or 1.0))
            if bool(head.xp.all(reliable)) and error <= policy.aim * tol:
                expansion = replace(expansion, predicted=error)
                break
        else:
            continue
        if few_rows_are_quick:
            return expansion
        found = certify_tuples(
            some, expansion, answer, normalizer, rng, policy.few_groups
        )
        if found.upper <= policy.confirmed * tol:
            return expansion
        first = expansion if first is None else first


def _expansion(
    head: TensorHead,
    logit_bounds: LogitBounds,
    degree: int,
    method: Polynomial,
    dtype: object,
) -> TensorPolynomialExpansion:
    """The expansion of one degree; with a bound if the interval has all logits."""
    if method.basis == "minimax" and math.isfinite(logit_bounds.logit_bound):
        return bounded_expansion(head, degree, method.rank, dtype)
    bound = min(max(logit_bounds.bound, NARROWEST), LARGEST_BOUND)
    coefficients = shifted(
        coefficients_of(method.basis, degree, bound), logit_bounds.center
    )
    index = index_set(logit_bounds, coefficients, method.rank)
    return TensorPolynomialExpansion.over(
        logit_bounds, index, coefficients, dtype, math.inf
    )


def _narrowed(logit_bounds: LogitBounds, some: TensorHead) -> LogitBounds:
    """The interval of sampled logits with a margin, or of all if hardly wider.

    ``logit_bound`` is infinite if logits may lie outside of the interval.
    """
    policy = POLICY.tensor
    keys = [to_host(x).astype(np.float64) for x in some.keys]
    whole = keys[0]
    for key in keys[1:]:
        whole = (whole[:, None, :] * key).reshape(-1, key.shape[1])
    logits = some.scale * (to_host(some.query).astype(np.float64) @ whole.T)
    low, high = float(logits.min()), float(logits.max())
    slack = policy.margin * (high - low)
    if logit_bounds.bound <= min(
        policy.almost * ((high - low) / 2 + slack), LARGEST_BOUND
    ):
        return logit_bounds
    low, high = max(low - slack, logit_bounds.low), min(high + slack, logit_bounds.high)
    return replace(logit_bounds, low=low, high=high, logit_bound=math.inf)


def _sample(head: TensorHead, rng: np.random.Generator) -> tuple[Array, list[Array]]:
    """Indices of sampled queries, random ones first, and of keys of each factor."""
    policy = POLICY.tensor
    n = head.sizes[0]
    rows = rng.choice(n, min(n, policy.queries), replace=False)
    size = max(2, int(policy.tuples ** (1 / len(head.keys))))
    keys = [rng.choice(m, min(m, size), replace=False) for m in head.lengths]
    return np.append(
        rows, furthest_rows(head, head.logit_bounds.maps[0], policy.furthest)
    ), keys


def _part(head: TensorHead, rows: Array, keys: list[Array]) -> TensorHead:
    """The head of some queries and keys."""
    return TensorHead(
        gather_rows(head.query, rows),
        tuple(gather_rows(x, at) for x, at in zip(head.keys, keys, strict=True)),
        tuple(gather_rows(x, at) for x, at in zip(head.values, keys, strict=True)),
        head.scale,
    )
