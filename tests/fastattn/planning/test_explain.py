"""Explanations: the same choice as the run, and what every candidate came to."""

import math

import numpy as np
import pytest

from fastattn import (
    Exact,
    Multipole,
    Polynomial,
    RefusalError,
    approximate,
    explain,
    load_sample,
)
from fastattn.costs.policy import POLICY
from tests import oracles


def inputs(n=1200, d=8, spread=0.5, lead=()):
    rng = np.random.default_rng(5)
    arrays = rng.standard_normal((3, *lead, n, d)).astype(np.float32)
    return spread * arrays[0], arrays[1], arrays[2]


def test_without_run_there_are_no_runs():
    assert explain(*inputs(), rng=0).runs == ()


@pytest.mark.parametrize(
    "method", [Exact(), Polynomial(rank=20, landmarks=30), Multipole()]
)
@pytest.mark.parametrize("tol", [0.5, 1e-3])
def test_a_run_has_the_error_of_the_definition(method, tol):
    query, key, value = inputs()
    found = explain(query, key, value, tol=tol, method=method, rng=1, run=True)
    ((candidate,),), ((run,),) = found.heads, found.runs
    assert run.seconds > 0
    assert run.failure == ""
    assert run.error <= run.certified
    # the method is concrete: alone it errs by about as much, whatever the seed
    concrete = candidate.plan.method
    answer = approximate(query, key, value, tol=9.0, method=concrete, rng=2)
    truth, _ = oracles.attention(query, key, value)
    error = oracles.frobenius_error(answer.value, truth)
    assert run.error == pytest.approx(error, rel=1.0, abs=1e-6)


def test_large_heads_are_judged_on_rows(monkeypatch):
    query, key, value = inputs()
    options = {"method": Polynomial(rank=9, landmarks=9), "rng": 0, "run": True}
    ((whole,),) = explain(query, key, value, tol=0.5, **options).runs
    monkeypatch.setitem(vars(POLICY.auto), "explained_logits", 300 * len(key))
    ((some,),) = explain(query, key, value, tol=0.5, **options).runs
    assert some.error != whole.error
    assert some.error == pytest.approx(whole.error, rel=0.5)


def test_refused_candidates_run_too(monkeypatch):
    query, key, value = (x[0] for x in load_sample("minilm-diffuse"))
    monkeypatch.setitem(vars(POLICY.auto), "few_logits", 0)
    found = explain(query, key, value, tol=1e-3, rng=0, run=True)
    (candidates,), (runs,) = found.heads, found.runs
    refused = [
        run
        for candidate, run in zip(candidates, runs, strict=True)
        if run and not candidate.accepted
    ]
    assert refused
    assert all(run.failure or 0 < run.error <= run.certified for run in refused)
    assert runs[-1].error < 1e-3


def test_what_is_not_concrete_is_not_run():
    arrays = inputs(n=64)
    found = explain(*arrays, method=Multipole(), guarantee="proven", run=True)
    assert found.runs == ((None,),)
    assert "has no proven bound" in str(found)


def test_a_run_that_fails_says_why(monkeypatch):
    def refuse(*_):
        raise RefusalError("no luck")

    monkeypatch.setattr(Exact, "solve", refuse)
    found = explain(*inputs(n=64), method=Exact(), run=True)
    ((run,),) = found.runs
    assert math.isnan(run.seconds)
    assert run.failure == "no luck"
    assert "when run: no luck" in str(found)


def test_proven_runs_are_judged_in_the_largest_norm():
    query, key, value = inputs(n=300, spread=0.1)
    found = explain(
        query, key, value, tol=0.1, guarantee="proven", method=Polynomial(), rng=0,
        run=True,
    )  # fmt: skip
    ((candidate,),), ((run,),) = found.heads, found.runs
    answer = approximate(
        query, key, value, tol=0.1, guarantee="proven", method=Polynomial(), rng=0
    )
    truth, _ = oracles.attention(query, key, value)
    assert candidate.accepted
    assert run.error <= run.certified
    assert run.error == pytest.approx(np.abs(answer.value - truth).max(), rel=0.5)


def test_the_answer_to_run_is_that_of_any_array_library(xp):
    arrays = xp.asarrays(*inputs(n=100, lead=(2,)))
    found = explain(*arrays, tol=0.5, rng=0, run=True, method=Polynomial(rank=5))
    assert len(found.runs) == 2
    assert all(run.error <= run.certified for (run,) in found.runs)


def test_the_table_is_as_wide_as_its_words():
    found = explain(*inputs(n=100, lead=(2, 1)), tol=0.5, rng=0, run=True)
    head, *lines = str(found).splitlines()
    assert head.split() == [
        "head", "method", "time", "error", "took", "certified", "measured", "why",
    ]  # fmt: skip
    assert [line.split()[:3] for line in lines] == [
        ["0,0", "->", "Exact()"],
        ["1,0", "->", "Exact()"],
    ]
    # numbers end where the words of the head end
    for word in ("certified", "measured"):
        end = head.index(word) + len(word)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines)
