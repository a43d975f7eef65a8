"""The gates of the planner: each closes where it says, with a sentence."""

import re

import numpy as np
import pytest

from fastattn import explain
from fastattn.costs.policy import POLICY
from fastattn.planning.gates import (
    CLUSTER_GATES,
    LOW_RANK_GATES,
    Facts,
    clusters_beat_quantized,
    enough_logits,
    enough_logits_for_clusters,
    low_rank_beats_quantized,
    low_variance,
    no_quick_low_rank,
    refusal,
)
from fastattn.problem.head import Head


def head(n, causal=False):
    x = np.zeros((n, 4), np.float32)
    return Head(x, x, x, 1.0, np.arange(1, n + 1) if causal else None)


def facts(n=8192, variance=1.0, rounded=None, low_ranks=(), causal=False):
    return Facts(head(n, causal), variance, rounded, low_ranks)


EXACT = facts().exact


@pytest.mark.parametrize(
    ("gate", "is_open", "is_closed", "reason"),
    [
        (low_variance, facts(variance=6.0), facts(variance=6.1), "variance is 6.1"),
        (low_rank_beats_quantized, facts(variance=4.0), None, ""),
        (
            low_rank_beats_quantized,
            facts(n=16384, rounded=1.0),
            facts(n=8192, rounded=1.0),
            "a low rank can be faster only from 1.7e[+]08 logits",
        ),
        (
            clusters_beat_quantized,
            facts(rounded=1.0, variance=16.0),
            facts(rounded=1.0, variance=15.0),
            "clusters can be faster only from 7.2e[+]07 logits",
        ),
        (
            clusters_beat_quantized,
            facts(),
            facts(rounded=1.0, variance=0.0),
            "clusters can be faster",
        ),
        (enough_logits_for_clusters, facts(), facts(n=8191), "too few to search"),
        (
            enough_logits_for_clusters,
            facts(n=16384, low_ranks=(1.0,)),
            facts(low_ranks=(1.0,)),
            "a low rank is accepted",
        ),
        (
            enough_logits_for_clusters,
            facts(n=23171, causal=True),
            facts(n=23169, causal=True),
            "too few to search",
        ),
        (
            no_quick_low_rank,
            facts(low_ranks=(0.16 * EXACT,)),
            facts(low_ranks=(0.3 * EXACT, 0.15 * EXACT)),
            "a low rank takes 15% of the work",
        ),
    ],
)
def test_gates_close_where_they_say(gate, is_open, is_closed, reason):
    assert gate(is_open) == ""
    assert is_closed is None or re.search(reason, gate(is_closed))


def test_small_heads_are_not_planned():
    assert enough_logits(head(4096), rounded=False) == ""
    assert enough_logits(head(1449), rounded=True) == ""
    assert enough_logits(head(1448), rounded=True).startswith("1448 x 1448 logits")
    assert "too few" in enough_logits(head(4095), rounded=False)
    assert "8386560 logits" in enough_logits(head(4095, causal=True), rounded=False)


def test_the_first_closed_gate_is_the_reason():
    closed = facts(n=8191, variance=7.0, rounded=1.0)
    assert refusal(LOW_RANK_GATES, closed) == low_variance(closed)
    assert refusal(CLUSTER_GATES, closed) == clusters_beat_quantized(closed)
    assert refusal(LOW_RANK_GATES, facts()) == ""


def test_explanations_hold_the_reasons(monkeypatch):
    monkeypatch.setitem(vars(POLICY.auto), "few_logits", 0)
    query, key, value = np.random.default_rng(0).standard_normal((3, 300, 4)) * 4
    reasons = str(explain(query, key, value, tol=0.1, rng=0))
    assert "above the 6 up to which a low rank may be accurate" in reasons
    assert "90000 logits are too few to search clusters of the keys" in reasons
