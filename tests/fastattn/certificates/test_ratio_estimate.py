"""The one estimator of a relative error, and the chance of failure that looks share."""

import math

import numpy as np
import pytest

from fastattn.certificates.ratio_estimate import (
    FAILURE,
    FIRST,
    FailureBudget,
    Margin,
    RatioEstimate,
    bernstein,
    importance_probabilities,
    promises,
)
from fastattn.problem.row_statistics import outlying_rows
from tests.chance import assert_fails_rarely

ALARM = 1e-6


def drawn(squares, error_profile, count, rng):
    """An estimate from so many rows, drawn by how their errors are guessed."""
    n = len(squares)
    if error_profile is None:
        return RatioEstimate(rng.choice(squares, count, replace=False), n)
    probabilities = importance_probabilities(error_profile, count)
    rows = rng.choice(n, count, p=probabilities)
    return RatioEstimate(squares[rows], n, 1 / (n * probabilities[rows]))


def test_looks_share_one_chance_of_failure():
    budget = FailureBudget()
    spent = [budget.spend() for _ in range(60)]
    assert spent[0] == pytest.approx(FAILURE / 3)
    assert np.all(np.diff(spent) < 0)
    assert sum(spent) <= FAILURE


def test_next_look_is_announced():
    budget = FailureBudget()
    assert budget.next == budget.spend()


@pytest.mark.parametrize("profiled", [True, False])
def test_mean_is_unbiased(profiled):
    rng = np.random.default_rng(0)
    squares = rng.exponential(size=500)
    error_profile = squares * rng.exponential(size=500) if profiled else None
    found = [drawn(squares, error_profile, 64, rng).mean for _ in range(4000)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - squares.mean()) < 5 * error


@pytest.mark.parametrize("tail", [0.5, 1.5])
def test_margin_holds_at_its_rate_where_the_profile_is_right(tail):
    rng = np.random.default_rng(1)
    error_profile = np.exp(rng.standard_normal(4000) * 2 * tail)
    squares = error_profile * rng.chisquare(3, 4000)
    # the few rows that are computed exactly
    squares[outlying_rows(np.sqrt(error_profile), 32)] = 0

    def trial(rng):
        found = drawn(squares, error_profile * (squares > 0), 128, rng)
        return found.upper(Margin.of(FAILURE)) >= squares.mean()

    assert_fails_rarely(trial, failure=FAILURE, trials=400, false_alarm=ALARM)


def test_sample_of_every_row_leaves_nothing_to_chance():
    squares = np.arange(1.0, 9.0)
    found = RatioEstimate(squares, 8)
    assert found.is_whole
    assert found.upper(FIRST) == squares.mean()
    assert found.share(0.05) == 1.0


@pytest.mark.parametrize("failure", [0.05, 0.2])
def test_finite_sample_bound_holds_for_rare_large_errors(failure):
    # one row in two hundred holds nearly everything: the margin would miss it
    n, count = 4000, 128
    squares = np.full(n, 1e-4)
    squares[: n // 200] = 1.0
    limit = 1.0

    def trial(rng):
        found = RatioEstimate(rng.choice(squares, count), n, np.ones(count))
        return found.mean + bernstein(found.terms, limit, failure) >= squares.mean()

    assert_fails_rarely(trial, failure=failure, trials=400, false_alarm=ALARM)


def test_finite_sample_bound_is_taken_where_it_is_as_small():
    assert promises(1.05, 1.0, 4096, 0.025)
    assert not promises(8.0, 1.0, 64, 0.025)
    assert not promises(100.0, 1.0, 4096, 0.025)
    assert not promises(math.inf, 1.0, 4096, 0.025)
    assert not promises(1.0, 0.0, 4096, 0.025)


def test_probabilities_hold_one_row_to_few_draws():
    error_profile = np.ones(1000)
    error_profile[3] = 1e12
    error_profile[5] = np.inf
    error_profile[7] = np.nan
    probabilities = importance_probabilities(error_profile, 100)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.max() * 100 <= 4
    assert probabilities.min() >= 0.5 / 1000 * (1 - 1e-9)
    # what overflowed, and what is not a number, is as likely as the largest
    assert probabilities[3] == probabilities[5] == probabilities[7]


@pytest.mark.parametrize("error_profile", [np.zeros(5), np.full(5, np.nan)])
def test_probabilities_are_uniform_where_nothing_is_known(error_profile):
    np.testing.assert_allclose(importance_probabilities(error_profile, 3), 0.2)


def test_errors_that_go_with_sizes_leave_little_to_chance():
    rng = np.random.default_rng(2)
    sizes = rng.exponential(size=128)
    alike = RatioEstimate(0.01 * sizes, math.inf, sizes=sizes)
    apart = RatioEstimate(0.01 * rng.permutation(sizes), math.inf, sizes=sizes)
    assert alike.upper_ratio(FIRST) == pytest.approx(0.01)
    assert apart.upper_ratio(FIRST) > 0.011


def test_no_size_makes_any_ratio_infinite():
    found = RatioEstimate(np.ones(4), 100, sizes=np.zeros(4))
    assert found.ratio == math.inf


def test_rows_that_were_chosen_count_for_themselves_only():
    # half of a sample of 100 were its largest, each of the others stands for nine
    squares = np.concatenate([np.full(10, 5.0), np.full(10, 1.0)])
    stand = np.concatenate([np.ones(10), np.full(10, 9.0)])
    found = RatioEstimate(
        squares,
        100.0,
        stand * 20 / 100,
        np.ones(20),
        certain=np.arange(20) < 10,
    )
    assert found.ratio == pytest.approx((50 + 90) / 100)
    # the variance of the sample of 100, whose values are known
    spread = math.sqrt((10 * 3.6**2 + 90 * 0.4**2) / 100 / 99)
    assert found.excess(Margin(2.0, 8.0)) == pytest.approx(2 * spread + 8 * 5 / 100)
