r"""The one estimator of a relative error from squared errors of sampled rows.

Of ``n`` rows with squared errors ``e_i``, ``K`` are drawn with replacement with
probabilities ``p_i`` (Hansen and Hurwitz, 1943) and :math:`x_k = e_k / p_k` is an
unbiased estimate of :math:`E = \sum_i e_i`. Two upper bounds of it are at hand:

* the *margin*: mean of ``x``, standard errors, and a share of the largest ``x``, which
  stands for what is as large and too rare to be drawn. It is an estimate; its constants
  were measured on heads made against it (``python -m benches attacks``);
* the *empirical Bernstein* bound (Maurer and Pontil, arXiv 0907.3740, theorem 4): holds
  for every distribution of ``x`` in ``[0, R]``, where ``R`` follows from proven bounds
  of the rows' errors.

Looks at one head, however many answers are tried, share one chance of failure.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sketching._lib.arrays import Array

# the probability with which a sampled certificate is allowed to be wrong
FAILURE = 0.05
# the share of the remaining chance of failure that a look takes
_PART = 1 / 3
# the largest x counts so many times the logarithm of the odds over the number of rows
_UNSEEN = 2 / 3
# the largest of many terms is about so many deviations above their mean
_TYPICAL = 4.0
# a finite-sample bound is taken where it promises at most so many times the margin's
_PROMISE = 1.1
# a mixture keeps this share of the draws uniform, so that a wrong guess does little
UNIFORM_SHARE = 0.5
# draws of one row that are expected at most, and rounds that see to it
_DRAWS, _LEVELS = 4.0, 16


class FailureBudget:
    """The chance of failure that all looks at one head share.

    The first look takes a third of it, each further one a third of what is left, so
    that any number of them together fail with ``failure`` at most.
    """

    def __init__(self, failure: float = FAILURE) -> None:
        self._left = failure

    @property
    def next(self) -> float:
        """The chance of failure of the next look."""
        return self._left * _PART

    def spend(self) -> float:
        """Return the chance of failure of the next look, and give it away."""
        failure = self.next
        self._left -= failure
        return failure


@dataclass(frozen=True, slots=True)
class Margin:
    """What is added to a mean of sampled terms.

    Parameters
    ----------
    errors : float
        Number of standard errors.
    largest : float
        Number of times that the largest term, over their count, is added.
    """

    errors: float
    largest: float

    @staticmethod
    def of(failure: float) -> "Margin":
        """Two-sided normal quantile, as squared errors are skewed to the right."""
        quantile = NormalDist().inv_cdf(1 - failure / 2)
        return Margin(quantile, -_UNSEEN * math.log(failure))

    def over(self, spread: float, largest: float, count: float) -> float:
        """Return what a mean of ``count`` terms may lack."""
        return self.errors * spread / math.sqrt(count) + self.largest * largest / count

    def expected(self, spread: float, mean: float, count: float) -> float:
        """Return the same before terms of that mean and deviation are drawn."""
        return self.over(spread, mean + _TYPICAL * spread, count)


# margins of a first and of a second look at one head
_BUDGET = FailureBudget()
FIRST, SECOND = (Margin.of(_BUDGET.spend()) for _ in range(2))


# margin of a uniform sample that no guess of the errors steers: twice the normal
# quantile of .04, and what a share of three over the size of a sample has (rule of
# three)
UNIFORM_MARGIN = Margin(3.5, 3.0)


@dataclass(frozen=True, slots=True, eq=False)
class RatioEstimate:
    r"""Estimate :math:`\sum_i e_i / \sum_i s_i` from sampled rows.

    Parameters
    ----------
    squares : array, shape (K,)
        Squared errors ``e_i`` of the sampled rows.
    n : float
        Rows that the sample stands for.
    weights : array, shape (K,), optional
        ``1 / (n p_i)`` of each row; None for uniform draws without replacement.
    sizes : array, shape (K,), optional
        Squared sizes ``s_i`` of the sampled rows, less what ``known`` has of them; what
        errors have in common with them leaves nothing to chance.
    known : float
        The part of the mean squared size that is not estimated.
    certain : boolean array, shape (K,), optional
        Rows that were not drawn but chosen. Rows then stand for ``n * weights / K``
        rows of a sample that was drawn before, uniformly.
    beside : float
        Largest term of rows that were looked at beside the sample.
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
        """Estimated mean squared size of a row."""
        if self.sizes is None:
            return self.known
        weights = 1.0 if self.weights is None else self.weights
        return self.known + float(np.mean(weights * self.sizes))

    @property
    def ratio(self) -> float:
        """Estimated ratio of the two."""
        return self.mean / self.size if self.size > 0 else math.inf

    @property
    def is_whole(self) -> bool:
        """Whether every row was looked at, which leaves nothing to chance."""
        return self.weights is None and len(self.squares) >= self.n

    @property
    def _residuals(self) -> Array:
        """What the squared errors do not have in common with the sizes."""
        if self.sizes is None:
            return self.squares
        return self.squares - self.ratio * self.sizes

    def excess(self, margin: Margin) -> float:
        """Return what the mean squared error may lack."""
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
            # without replacement: the share that was seen is certain
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
        """Share of the rows that err by no more than the largest seen (Wilks)."""
        if self.is_whole:
            return 1.0
        share = float(failure ** (1 / len(self.squares)))
        # rows are drawn at least so many times as often as with equal odds
        return share if self.weights is None else 1 - (1 - share) / UNIFORM_SHARE


def _two_phase(left: Array, weights: Array, certain: Array) -> float:
    """Standard error of a weighted mean, some of whose terms are a sample of a sample.

    Rows that are certain, and those that others stand for, are a sample of all.
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
    """Return what the empirical Bernstein bound adds to a mean of terms in [0, limit].

    Maurer and Pontil, arXiv 0907.3740, theorem 4, for one side.
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
    """Whether a finite-sample bound will be about as small as the margin.

    ``expected`` is the mean squared error that was predicted before any row was drawn;
    its terms are taken to spread as much as their mean.
    """
    if not (math.isfinite(limit) and expected > 0):
        return False
    margin = expected + Margin.of(failure).expected(expected, expected, count)
    proven = expected + _bernstein(expected, limit, count, failure)
    return proven <= _PROMISE**2 * margin


def importance_probabilities(sizes: Array, count: int) -> Array:
    """Probabilities of rows: half uniform, half in proportion to guessed squares.

    No row is to be drawn more than a few times among ``count`` draws.
    """
    sizes = np.asarray(sizes, np.float64)
    largest = float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))
    # what overflowed is as large as anything
    sizes = np.clip(np.where(np.isnan(sizes), largest, sizes), 0, largest)
    # where nothing is known all rows are alike
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
    """Bound ``||error|| / ||truth||`` from the norms of the error and the answer."""
    if error_norm == 0:
        return 0.0
    left = answer_norm - error_norm
    return error_norm / left if left > 0 else math.inf
