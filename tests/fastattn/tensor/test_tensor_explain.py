"""What is said of a tensor head before, and after, it is answered."""

import numpy as np
import pytest

import fastattn
from fastattn import (
    Exact,
    Multipole,
    PathAttention,
    Polynomial,
    StrassenAttention,
    TensorWindow,
    approximate,
    explain,
)


def problem(n=200, d=4, p=2, size=1.0, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    query, *keys = rng.uniform(-size, size, (3, *lead, n, d))
    values = rng.uniform(0, 1, (2, *lead, n, p))
    return query, tuple(keys), tuple(values)


@pytest.mark.parametrize("guarantee", ["proven", "sampled"])
@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("n", [5, 200])
def test_the_first_accepted_is_what_runs(n, size, guarantee):
    inputs = problem(n, size=size)
    options = {"guarantee": guarantee, "rng": 0}
    (candidates,) = explain(*inputs, **options).heads
    taken = next(c for c in candidates if c.accepted)
    ran = approximate(*inputs, **options).plan
    assert taken.plan.method == ran.method
    if n == 200:
        # the polynomial and exact attention, and why not the former
        assert len(candidates) == 2
        refused = [c.plan.reason for c in candidates if not c.accepted]
        assert ["wider than" in x for x in refused] == ([True] if size > 1 else [])


def test_exact_attention_of_hours_is_no_candidate():
    inputs = problem(40000, size=4.0)
    (candidates,) = explain(*inputs, rng=0).heads
    assert not any(c.accepted for c in candidates)
    assert "would take hours" in candidates[-1].plan.reason


@pytest.mark.parametrize(
    "method",
    [
        Exact(),
        Polynomial(),
        TensorWindow((3, 2)),
        StrassenAttention(),
        PathAttention(),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_method_that_is_asked_for_is_the_only_candidate(method):
    (candidates,) = explain(*problem(20), method=method, rng=0).heads
    assert [type(c.plan.method) for c in candidates] == [type(method)]
    assert candidates[0].accepted
    assert candidates[0].plan.predicted_seconds > 0


def test_a_refused_method_says_why():
    inputs = problem(20, size=9.0)
    (candidates,) = explain(*inputs, method=Polynomial(), rng=0).heads
    assert not candidates[0].accepted
    assert "wider than" in candidates[0].plan.reason
    with pytest.raises(TypeError, match="no method for tensor attention"):
        explain(*inputs, method=Multipole())
    with pytest.raises(ValueError, match="expected two factors"):
        explain(inputs[0], inputs[1][:1], inputs[2][:1], method=StrassenAttention())


def test_runs_are_measured_against_exact_attention():
    explanation = explain(*problem(lead=(2,)), rng=0, run=True)
    for runs in explanation.runs:
        polynomial, exact = runs
        assert 0 < polynomial.error <= polynomial.certified <= 1e-2
        assert exact.error < 1e-12
    table = str(explanation).splitlines()
    assert table[0].split() == [
        "head", "method", "time", "error", "took", "certified", "measured", "why"
    ]  # fmt: skip
    assert len(table) == 5


def test_other_scores_have_nothing_to_be_measured_against():
    method = StrassenAttention()
    ((run,),) = explain(*problem(20), method=method, rng=0, run=True).runs
    assert np.isnan(run.error)
    assert run.certified < 1e-10


def test_masked_factors_are_exact():
    query, keys, values = problem(20)
    masks = (None, np.zeros(20, bool))
    (candidates,) = fastattn.explain(query, keys, values, key_mask=masks).heads
    assert [c.plan.method for c in candidates] == [Exact()]
