r"""Estimator of a relative error from squared errors of sampled rows.

Of ``n`` rows with squared errors ``e_i``, ``K`` are drawn with replacement with
probabilities ``p_i`` (Hansen and Hurwitz, 1943), and every :math:`x_k = e_k / p_k` is
an unbiased estimate of :math:`E = \sum_i e_i`. There are two upper bounds on ``E``:

* the *margin*: the mean of ``x``, a number of standard errors, and a multiple of the
  largest ``x`` over ``K``, for rows with large errors that are too rare to be drawn.
  The margin is an estimate; its constants were measured on heads that were constructed
  to defeat it (``python -m benches attacks``);
* the *empirical Bernstein* bound (Maurer and Pontil, arXiv 0907.3740, theorem 4), which
  holds for every distribution of ``x`` in ``[0, R]``, where ``R`` follows from proven
  bounds on the errors of the rows.

All sampling rounds of a head, over all methods that are tried, share one failure
probability.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sketching._lib.arrays import Array

# the failure probability of a sampled certificate
FAILURE = 0.05
# the share of the remaining failure probability that a sampling round takes
_PART = 1 / 3
# the largest x counts -log(failure) / K times this factor
_UNSEEN = 2 / 3
# the largest of many terms is expected at mean plus so many standard deviations
_TYPICAL = 4.0
# the Bernstein bound is used where it is expected to be at most so many margins
_PROMISE = 1.1
# share of uniform draws in the mixture, which limits the harm of a wrong profile
UNIFORM_SHARE = 0.5
# most expected draws of a single row, and iterations that enforce this limit
_DRAWS, _LEVELS = 4.0, 16


class FailureBudget:
    """The failure probability that all sampling rounds of a head share.

    The first round takes a third of ``failure``, each further round a third of the
    remainder, so that by the union bound any number of rounds fails with probability
    ``failure`` at most.
    """

    def __init__(self, failure: float = FAILURE) -> None:
        self._left = failure

    @property
    def next(self) -> float:
        """The failure probability of the next sampling round."""
        return self._left * _PART

    def spend(self) -> float:
        """Take the failure probability of the next round out of the budget."""
        failure = self.next
        self._left -= failure
        return failure


@dataclass(frozen=True, slots=True)
class Margin:
    """What is added to a mean of sampled terms to bound it: an estimated margin.

    Parameters
    ----------
    errors : float
        Number of standard errors.
    largest : float
        Factor of the largest term over the number of terms, which is added as well.
    """

    errors: float
    largest: float

    @staticmethod
    def of(failure: float) -> "Margin":
        """Margin of a failure probability, with the two-sided normal quantile.

        Squared errors are skewed to the right, where one side would be too optimistic.
        """
        quantile = NormalDist().inv_cdf(1 - failure / 2)
        return Margin(quantile, -_UNSEEN * math.log(failure))

    def over(self, spread: float, largest: float, count: float) -> float:
        """Return the margin of a mean of ``count`` terms with that deviation."""
        return self.errors * spread / math.sqrt(count) + self.largest * largest / count

    def expected(self, spread: float, mean: float, count: float) -> float:
        """Predict the margin before terms of that mean and deviation are drawn."""
        return self.over(spread, mean + _TYPICAL * spread, count)


# margins of the first and the second sampling round of a head
_BUDGET = FailureBudget()
FIRST, SECOND = (Margin.of(_BUDGET.spend()) for _ in range(2))


# margin of a uniform sample without an error profile: twice the normal quantile of .04,
# and three times the largest term over the size of the sample (rule of three)
UNIFORM_MARGIN = Margin(3.5, 3.0)


@dataclass(frozen=True, slots=True, eq=False)
class RatioEstimate:
    r"""Estimate :math:`\sum_i e_i / \sum_i s_i` from sampled rows.

    Parameters
    ----------
    squares : array, shape (K,)
        Squared errors ``e_i`` of the sampled rows.
    n : float
        Number of rows that the sample represents.
    weights : array, shape (K,), optional
        ``1 / (n p_i)`` of each row; None for uniform draws without replacement.
    sizes : array, shape (K,), optional
        Squared norms ``s_i`` of the sampled rows less the part in ``known``; the
        component of the errors that is proportional to them has no sampling error.
    known : float
        The part of the mean squared norm that is known exactly.
    certain : boolean array, shape (K,), optional
        Rows that were chosen rather than drawn (two-phase sampling). A row then
        represents ``n * weights / K`` rows of an earlier, uniform sample.
    beside : float
        Largest term of further rows that were compared but do not enter the mean.
    """

    squares: Array
    n: float
    weights: Array | None = None
    sizes: Array | None = None
    known: float = 0.0
    certain: Array | None = None
    beside: float = 0.0

    @property
    def terms(self) -> Array:
        """Unbiased estimates of the mean squared error of a row."""
        return self.squares if self.weights is None else self.weights * self.squares

    @property
    def mean(self) -> float:
        """Estimated mean squared error of a row."""
        return float(np.mean(self.terms))

    @property
    def size(self) -> float:
        """Estimated mean squared norm of a row."""
        if self.sizes is None:
            return self.known
        weights = 1.0 if self.weights is None else self.weights
        return self.known + float(np.mean(weights * self.sizes))

    @property
    def ratio(self) -> float:
        """Estimated ratio of mean squared error and mean squared norm."""
        return self.mean / self.size if self.size > 0 else math.inf

    @property
    def is_whole(self) -> bool:
        """Whether the sample contains every row, and has no sampling error."""
        return self.weights is None and len(self.squares) >= self.n

    @property
    def _residuals(self) -> Array:
        """Squared errors less their component proportional to the squared norms."""
        if self.sizes is None:
            return self.squares
        return self.squares - self.ratio * self.sizes

    def excess(self, margin: Margin) -> float:
        """Return the margin of the mean squared error."""
        if self.is_whole:
            return 0.0
        left, count = self._residuals, len(self.squares)
        if self.certain is not None:
            assert self.weights is not None
            error = _two_phase(left, self.weights * self.n / count, self.certain)
            largest = float(np.max(self.squares))
            return margin.errors * error + margin.largest * largest / self.n
        left = left if self.weights is None else self.weights * left
        spread = float(np.std(left, ddof=1)) if count > 1 else math.inf
        largest = max(float(np.max(left)), self.beside, 0.0)
        if self.weights is None and self.sizes is None:
            # finite-population factor of sampling without replacement
            rest = 1 - count / self.n
            spread, largest = spread * math.sqrt(rest), largest * rest
        return margin.over(spread, largest, count)

    def upper(self, margin: Margin) -> float:
        """Bound the mean squared error of a row."""
        return self.mean + self.excess(margin)

    def upper_ratio(self, margin: Margin) -> float:
        """Bound the ratio."""
        return self.ratio + self.excess(margin) / self.size

    def share(self, failure: float) -> float:
        """Share of rows whose error is at most the largest one sampled (Wilks)."""
        if self.is_whole:
            return 1.0
        share = float(failure ** (1 / len(self.squares)))
        # every row is drawn with at least this share of the uniform probability
        return share if self.weights is None else 1 - (1 - share) / UNIFORM_SHARE


def _two_phase(left: Array, weights: Array, certain: Array) -> float:
    """Standard error of a weighted mean under two-phase sampling.

    The first phase is a uniform sample of all rows; of this sample, the certain rows
    are all compared and the others are represented by those that were drawn.
    """
    n = float(weights.sum())
    variance = float(weights @ left**2) / n / (n - 1)
    some = left[~certain]
    if len(some) > 1:
        stand = float(weights[~certain].sum())
        again = float(np.var(some, ddof=1)) * (1 / len(some) - 1 / stand)
        variance += (stand / n) ** 2 * max(again, 0.0)
    return math.sqrt(variance)


def bernstein(terms: Array, limit: float, failure: float) -> float:
    r"""Return what the empirical Bernstein bound adds to a mean of terms in [0, limit].

    With ``K`` terms of standard deviation :math:`\sigma`, ``R = limit`` and :math:`L =
    \log(2 / f)` it is :math:`\sigma \sqrt{2 L / K} + 7 R L / (3 (K - 1))` (Maurer and
    Pontil, arXiv 0907.3740, theorem 4, one-sided).
    """
    if len(terms) < 2:
        return math.inf
    return _bernstein(float(np.std(terms, ddof=1)), limit, len(terms), failure)


def _bernstein(spread: float, limit: float, count: int, failure: float) -> float:
    exponent = math.log(2 / failure)
    return spread * math.sqrt(2 * exponent / count) + 7 * limit * exponent / (
        3 * (count - 1)
    )


def promises(limit: float, expected: float, count: int, failure: float) -> bool:
    """Whether the Bernstein bound is expected to be about as small as the margin.

    ``expected`` is the mean squared error that was predicted before any row was drawn;
    the standard deviation of the terms is assumed to equal it.
    """
    if not (math.isfinite(limit) and expected > 0):
        return False
    margin = expected + Margin.of(failure).expected(expected, expected, count)
    proven = expected + _bernstein(expected, limit, count, failure)
    return proven <= _PROMISE**2 * margin


def importance_probabilities(sizes: Array, count: int) -> Array:
    """Sampling probabilities: half uniform, half proportional to the error profile.

    They are clipped so that no row is expected more than ``_DRAWS`` times among
    ``count`` draws.
    """
    sizes = np.asarray(sizes, np.float64)
    largest = float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))
    # overflowed entries count as the largest
    sizes = np.clip(np.where(np.isnan(sizes), largest, sizes), 0, largest)
    # without a profile the probabilities are uniform
    sizes = sizes / largest if largest > 0 else np.ones(len(sizes))
    for _ in range(_LEVELS):
        most = float(sizes.sum()) * _DRAWS / count
        if sizes.max() <= most:
            break
        sizes = np.minimum(sizes, most)
    probabilities = (
        UNIFORM_SHARE / len(sizes) + (1 - UNIFORM_SHARE) * sizes / sizes.sum()
    )
    return probabilities / probabilities.sum()


def relative(error_norm: float, answer_norm: float) -> float:
    """Bound ``||error|| / ||exact output||`` by the norms of error and output."""
    if error_norm == 0:
        return 0.0
    left = answer_norm - error_norm
    return error_norm / left if left > 0 else math.inf
