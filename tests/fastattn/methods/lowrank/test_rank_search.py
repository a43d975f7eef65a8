"""Predicted sizes of low ranks, and the landmarks and coordinates behind them."""

from dataclasses import replace

import numpy as np
import pytest

from fastattn import load_sample
from fastattn.methods.lowrank.basis import Basis, Hermite
from fastattn.methods.lowrank.landmarks import PivotedCholesky, one_lloyd_step
from fastattn.methods.lowrank.pilots import Pilots
from fastattn.methods.lowrank.rank_search import search_ranks
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.problem.head import Head
from tests import oracles
from tests.fastattn.methods.lowrank.test_lowrank import PLANS, error_of, gaussian, plan


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_more_pivots_continue_where_fewer_stopped(parts):
    _, key, _ = gaussian()
    hermite = Hermite.of(np.ones(6), 1)
    logs = np.zeros(len(key))
    pivots = PivotedCholesky(key, logs, hermite, np.random.default_rng(0), parts)
    left, few = [1.0], None
    for count in (64, 128, 192):
        assert pivots.add_until(count)
        assert len(pivots) == count
        left.append(pivots.residual_trace_ratio)
        few = pivots.landmarks if few is None else few
    assert np.all(np.diff(left) < 0)
    np.testing.assert_array_equal(pivots.landmarks[:64], few)
    assert len(np.unique(pivots.landmarks, axis=0)) == 192
    assert not pivots.add_until(192)


@pytest.mark.parametrize("parts", [1, 2])
def test_pivots_stop_where_keys_have_no_more_to_tell(parts):
    key = np.eye(3, 6, dtype=np.float32)[np.arange(300) % 3]
    hermite = Hermite.of(np.ones(6), 1)
    pivots = PivotedCholesky(
        key, np.zeros(300), hermite, np.random.default_rng(0), parts
    )
    while pivots.add_until(100):
        pass
    assert len(np.unique(pivots.landmarks, axis=0)) == 3
    assert len(pivots) <= 3 * parts
    assert pivots.residual_trace_ratio < 1e-2


def test_lloyd_moves_landmarks_to_the_means_of_their_keys():
    rng = np.random.default_rng(0)
    centers = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
    y = np.repeat(centers, 400, axis=0) + rng.uniform(-1, 1, (1200, 2))
    y, weight = y.astype(np.float32), rng.uniform(1, 2, 1200).astype(np.float32)
    lonely = np.array([[1e3, 1e3]], np.float32)
    moved = one_lloyd_step(y, weight, np.concatenate([centers + 1, lonely]))
    for j in range(3):
        mine = slice(400 * j, 400 * (j + 1))
        want = np.average(y[mine], axis=0, weights=weight[mine])
        np.testing.assert_allclose(moved[j], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(moved[3], lonely[0])


def test_whitening_whitens_the_queries():
    query, key, value = gaussian(n=1000, d=4, spread=0.3)
    query = query * [1, 2, 3, 4] + 1
    whitening = Whitening.fit(PlanningSample(query, query[:0], key, value, 0.5))
    x = query @ whitening.to_query - whitening.origin
    np.testing.assert_allclose(np.cov(x[:, :-1].T), np.eye(4), atol=0.2)
    y = (key - whitening.center) @ whitening.to_key
    logits = 0.5 * query @ key.T
    again = x[:, :-1] @ y[:, :-1].T + y[:, -1] + x[:, -1:]
    np.testing.assert_allclose(again, logits, atol=1e-5)
    fewer = Basis.fitting(whitening, Hermite.of(whitening.spread, 2), landmarks=False)
    assert len(fewer.spread) == 1


def small_cost(rank, landmarks):
    return rank + 2 * landmarks


def assert_predicted(inputs, tol, limit=2000):
    query, key, value = inputs
    head, rng = Head(*inputs, query.shape[1] ** -0.5), np.random.default_rng(0)
    sample = PlanningSample.of(head, rng)
    found = search_ranks(head, sample, tol, rng, small_cost, limit)
    assert found[0].accepted
    assert [x.cost for x in found] == sorted(x.cost for x in found)
    for one in found:
        assert one.cost == small_cost(one.rank, one.landmarks) <= limit
        structure = one.empty
        assert (structure.rank, structure.landmarks) == (one.rank, one.landmarks)
        error, reliable = error_of(structure.insert(key, value), query, key, value)
        assert reliable > 0.97 * len(query)
        assert error / 2 < one.error < 2 * error
        assert error < 1.25 * tol


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("tol", [0.1, 0.07])
def test_predictions_are_true_for_real_heads(head, tol):
    assert_predicted([x[head] for x in load_sample("minilm-diffuse")], tol)


def test_predictions_are_true_for_gaussian_heads():
    inputs = gaussian(n=8192, m=8192, d=32, p=32, spread=0.3**0.5)
    assert_predicted(inputs, 0.05)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_more_polynomials_than_needed(seed):
    query, key, value = gaussian(n=8192, m=8192, d=8, p=16, spread=0.7, seed=seed)
    head, rng = Head(query, key, value, 8**-0.5), np.random.default_rng(seed)
    found, *_ = search_ranks(
        head, PlanningSample.of(head, rng), 0.02, rng, small_cost, 2000
    )
    assert found.accepted
    assert found.landmarks == 0
    filled = found.empty.insert(key, value)
    # rows of the largest spread are computed exactly and do not count
    spread = np.linalg.norm(query - query.mean(axis=0), axis=1)
    easy = query[spread <= np.sort(spread)[-129]]
    truth, _ = oracles.attention(easy, key, value)

    def error(structure):
        return oracles.frobenius_error(structure.query(easy)[0], truth)

    assert error(filled) <= 0.02
    assert error(filled.first(found.rank // 2)) > 0.02


def test_pilots_leave_out_what_is_computed_exactly():
    query, key, value = gaussian(n=4096, m=4096)
    query[:100] *= 4
    head, rng = Head(query, key, value, 6**-0.5), np.random.default_rng(0)
    sample = PlanningSample.of(head, rng)
    pilots = Pilots(head, sample, Whitening.fit(sample), 0.1)
    held = np.linalg.norm(sample.held, axis=1)
    assert len(pilots.held) < len(held)
    assert np.linalg.norm(pilots.held, axis=1).max() < held.max()
    assert len(pilots.probabilities) == len(pilots.held)


@pytest.mark.parametrize("head", [0, 1])
def test_sharp_heads_are_refused_at_once(head):
    query, key, value = (x[head] for x in load_sample("minilm-sharp"))
    problem, rng = Head(query, key, value, 32**-0.5), np.random.default_rng(0)
    (found,) = search_ranks(
        problem, PlanningSample.of(problem, rng), 0.1, rng, small_cost, 2000
    )
    assert not found.accepted
    assert "variance" in found.reason


def test_no_size_beyond_the_cost_allowed_is_accepted():
    inputs = [x[0] for x in load_sample("minilm-diffuse")]
    head, rng = Head(*inputs, 32**-0.5), np.random.default_rng(0)
    sample = PlanningSample.of(head, rng)
    for limit in (1, 100, 200):
        for one in search_ranks(head, sample, 0.02, rng, small_cost, limit):
            assert not one.accepted
            assert one.reason


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_few_distinct_keys_are_planned_for(distinct):
    query, key, value = gaussian(n=2000, m=2000, spread=0.5)
    key, value = key[np.arange(2000) % distinct], value[np.arange(2000) % distinct]
    head, rng = Head(query, key, value, 6**-0.5), np.random.default_rng(0)
    for tol in (0.1, 1e-6):
        for one in search_ranks(
            head, PlanningSample.of(head, rng), tol, rng, small_cost, 2000
        ):
            assert one.accepted == (one.reason == "")
            if one.accepted:
                structure = one.empty.insert(key, value)
                assert error_of(structure, query, key, value)[0] < 1.25 * tol + 1e-6


@PLANS
def test_first_functions_are_a_structure_of_their_own(rank, landmarks):
    query, key, value = gaussian()
    whole = plan(query, key, value, rank, landmarks).insert(key, value)
    for count in (1, rank, rank + landmarks // 2, rank + landmarks):
        few = whole.first(count)
        assert few.rank == min(count, rank)
        assert few.rank + few.landmarks == count
        again = few.emptied()
        assert again.query(query)[2].sum() == 0
        # the basis made anew from its parts
        old = few.basis
        again = replace(
            again, basis=Basis.factorised(old.whitening, old.hermite, old.landmarks)
        )
        got, want = few.query(query), again.insert(key, value).query(query)
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)
