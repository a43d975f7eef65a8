"""What sampled rows say about the error of an answer.

Rows are computed exactly after the answer exists. The rows that may err far more than
the others are known before (``row_statistics``); so they are not left to chance: they
are computed exactly and *written into* the answer. The others are drawn more often the
larger their errors are guessed to be, but every row at least half as often as if all
were alike, so that a wrong guess does little harm. The sample gives an upper estimate
of the relative Frobenius error (``ratio_estimate``) and the statement, free of any
distribution, of Wilks (1941): with confidence ``1 - f``, at least a share
``f ** (1/m)`` of those rows has an error no larger than the largest of ``m`` sampled
ones. Where the estimate meets the tolerance and its margin does not, more rows are
drawn once. All looks at one head share one chance of failure.
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
from fastattn.problem.head import Head, host_rows
from fastattn.problem.row_statistics import RowStatistics, row_statistics
from sketching._lib.arrays import Array, array_namespace, compute_dtype, to_host

# rows of a sample: one in so many, the fewest, and the most
_SHARE, ROWS, _MOST_ROWS = 128, 128, 256
# where rounding alone errs, whose sizes are well known: the fewest, and the most
_ROUNDED_ROWS = 64, 128
# rows of a second one, where the first leaves it open: one row in so many, and most
_SECOND = 32
_MOST = 512
# below this tolerance float32 rows are no longer a truth to compare with
FLOAT64_BELOW = 1e-4
# rows that confirm what exact attention rounded
_EXACT_ROWS = 8
_BLOCK = 2048
# rounding of the truth itself, in units of eps times the size of the exponents
TRUTH = 4


@dataclass(frozen=True, slots=True)
class SampledError:
    """What a sample of rows shows.

    Parameters
    ----------
    estimate : float
        Estimated relative Frobenius error of the head.
    upper : float
        The same with a bound for the sampling: the number that is certified.
    source : str
        The rule in words, with the share of rows and the largest error seen.
    """

    estimate: float
    upper: float
    source: str


class SharedSampling:
    """What all looks at one head share: its statistics and one chance of failure."""

    def __init__(self) -> None:
        self.budget = FailureBudget()
        self._statistics: RowStatistics | None = None

    def statistics(self, head: Head, rng: np.random.Generator) -> RowStatistics:
        """Return the statistics of the rows, which are made once."""
        if self._statistics is None:
            self._statistics = row_statistics(head, rng)
        return self._statistics


def sampled_rows(n: int) -> int:
    """Rows of a first sample of ``n``."""
    return max(ROWS, min(_MOST_ROWS, n // _SHARE))


def rounded_rows(n: int) -> int:
    """Rows of a first sample of ``n`` where all logits were rounded alike."""
    fewest, most = _ROUNDED_ROWS
    return max(fewest, min(most, n // _SHARE))


def second_rows(n: int) -> int:
    """Rows of a second look at ``n`` rows."""
    return min(n // _SECOND, _MOST)


def certify_rows(
    head: Head,
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
    """Compare ``value`` with exact attention on a fresh sample of rows.

    Parameters
    ----------
    head, value : Head, array of shape (n, p)
        The inputs and the answer.
    tol : float
        Relative Frobenius error that is hoped for.
    rng : Generator
        Draws the rows.
    exact_rows : integer array, optional
        Rows that are known to be exact. Where it is None, all are up to rounding: they
        are compared with float64, on few rows, because the same arithmetic again would
        show no error at all.
    size : pair of float, optional
        What ``scaled_frobenius`` says of ``value``, where that is known.
    error_profile : array, shape (n,), optional
        How the squares of the rows' errors are guessed to compare.
    limit : float
        Proven bound on the norm of the error of any row.
    first : int, optional
        Rows of the first sample.
    budget : FailureBudget, optional
        What other looks at the same head have left.
    expected : float
        Relative error that is expected; decides whether ``limit`` is of use.
    """
    sample = _Sample.of(head, value, tol, exact_rows, size)
    budget = FailureBudget() if budget is None else budget
    n, others = head.sizes[0], sample.others
    if first is None:
        first = _EXACT_ROWS if exact_rows is None else sampled_rows(n)
    second = 0 if exact_rows is None else second_rows(n)
    if len(others) <= 2 * first:
        # nothing is left to chance at twice the price
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
        # bounds of all rows are alike, and so are the chances
        probabilities = np.full(len(others), 1 / len(others))
    second = min(second, len(others) - first)
    rows = rng.choice(
        len(others), first + second, replace=probabilities is not None, p=probabilities
    )
    weights = None if probabilities is None else 1 / (probabilities[rows] * len(others))
    squares, found = np.zeros(0), SampledError(math.inf, math.inf, "no row was drawn")
    for look in (slice(0, first), slice(first, first + second)):
        if look.start and not (second and found.estimate <= tol < found.upper):
            break
        more = sample.squares(others[rows[look]])
        if more is None:
            return SampledError(math.inf, math.inf, "the answer is not finite")
        squares = np.append(squares, more)
        part = None if weights is None else weights[: len(squares)]
        estimate = RatioEstimate(squares, len(others), part)
        found = sample.state_error(estimate, budget.spend(), most)
    return found


@dataclass(slots=True)
class _Sample:
    """An answer and what its rows are compared with."""

    head: Head
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
        head: Head,
        value: Array,
        tol: float,
        exact_rows: Array | None,
        size: tuple[float, float] | None,
    ) -> "_Sample":
        xp, others = head.xp, np.arange(head.sizes[0])
        if exact_rows is not None and len(exact_rows) < len(others):
            # where every row is settled, they are compared among themselves
            others = np.delete(others, exact_rows)
        peak, norm = scaled_frobenius(value) if size is None else size
        dtype = xp.float64 if exact_rows is None or tol < FLOAT64_BELOW else head.dtype
        # an exact answer is off by its own rounding, which few rows may not show;
        # settled rows are not sampled, but they too were rounded to the query's dtype
        eps = float(xp.finfo(head.dtype if exact_rows is None else dtype).eps)
        own = float(xp.finfo(head.query.dtype).eps) / 2
        # weights that underflow are missed here as they are in the answer
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
        """Turn squared errors of sampled rows into the statement about all rows.

        A finite ``limit`` of every term makes it one that holds for any errors.
        """
        rounding = TRUTH * self.rounding * (1 + self.exponent) + self.own
        margin = Margin.of(failure)
        return statement(found, margin, failure, self.norm, rounding, self.lost, limit)


def statement(
    found: RatioEstimate,
    margin: Margin,
    failure: float,
    norm: float,
    rounding: float,
    lost: float,
    limit: float = math.inf,
    rows: str = "rows",
) -> SampledError:
    """Say what squared errors of rows mean for an answer of a given norm.

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
        f"{len(found.squares)} of {n} {rows} computed exactly after the answer, "
        f"{rule}: estimated error {estimate:.2e}; with confidence {1 - failure:.1%} at "
        f"least {found.share(failure):.1%} of them err by at most {largest:.2e} of the "
        "largest entry",
    )


def scaled_frobenius(x: Array) -> tuple[float, float]:
    """Largest absolute value and Frobenius norm in units of it, a block at a time."""
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
    """Frobenius norm, in units of ``peak``, of what underflows in an exact answer.

    Weights of ``values`` at most are cut off in ``dtype``, answers in their ``own``.
    """
    n, m, _, p = sizes
    entry = 0.0
    if m and values:
        entry = cut_weights(xp, dtype, m) * values + smallest_number(xp, own) / 2
    if entry == 0:
        return 0.0
    return math.sqrt(n * p) * entry / peak if peak > 0 else math.inf
