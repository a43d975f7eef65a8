"""Sampled certificates: the error of an output, estimated on rows computed exactly.

The sampled rows are computed exactly after the output exists. Outlier rows, whose
errors may be far larger than others, are found beforehand (``row_statistics``); they
are not sampled but recomputed exactly and written into the output. The other rows are
drawn by importance sampling from an error profile, mixed with uniform draws: every row
has at least half of the uniform probability, which limits the harm of a wrong profile.
The sample gives an upper estimate of the relative Frobenius error (``ratio_estimate``)
and a distribution-free statement (Wilks, 1941): with confidence ``1 - f``, at least a
share ``f ** (1/m)`` of the rows has an error no larger than the largest of ``m`` rows
that were drawn uniformly. If the estimate meets the tolerance but its upper bound does
not, there is one more sampling round. All rounds of a head share one failure
probability.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import (
    FailureBudget,
    Margin,
    RatioEstimate,
    bernstein,
    importance_probabilities,
    promises,
    relative,
)
from fastattn.certificates.rounding import cut_weights, smallest_number
from fastattn.problem.head import AttentionHead, Head, host_rows
from fastattn.problem.row_statistics import RowStatistics, row_statistics
from sketching._lib.arrays import Array, array_namespace, compute_dtype, to_host

# size of a sample: one row in so many, the fewest, and the most
_SHARE, ROWS, _MOST_ROWS = 128, 128, 256
# fewest and most rows where all error is rounding, whose profile is well known
_ROUNDED_ROWS = 64, 128
# size of a second sample, where the first is inconclusive: one row in so many, most
_SECOND = 32
_MOST = 512
# below this tolerance exact rows are computed in float64
FLOAT64_BELOW = 1e-4
# rows of exact attention that are compared with float64
_EXACT_ROWS = 8
_BLOCK = 2048
# rounding error of the exact rows, in units of eps times (1 + largest |log-sum-exp|)
TRUTH = 4


@dataclass(frozen=True, slots=True)
class SampledError:
    """Error of an output as estimated from sampled rows.

    Parameters
    ----------
    estimate : float
        Estimated relative Frobenius error of the head.
    upper : float
        The estimate plus its margin, or a finite-sample bound: the certified error.
    source : str
        The sampling rule in words, with the number of rows and the largest error.
    """

    estimate: float
    upper: float
    source: str


class SharedSampling:
    """State that all sampling rounds of a head share: statistics and failure budget."""

    def __init__(self) -> None:
        self.budget = FailureBudget()
        self._statistics: RowStatistics | None = None

    def statistics(self, head: Head, rng: np.random.Generator) -> RowStatistics:
        """Return the row statistics, which are computed once."""
        if self._statistics is None:
            self._statistics = row_statistics(head, rng)
        return self._statistics


def sampled_rows(n: int) -> int:
    """Size of the first sample of ``n`` rows."""
    return max(ROWS, min(_MOST_ROWS, n // _SHARE))


def rounded_rows(n: int) -> int:
    """Size of the first sample of ``n`` rows if all error is rounding of the logits."""
    fewest, most = _ROUNDED_ROWS
    return max(fewest, min(most, n // _SHARE))


def second_rows(n: int) -> int:
    """Size of the second sampling round of ``n`` rows."""
    return min(n // _SECOND, _MOST)


def certify_rows(
    head: AttentionHead,
    value: Array,
    tol: float,
    rng: np.random.Generator,
    *,
    exact_rows: Array | None = None,
    size: tuple[float, float] | None = None,
    error_profile: Array | None = None,
    limit: float = math.inf,
    first: int | None = None,
    budget: FailureBudget | None = None,
    expected: float = 0.0,
) -> SampledError:
    """Estimate the error of an output on a fresh sample of exactly computed rows.

    Parameters
    ----------
    head, value : AttentionHead, array of shape (n, p)
        The inputs and the output.
    tol : float
        Tolerance: decides on the second sampling round and on the precision of the
        exact rows.
    rng : Generator
        Draws the rows.
    exact_rows : integer array, optional
        Indices of rows that are exact. None means that all rows are exact up to
        rounding: a few of them are compared with float64, since the same arithmetic
        would reproduce the same rounding.
    size : pair of float, optional
        ``scaled_frobenius(value)``, where it is known.
    error_profile : array, shape (n,), optional
        Expected squared errors of the rows up to a common factor.
    limit : float
        Proven bound on the norm of the error of every row.
    first : int, optional
        Number of rows in the first sampling round.
    budget : FailureBudget, optional
        Failure budget that earlier rounds of the same head have drawn on.
    expected : float
        Predicted relative error; decides whether ``limit`` gives the smaller bound.
    """
    sample = _Sample.of(head, value, tol, exact_rows, size)
    budget = FailureBudget() if budget is None else budget
    n, others = head.sizes[0], sample.others
    if first is None:
        first = _EXACT_ROWS if exact_rows is None else sampled_rows(n)
    second = 0 if exact_rows is None else second_rows(n)
    if len(others) <= 2 * first:
        # at twice the cost all rows are compared, without sampling error
        first, second = len(others), 0
    whole = first == len(others)
    probabilities = (
        None
        if error_profile is None or whole
        else importance_probabilities(error_profile[others], first)
    )
    most = (limit / (sample.peak or 1.0)) ** 2
    mean = (expected * sample.norm) ** 2 / len(others)
    if whole or not promises(most, mean, first, budget.next):
        most = math.inf
    else:
        # the bound is the same for all rows: draw them uniformly
        probabilities = np.full(len(others), 1 / len(others))
    second = min(second, len(others) - first)
    rows = rng.choice(
        len(others), first + second, replace=probabilities is not None, p=probabilities
    )
    weights = None if probabilities is None else 1 / (probabilities[rows] * len(others))
    squares, found = np.zeros(0), SampledError(math.inf, math.inf, "no row was sampled")
    for taken in (slice(0, first), slice(first, first + second)):
        if taken.start and not (second and found.estimate <= tol < found.upper):
            break
        more = sample.squares(others[rows[taken]])
        if more is None:
            return SampledError(math.inf, math.inf, "the output is not finite")
        squares = np.append(squares, more)
        part = None if weights is None else weights[: len(squares)]
        estimate = RatioEstimate(squares, len(others), part)
        found = sample.state_error(estimate, budget.spend(), most)
    return found


@dataclass(slots=True)
class _Sample:
    """An output, and what comparing its rows with exact ones needs."""

    head: AttentionHead
    value: Array
    dtype: Any
    others: Array
    peak: float
    norm: float
    rounding: float
    own: float
    lost: float
    exponent: float = 0.0

    @staticmethod
    def of(
        head: AttentionHead,
        value: Array,
        tol: float,
        exact_rows: Array | None,
        size: tuple[float, float] | None,
    ) -> "_Sample":
        xp, others = head.xp, np.arange(head.sizes[0])
        if exact_rows is not None and len(exact_rows) < len(others):
            # if all rows are exact, they are sampled and compared nevertheless
            others = np.delete(others, exact_rows)
        peak, norm = scaled_frobenius(value) if size is None else size
        dtype = xp.float64 if exact_rows is None or tol < FLOAT64_BELOW else head.dtype
        # rounding of exact attention, which a few rows may not reveal; exact rows are
        # not sampled, but were rounded to the dtype of the query as well
        eps = float(xp.finfo(head.dtype if exact_rows is None else dtype).eps)
        own = float(xp.finfo(head.query.dtype).eps) / 2
        # weights that underflow are missing in the exact rows as in the output
        lost = lost_norm(
            xp, head.dtype, head.query.dtype, head.sizes, head.largest_value, peak
        )
        return _Sample(head, value, dtype, others, peak, norm, eps, own, lost)

    def squares(self, rows: Array) -> Array | None:
        """Squared errors of rows in units of ``peak``; None if any is not finite."""
        truth, normalizer = (
            to_host(x).astype(np.float64)
            for x in self.head.with_rows(rows).attend(self.dtype)
        )
        exponents = np.abs(normalizer[np.isfinite(normalizer)])
        self.exponent = max(self.exponent, float(exponents.max(initial=0.0)))
        given = host_rows(self.value, rows).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.sum(((given - truth) / (self.peak or 1.0)) ** 2, axis=1)
        if not (math.isfinite(self.peak) and np.isfinite(squares).all()):
            return None
        return squares

    def state_error(
        self, found: RatioEstimate, failure: float, limit: float = math.inf
    ) -> SampledError:
        """Turn squared errors of sampled rows into a bound on the error of all rows.

        A finite ``limit`` of the terms gives the empirical Bernstein bound.
        """
        rounding = TRUTH * self.rounding * (1 + self.exponent) + self.own
        return statement(
            found,
            Margin.of(failure),
            failure,
            self.norm,
            rounding=rounding,
            lost=self.lost,
            limit=limit,
        )


def statement(
    found: RatioEstimate,
    margin: Margin,
    failure: float,
    norm: float,
    *,
    rounding: float,
    lost: float,
    limit: float = math.inf,
    rows: str = "rows",
) -> SampledError:
    """Bound the relative error of an output of norm ``norm``, and describe the rule.

    ``rounding`` is added to the relative error, ``lost`` to the norm of the error.
    """
    n, rule, more = found.n, "margin of standard errors", found.excess(margin)
    if found.is_whole:
        rule = "every row"
    elif math.isfinite(limit):
        rule = "finite-sample bound (empirical Bernstein, errors bounded row by row)"
        more = bernstein(found.terms, limit, failure)
    estimate = relative(math.sqrt(n * found.mean), norm)
    upper = relative(math.sqrt(n * (found.mean + more)) + lost, norm) + rounding
    largest = math.sqrt(float(np.max(found.squares)))
    return SampledError(
        estimate,
        upper,
        f"{len(found.squares)} of {n} {rows} computed exactly afterwards, "
        f"{rule}: estimated error {estimate:.2e}; with confidence {1 - failure:.1%} at "
        f"least {found.share(failure):.1%} of them err by at most {largest:.2e} of the "
        "largest entry",
    )


def scaled_frobenius(x: Array) -> tuple[float, float]:
    """Return the largest absolute value, and the Frobenius norm in units of it."""
    xp = array_namespace(x)
    blocks = [
        slice(s, min(s + _BLOCK, x.shape[0])) for s in range(0, x.shape[0], _BLOCK)
    ]
    peak = max(float(xp.max(xp.abs(x[rows, :]))) for rows in blocks)
    if peak == 0 or not math.isfinite(peak):
        return peak, 0.0
    dtype, total = compute_dtype(xp, x.dtype), 0.0
    for rows in blocks:
        block = xp.astype(x[rows, :], dtype, copy=False) / peak
        total += float(xp.sum(xp.vecdot(block, block), dtype=xp.float64))
    return peak, math.sqrt(total)


def lost_norm(
    xp: Any,
    dtype: Any,
    own: Any,
    sizes: tuple[int, int, int, int],
    values: float,
    peak: float,
) -> float:
    """Bound the error by underflow of exact attention: Frobenius norm over ``peak``.

    Weights underflow in ``dtype``, each with values of at most ``values``; outputs
    underflow in their ``own`` dtype.
    """
    n, m, _, p = sizes
    entry = 0.0
    if m and values:
        entry = cut_weights(xp, dtype, m) * values + smallest_number(xp, own) / 2
    if entry == 0:
        return 0.0
    return math.sqrt(n * p) * entry / peak if peak > 0 else math.inf
