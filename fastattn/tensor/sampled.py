r"""Sampled certificates of polynomial tensor attention.

An exact row costs one logit for each tuple of keys. Where this is too expensive, tuples
are sampled instead of rows. The output :math:`o` of a row is a mean of the products of
values :math:`v_t` with the weights :math:`p_t` of the polynomial, so that :math:`\sum_t
p_t (v_t - o) = 0`, and with exact weights :math:`w_t = e^{x_t}` of the logits
:math:`x_t` its error is

.. math:: \frac{\sum_t (w_t - p_t)(v_t - o)}{\sum_t w_t}.

The terms of the numerator are as small as the error of the polynomial, and a sample of
tuples estimates it without bias. So the expectation of the squared estimate is at least
the squared error.
"""

import math

import numpy as np

from fastattn._ops.monomials import monomials
from fastattn.certificates.ratio_estimate import (
    FAILURE,
    UNIFORM_MARGIN,
    RatioEstimate,
    relative,
)
from fastattn.certificates.sampled import (
    FLOAT64_BELOW,
    TRUTH,
    SampledError,
    lost_norm,
    scaled_frobenius,
    statement,
)
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.methods.polynomial.expansions import rank_of
from fastattn.problem.head import host_rows
from fastattn.tensor.overflow import lost_products
from fastattn.tensor.polynomial import TensorPolynomialExpansion
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, device_of, to_host

# rule of three: with probability 0.95 a property of a share above 3 / n of all tuples
# occurs in a sample of n
_UNSEEN = 3.0
# number of logits at which the polynomial is compared with exp
_GRID = 1001


def certify_tuples(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    normalizer: Array,
    rng: np.random.Generator,
    groups: int | None = None,
) -> SampledError:
    """Estimate the error of ``value`` from sampled tuples of sampled rows.

    The sums over keys are assumed to be those of the expansion, up to rounding.
    """
    policy = POLICY.tensor
    groups = policy.groups if groups is None else groups
    peak, norm = scaled_frobenius(value)
    if not (math.isfinite(peak) and peak > 0):
        return SampledError(math.inf, math.inf, "the answer is not finite, or all zero")
    squares, absolute, weights = np.empty((3, groups))
    for group in range(groups):
        rows = np.sort(rng.choice(head.sizes[0], policy.group_rows))
        off, size, weights[group] = _errors(
            head, expansion, value, normalizer, rows, rng
        )
        squares[group] = np.mean(np.sum((off / peak) ** 2, axis=1))
        absolute[group] = np.mean(np.sum((size / peak) ** 2, axis=1))
    n = head.sizes[0]
    rows = furthest_rows(head, expansion.maps[0], policy.group_rows)
    off, _, weight = _errors(head, expansion, value, normalizer, rows, rng)
    least = min(weight, float(weights.min()))
    if not least > 0:
        return SampledError(
            math.inf, math.inf, "by sampled tuples a sum of weights may not be positive"
        )
    # rows that were not drawn may have the error of the queries of largest norm
    furthest = float(np.max(np.sum((off / peak) ** 2, axis=1)))
    found = RatioEstimate(squares, math.inf, beside=furthest / policy.group_rows)
    unseen = _unseen_tuples(head, expansion, least, groups) / peak
    eps = float(head.xp.finfo(expansion.dtype).eps)
    # rounding of the sums over keys, which sampled tuples do not show
    rounding = TRUTH * eps * (1 + expansion.degree * head.order)
    rounding *= math.sqrt(n * float(absolute.mean())) / norm
    rounding += float(head.xp.finfo(head.query.dtype).eps) / 2
    estimate = relative(math.sqrt(n * found.mean), norm)
    upper = math.sqrt(n * found.upper(UNIFORM_MARGIN)) + math.sqrt(n) * unseen
    lost = lost_products(head, expansion.dtype, (peak, norm))
    upper = relative(upper, norm) + rounding + lost
    return SampledError(
        estimate,
        upper,
        f"{groups} x {policy.group_rows} rows, {policy.group_tuples} of "
        f"{head.sizes[1]} tuples of keys "
        f"each, sampled after the answer: estimated error {estimate:.2e}; the bound "
        f"adds {UNIFORM_MARGIN.errors:g} standard errors and the worst case of tuples "
        "too rare for the sample",
    )


@np.errstate(over="ignore", invalid="ignore")
def _unseen_tuples(
    head: TensorHead, expansion: TensorPolynomialExpansion, weight: float, groups: int
) -> float:
    """Bound on the error of a row by tuples too rare to be in the sample.

    Their logits may be anywhere in the interval. ``weight`` is the least mean weight.
    """
    _, _, d, p = head.sizes
    polyval = np.polynomial.polynomial.polyval
    if len(expansion.index) == rank_of(d, expansion.degree):
        logits = np.linspace(expansion.low, expansion.high, _GRID)
        off = np.exp(logits - expansion.center) - polyval(
            logits, expansion.coefficients
        )
        worst = float(np.max(np.abs(off)))
    else:
        # some monomials are dropped: the weight is no function of the logit
        logit_bound = head.logit_bounds.logit_bound
        worst = float(np.exp(expansion.high - expansion.center))
        worst += float(polyval(logit_bound, np.abs(expansion.coefficients)))
    share = _UNSEEN / (groups * POLICY.tensor.group_tuples)
    unseen = share * worst / weight * 2 * head.largest_value * math.sqrt(p)
    return unseen if math.isfinite(unseen) else math.inf


def _errors(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    normalizer: Array,
    rows: Array,
    rng: np.random.Generator,
) -> tuple[Array, Array, float]:
    """Estimated errors of the given rows, from a sample of tuples.

    Returns
    -------
    errors : array, shape (b, p)
    absolute : array, shape (b, p)
        The same sums over the absolute values of all terms, for the rounding error.
    weight : float
        The least mean weight of a row.
    """
    policy = POLICY.tensor
    places = [np.sort(rng.choice(m, policy.group_tuples)) for m in head.lengths]
    # factors are drawn independently: sorted to be read in order, then shuffled
    places = [rng.permutation(place) for place in places]
    query = host_rows(head.query, rows).astype(np.float64)
    keys = [
        host_rows(x, place).astype(np.float64)
        for x, place in zip(head.keys, places, strict=True)
    ]
    product = np.prod(
        [
            host_rows(x, place).astype(np.float64)
            for x, place in zip(head.values, places, strict=True)
        ],
        axis=0,
    )
    logits = head.scale * (query @ np.prod(keys, axis=0).T) - expansion.center
    index = {"parent": expansion.index.parent, "coordinate": expansion.index.coordinate}
    sides = [
        monomials(x * scales, **index)
        for x, scales in zip((query, *keys), expansion.maps, strict=True)
    ]
    weighted = sides[0] * expansion.index.weights(expansion.coefficients)
    products = np.prod(sides[1:], axis=0).T
    off = np.exp(logits) - weighted @ products
    answer = host_rows(value, rows).astype(np.float64)
    sums = (off @ product - off.sum(axis=1)[:, None] * answer) / policy.group_tuples
    # the mean weight of the polynomial, corrected by the sample
    log_mean = host_rows(normalizer, rows).astype(np.float64)
    mean = np.exp(log_mean - expansion.center - math.log(head.sizes[1]))
    mean = mean + off.mean(axis=1)
    size = np.abs(weighted) @ np.abs(products)
    absolute = size @ np.abs(product) + size.sum(axis=1)[:, None] * np.abs(answer)
    absolute /= policy.group_tuples
    return sums / mean[:, None], absolute / mean[:, None], float(mean.min())


def furthest_rows(head: TensorHead, scales: Array, count: int) -> Array:
    """Indices of the ``count`` queries of largest norm after scaling coordinates."""
    xp = head.xp
    scales = xp.asarray(scales, dtype=xp.float64, device=device_of(head.query))
    squares = xp.sum((xp.astype(head.query, xp.float64) * scales) ** 2, axis=1)
    return np.argsort(to_host(squares), kind="stable")[-count:]


def row_work(head: TensorHead) -> float:
    """Work of the largest number of exact rows for a certificate."""
    n, *rest = head.sizes
    return exact_work(min(POLICY.tensor.rows, n), *rest)


def rows_within_budget(head: TensorHead) -> int:
    """Number of exact rows within the budget; 0 if too few for an estimate."""
    policy = POLICY.tensor
    n = head.sizes[0]
    most = min(policy.rows, n)
    count = min(most, int(most * policy.row_work / row_work(head)))
    return count if count >= min(policy.fewest_rows, n) else 0


def certify_few_rows(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    count: int,
    tol: float,
    rng: np.random.Generator,
) -> SampledError:
    """Compare ``value`` with exact rows: random ones, and those of largest norm."""
    n = head.sizes[0]
    rows = rng.choice(n, count, replace=False)
    rows = np.append(
        rows, furthest_rows(head, expansion.maps[0], POLICY.tensor.group_rows)
    )
    peak, norm = scaled_frobenius(value)
    dtype = head.xp.float64 if tol < FLOAT64_BELOW else head.dtype
    truth, normalizer = (
        to_host(x).astype(np.float64) for x in head.with_rows(rows).attend(dtype)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        off = (host_rows(value, rows).astype(np.float64) - truth) / (peak or 1.0)
        squares = np.sum(off**2, axis=1)
    if not (math.isfinite(peak) and np.isfinite(squares).all()):
        return SampledError(math.inf, math.inf, "the answer is not finite")
    squares, furthest = squares[:count], float(squares[count:].max())
    found = RatioEstimate(squares, n, beside=furthest)
    eps = float(head.xp.finfo(dtype).eps)
    rounding = TRUTH * eps * (1 + float(np.abs(normalizer).max()))
    rounding += float(head.xp.finfo(head.query.dtype).eps) / 2
    lost = lost_norm(
        head.xp, dtype, head.query.dtype, head.sizes, head.largest_value, peak
    )
    lost += lost_products(head, expansion.dtype, (peak, norm)) * norm
    return statement(
        found,
        UNIFORM_MARGIN,
        FAILURE,
        norm,
        rounding=rounding,
        lost=lost,
        rows=f"rows of {head.sizes[1]} tuples",
    )
