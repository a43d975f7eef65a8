r"""What samples say about the error of a polynomial answer of tensor attention.

A row computed exactly costs as much as there are tuples of keys, so few rows can be.
Where they are too dear, tuples are sampled. The answer ``o`` of a row is a mean with
the polynomial's weights ``p``, and ``sum_t p_t (v_t - o) = 0``, so that its error is

.. math:: \frac{\sum_t (w_t - p_t)(v_t - o)}{\sum_t w_t},\quad w_t = \exp(x_t):

a mean over tuples of terms as small as the error of the polynomial. Few tuples estimate
it without bias; the squared estimate is too large on average, never too small.
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
from fastattn.costs.work import exact_work
from fastattn.methods.polynomial.expansions import rank_of
from fastattn.problem.head import host_rows
from fastattn.tensor.logit_bounds import LogitBounds, furthest_rows
from fastattn.tensor.polynomial import TensorPolynomialExpansion
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, to_host

# rows that are computed exactly, and the work that all of them may be
_ROWS, _FEWEST = 64, 16
_ROW_WORK = 1e11
# samples of tuples: each with rows and tuples of its own
_GROUPS, _GROUP_ROWS, _TUPLES = 24, 8, 1024
# what a share of this over the size of the sample has, it shows but for one time in
# twenty (rule of three)
_UNSEEN = 3.0
# logits where the polynomial is compared with exp
_GRID = 1001


def certify_tuples(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    normalizer: Array,
    rng: np.random.Generator,
    groups: int = _GROUPS,
) -> SampledError:
    """Estimate the error of ``value`` from sampled tuples of sampled rows.

    Sums and coordinates are taken to be those of the recipe up to rounding.
    """
    peak, norm = scaled_frobenius(value)
    if not (math.isfinite(peak) and peak > 0):
        return SampledError(math.inf, math.inf, "the answer is not finite, or all zero")
    squares, absolute, weights = np.empty((3, groups))
    for group in range(groups):
        rows = np.sort(rng.choice(head.sizes[0], _GROUP_ROWS))
        off, size, weights[group] = _errors(
            head, expansion, value, normalizer, rows, rng
        )
        squares[group] = np.mean(np.sum((off / peak) ** 2, axis=1))
        absolute[group] = np.mean(np.sum((size / peak) ** 2, axis=1))
    n = head.sizes[0]
    rows = furthest_rows(head, expansion.maps[0], _GROUP_ROWS)
    off, _, weight = _errors(head, expansion, value, normalizer, rows, rng)
    least = min(weight, float(weights.min()))
    if not least > 0:
        return SampledError(
            math.inf, math.inf, "sampled tuples leave it open whether weights add up"
        )
    # rows that none was drawn of may err as the furthest do
    furthest = float(np.max(np.sum((off / peak) ** 2, axis=1)))
    found = RatioEstimate(squares, math.inf, beside=furthest / _GROUP_ROWS)
    unseen = _unseen_tuples(head, expansion, least, groups) / peak
    eps = float(head.xp.finfo(expansion.dtype).eps)
    # the sums' own rounding, of which nothing is seen here
    rounding = TRUTH * eps * (1 + expansion.degree * head.order)
    rounding *= math.sqrt(n * float(absolute.mean())) / norm
    rounding += float(head.xp.finfo(head.query.dtype).eps) / 2
    estimate = relative(math.sqrt(n * found.mean), norm)
    upper = math.sqrt(n * found.upper(UNIFORM_MARGIN)) + math.sqrt(n) * unseen
    upper = relative(upper, norm) + rounding
    return SampledError(
        estimate,
        upper,
        f"{groups} x {_GROUP_ROWS} rows, {_TUPLES} of {head.sizes[1]} tuples of keys "
        f"each, sampled after the answer: estimated error {estimate:.2e}; the bound "
        f"adds {UNIFORM_MARGIN.errors:g} standard errors and the worst of what was too "
        "rare to see",
    )


@np.errstate(over="ignore", invalid="ignore")
def _unseen_tuples(
    head: TensorHead, expansion: TensorPolynomialExpansion, weight: float, groups: int
) -> float:
    """Bound the error of a row from tuples too rare to be among those sampled.

    Each may have any logit that there is. ``weight`` is a mean weight.
    """
    xp, (_, _, d, p) = head.xp, head.sizes
    polyval = np.polynomial.polynomial.polyval
    if len(expansion.index) == rank_of(d, expansion.degree):
        logits = np.linspace(expansion.low, expansion.high, _GRID)
        off = np.exp(logits - expansion.center) - polyval(
            logits, expansion.coefficients
        )
        worst = float(np.max(np.abs(off)))
    else:
        # monomials are left out: what is kept is no function of the logit
        logit_bound = LogitBounds.of(head).logit_bound
        worst = float(np.exp(expansion.high - expansion.center))
        worst += float(polyval(logit_bound, np.abs(expansion.coefficients)))
    values = math.prod(float(xp.max(xp.abs(x))) for x in head.values)
    share = _UNSEEN / (groups * _TUPLES)
    unseen = share * worst / weight * 2 * values * math.sqrt(p)
    return unseen if math.isfinite(unseen) else math.inf


def _errors(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    normalizer: Array,
    rows: Array,
    rng: np.random.Generator,
) -> tuple[Array, Array, float]:
    """Errors of the given rows, by a sample of tuples, and what rounding goes with.

    The first two are ``(b, p)``: the second has the absolute values of all terms. The
    last is the least mean weight of a row.
    """
    places = [np.sort(rng.choice(m, _TUPLES)) for m in head.lengths]
    # each factor is drawn apart: sorted for memory's sake, then shuffled
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
    joined = np.prod(sides[1:], axis=0).T
    off = np.exp(logits) - weighted @ joined
    answer = host_rows(value, rows).astype(np.float64)
    sums = (off @ product - off.sum(axis=1)[:, None] * answer) / _TUPLES
    # the mean weight: that of the polynomial, corrected
    log_mean = host_rows(normalizer, rows).astype(np.float64)
    mean = np.exp(log_mean - expansion.center - math.log(head.sizes[1]))
    mean = mean + off.mean(axis=1)
    size = np.abs(weighted) @ np.abs(joined)
    absolute = size @ np.abs(product) + size.sum(axis=1)[:, None] * np.abs(answer)
    absolute /= _TUPLES
    return sums / mean[:, None], absolute / mean[:, None], float(mean.min())


def row_work(head: TensorHead) -> float:
    """Work of the rows that are computed exactly where that is no matter."""
    n, *rest = head.sizes
    return exact_work(min(_ROWS, n), *rest)


def rows_within_budget(head: TensorHead) -> int:
    """How many rows may be computed exactly; 0 where too few to tell anything."""
    n = head.sizes[0]
    most = min(_ROWS, n)
    count = min(most, int(most * _ROW_WORK / row_work(head)))
    return count if count >= min(_FEWEST, n) else 0


def certify_few_rows(
    head: TensorHead,
    expansion: TensorPolynomialExpansion,
    value: Array,
    count: int,
    tol: float,
    rng: np.random.Generator,
) -> SampledError:
    """Compare ``value`` with exact attention on random rows and the furthest ones."""
    n = head.sizes[0]
    rows = rng.choice(n, count, replace=False)
    rows = np.append(rows, furthest_rows(head, expansion.maps[0], _GROUP_ROWS))
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
    what = f"rows of {head.sizes[1]} tuples"
    return statement(found, UNIFORM_MARGIN, FAILURE, norm, rounding, lost, rows=what)
