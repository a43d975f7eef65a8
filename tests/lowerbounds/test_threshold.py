"""Ranks and degrees of sweeps, against their definitions; fits against known laws."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.polynomial import Chebyshev

from fastattn import RefusalError
from lowerbounds import (
    ThresholdRow,
    at_entry_bound,
    audit_methods,
    best_of_rank,
    fit_transitions,
    gap_inner_product,
    least_dimension,
    orthogonal_vectors,
    polynomial_within,
    reduce_to_attention,
    threshold_sweep,
)
from lowerbounds._factored import (
    degree_errors,
    least_degree,
    polynomial_outputs,
    predicted_errors,
    rank_of_degree,
)
from lowerbounds._tuples import products_of
from lowerbounds.threshold import FAMILIES
from tests import oracles
from tests.lowerbounds.matrices import factors, softmax_matrix


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("block", [1, 300, 1 << 23])
def test_logits_do_not_depend_on_blocks(order, block, monkeypatch):
    monkeypatch.setattr("lowerbounds._factored._BLOCK", block)
    given = factors(order, 7, 3)
    matrix = softmax_matrix(given, 1.0)
    whole = np.hstack(list(given.blocks()))
    np.testing.assert_allclose(whole, given.logits(given.query), atol=1e-14)
    weights = np.exp(whole)
    np.testing.assert_allclose(
        weights / weights.sum(axis=1, keepdims=True), matrix, atol=1e-14
    )
    assert given.logit_range() == (whole.min(), whole.max())
    answers = oracles.tensor_attention(
        given.query, given.keys, [x[:, None] for x in given.values]
    )[0]
    np.testing.assert_allclose(
        matrix @ products_of(given.values), answers[:, 0], atol=1e-12
    )


@pytest.mark.parametrize("half", [0.2, 3.0, 30.0])
def test_polynomials_are_truncated_chebyshev_expansions(half, rng):
    logits = rng.uniform(1 - half, 1 + half, (5, 9))
    worth = rng.choice([-1.0, 1.0], 9)
    found = polynomial_outputs(logits, worth, 1 - half, 1 + half, 12)
    domain = [1 - half, 1 + half]
    whole = Chebyshev.interpolate(lambda x: np.exp(x - 1 - half), 200, domain)
    for degree in range(13):
        weights = whole.truncate(degree + 1)(logits)
        want = weights @ worth / weights.sum(axis=1)
        np.testing.assert_allclose(found[degree], want, rtol=1e-6, atol=1e-8)


def test_errors_by_degree_are_those_of_the_answers():
    given, exponent = factors(2, 30, 4), 3.0
    errors = degree_errors(given, exponent, 12, 20, given.logit_range())
    logits = exponent * given.logits(given.query)
    truth = softmax_matrix(given, exponent) @ products_of(given.values)
    low, high = logits.min(), logits.max()
    answers = polynomial_outputs(logits[:20], products_of(given.values), low, high, 12)
    np.testing.assert_allclose(
        errors, np.abs(answers - truth[:20]).max(axis=1), atol=1e-12
    )
    assert errors[-1] < 1e-6 < errors[0]


def errors_of(given, exponent):
    return degree_errors(given, exponent, 20, 16, given.logit_range())


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("exponent", [0.5, 2.0, 6.0])
def test_the_formula_bounds_every_input_of_its_entries(order, exponent):
    predicted = predicted_errors(exponent, 20)
    rng = np.random.default_rng(0)
    for seed in range(3):
        given = factors(order, 16, 3, seed)
        # the worst: entries of the largest size, whose logits are at the ends
        ends = replace(
            given,
            query=rng.choice([-1.0, 1.0], given.query.shape),
            keys=tuple(rng.choice([-1.0, 1.0], key.shape) for key in given.keys),
        )
        for x in (given, ends):
            assert (errors_of(x, exponent) <= predicted + 1e-12).all()
    assert predicted[0] > predicted[-1]


def test_least_degree_lies_between_whole_degrees():
    errors = np.array([1.0, 1e-1, 1e-3, 1e-4])
    assert least_degree(errors, 1.0) == 0
    assert least_degree(errors, 1e-2) == pytest.approx(1.5)
    assert least_degree(errors, 1e-1) == pytest.approx(1.0)
    assert least_degree(errors, 1e-5) == math.inf
    # an error that rises again does not yet meet the tolerance
    assert least_degree(np.array([1e-3, 1.0, 1e-2]), 1e-1) == pytest.approx(1.5)
    assert least_degree(np.array([np.inf, 1e-2]), 1e-1) == 1
    assert least_degree(np.array([1.0, 0.0]), 1e-1) == 1


def test_ranks_of_whole_degrees_are_numbers_of_monomials():
    for d, degree in itertools.product((1, 3, 50), (0, 1, 4)):
        want = math.comb(d + degree, degree)
        assert rank_of_degree(d, degree) == pytest.approx(want)
    assert rank_of_degree(3, math.inf) == math.inf


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_measure_every_family(order, family):
    n, seen = 8, []
    rows = threshold_sweep(
        order,
        sizes=[n],
        families=[family],
        ratios=[0.3, 0.9],
        errors=[1e-1, 1e-3],
        rng=0,
        progress=seen.append,
    )
    assert rows == tuple(seen)
    assert [(x.ratio, x.error) for x in rows] == list(
        itertools.product([0.3, 0.9], [1e-1, 1e-3])
    )
    for row in rows:
        assert (row.order, row.family, row.n) == (order, family, n)
        assert row.entry_bound == pytest.approx(row.ratio * math.log(n) ** (1 / order))
        assert 0 <= row.numerical_rank <= row.numerical_rank_most <= n
        # the degree for these inputs is at most that for the worst ones
        assert row.degree <= row.predicted_degree
        assert row.rank <= row.predicted_rank
    # a smaller error takes more
    for coarse, fine in zip(rows[::2], rows[1::2], strict=True):
        assert coarse.rank <= fine.rank
        assert coarse.numerical_rank <= fine.numerical_rank


def test_a_polynomial_has_at_least_the_numerical_rank():
    for row in threshold_sweep(
        2, sizes=[64], families=["bounded"], errors=[1e-3], rng=0
    ):
        if math.isfinite(row.degree):
            whole = math.comb(row.d + math.ceil(row.degree), row.d)
            assert row.numerical_rank <= whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order"),
        ({"sizes": [1]}, "sizes"),
        ({"families": ["other"]}, "families: expected one of"),
        ({"ratios": [0.0]}, "ratios"),
        ({"errors": [-1.0]}, "errors"),
        ({"dimension": 0}, "dimension"),
        ({"sizes": [12], "families": ["satisfiability"]}, "power of two"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        threshold_sweep(**{"order": 2, "sizes": [8], "rng": 0} | options)


def made_up(n, ratio, order=2, **ranks):
    """A row of a sweep that obeys a law."""
    return ThresholdRow(
        order=order,
        family="bounded",
        n=n,
        d=8,
        ratio=ratio,
        entry_bound=ratio * math.log(n) ** (1 / order),
        error=1e-2,
        degree=0.0,
        predicted_degree=0.0,
        **dict.fromkeys(("numerical_rank", "numerical_rank_most"))
        | {"rank": 1.0, "predicted_rank": 1.0}
        | ranks,
    )


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("exponent", [1 / 3, 0.8])
def test_the_fit_finds_the_law_that_rows_obey(order, exponent):
    rows = []
    for n in (64, 256, 1024, 4096):
        # the rank is n at B = 1.3 (ln n) ^ exponent, a power law on both sides
        location = 1.3 * math.log(n) ** (exponent - 1 / order)
        for ratio in 0.1 * 1.3 ** np.arange(16):
            rank = n * (ratio / location) ** 3
            rows.append(made_up(n, float(ratio), order, rank=rank))
    (found,) = fit_transitions(rows)
    assert found.measure == "rank"
    assert found.exponent == pytest.approx(exponent)
    assert found.exponent_error < 1e-9
    assert found.locations == pytest.approx(
        [1.3 * math.log(n) ** (exponent - 1 / order) for n in found.sizes]
    )
    assert found.location == pytest.approx(np.mean(found.locations))
    assert found.spread == pytest.approx(np.std(found.locations, ddof=1))


def test_crossings_of_steps_and_infinities_lie_between_their_neighbours():
    rows = [
        made_up(64, 1.0, rank=1.0, numerical_rank=0),
        made_up(64, 4.0, rank=math.inf, numerical_rank=16),
    ]
    found = {x.measure: x for x in fit_transitions(rows)}
    assert set(found) == {"rank", "numerical_rank"}
    for x in found.values():
        assert x.locations == pytest.approx([2.0])
        assert math.isnan(x.spread)
        assert math.isnan(x.exponent)


def test_a_rank_that_never_crosses_is_left_out():
    assert fit_transitions([made_up(64, 1.0), made_up(64, 2.0)]) == ()


def test_a_fixed_budget_decides_no_better_than_chance():
    n = 32
    instances = [
        orthogonal_vectors(
            n, least_dimension(n, expected=1e-3), planted=seed % 2 == 0, rng=seed
        )
        for seed in range(20)
    ]
    made = [reduce_to_attention(x) for x in instances]
    methods = {
        "polynomial": polynomial_within(n * n),
        "best": best_of_rank(n),
        "exact": lambda x: np.exp(x.log_output()),
    }
    polynomial, best, exact = audit_methods(methods, {"planted": made})
    assert polynomial.right + polynomial.refused == 10
    assert best.right == exact.right == 20
    # far below the entry bound nothing stands out, for exact attention either
    low = [at_entry_bound(x, 0.1 * x.entry_bound) for x in made]
    assert all(row.right <= 12 for row in audit_methods(methods, {"low": low}))


def test_budgets_compute_what_they_say():
    made = reduce_to_attention(orthogonal_vectors(10, 12, rng=0))
    made = at_entry_bound(made, 1.5)
    logits = made.logits()
    truth = np.exp(made.log_output())
    np.testing.assert_allclose(best_of_rank(10)(made), truth, atol=1e-9)
    # degree 0: every tuple weighs the same
    np.testing.assert_allclose(polynomial_within(1)(made), 10 / 11)
    # degree 2 of 13 coordinates: 105 monomials
    low, high = logits.min(), logits.max()
    worth = made.products_of_values()
    for rank, degree in ((104, 1), (105, 2)):
        want = polynomial_outputs(logits, worth, low, high, degree)[-1]
        np.testing.assert_array_equal(polynomial_within(rank)(made), want)


def test_weights_that_sum_to_zero_are_refused(monkeypatch):
    made = reduce_to_attention(gap_inner_product(4, 64, correlation=0.9, rng=0))
    monkeypatch.setattr(
        "lowerbounds.budgets.polynomial_outputs", lambda *_: np.array([[np.inf]])
    )
    with pytest.raises(RefusalError, match="degree 0 sum to 0"):
        polynomial_within(1)(made)
