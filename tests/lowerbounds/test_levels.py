"""Counts of keys by level give the answers of the keys."""

import numpy as np
import pytest

from lowerbounds import (
    at_entry_bound,
    from_cnf,
    gap_inner_product,
    orthogonal_vectors,
    polynomial_within,
    random_formula,
    reduce_to_attention,
)
from lowerbounds._levels import Levels
from lowerbounds.budgets import degree_within

INSTANCES = {
    "planted": orthogonal_vectors(24, 40, rng=0),
    "none": orthogonal_vectors(24, 80, planted=False, rng=1),
    "gap": gap_inner_product(24, 96, rng=2),
    "satisfiability": from_cnf(random_formula(8, rng=3)),
}


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("name", INSTANCES)
def test_counts_are_those_of_the_logits(name, block, monkeypatch):
    monkeypatch.setattr("lowerbounds._levels._BLOCK", block)
    made = reduce_to_attention(INSTANCES[name])
    levels, logits = Levels.of(made), made.logits()
    np.testing.assert_allclose(logits[:, -1], levels.padded, rtol=1e-12)
    for counts, row in zip(levels.counts, logits, strict=True):
        spread = np.repeat(levels.logits, counts.astype(int))
        np.testing.assert_allclose(np.sort(spread), np.sort(row[:-1]), atol=1e-9)
    assert levels.counts.any(axis=0).all()


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 2.0])
def test_outputs_are_those_of_the_keys(name, factor):
    made = reduce_to_attention(INSTANCES[name])
    levels = Levels.of(made)
    scaled = at_entry_bound(made, factor * made.entry_bound)
    np.testing.assert_allclose(
        levels.exact(factor**2), np.exp(scaled.log_output()), rtol=1e-9, atol=1e-300
    )
    for rank in (1, 24**2):
        degree = degree_within(made.query.shape[1], rank)
        np.testing.assert_allclose(
            levels.polynomials(factor**2, degree)[degree],
            polynomial_within(rank)(scaled),
            rtol=1e-8,
        )


def test_a_solution_far_above_the_padded_key_takes_all():
    made = reduce_to_attention(INSTANCES["planted"])
    output = Levels.of(made).exact(1e6)
    assert output.max() == 1.0
    assert np.isfinite(output).all()


def test_the_degree_of_a_budget_is_the_largest_within():
    assert [degree_within(3, rank) for rank in (1, 3, 4, 9, 10)] == [0, 0, 1, 1, 2]


def test_only_one_padded_key_of_pairs_is_taken():
    padded = reduce_to_attention(INSTANCES["planted"], construction="padded")
    tensor = reduce_to_attention(orthogonal_vectors(4, 20, parts=3, rng=0))
    for made in (padded, tensor):
        with pytest.raises(ValueError, match="made: expected order 2 and one padded"):
            Levels.of(made)
