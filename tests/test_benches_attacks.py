"""The study of constructed heads: kinds, counts, and their exact bounds."""

import numpy as np
import pytest

from benches import attacks
from benches.heads import Head
from benches.made_heads import kinds, made_heads


def trial(error, certified, failure=0.05, tol=0.1, method="Polynomial"):
    return {
        "error": error,
        "certified": certified,
        "failure": failure,
        "tol": tol,
        "method": method,
    }


def test_there_are_many_kinds_and_each_makes_finite_heads():
    assert len(kinds()) >= 20
    for name, head in made_heads(1):
        assert name in kinds()
        assert all(x.dtype == np.float32 for x in head.arrays)
        assert all(np.isfinite(x).all() for x in head.arrays)


def test_answers_beyond_their_certificate_are_counted():
    trials = [trial(0.05, 0.06), trial(0.07, 0.06), trial(0.2, 0.06)]
    row = attacks.summary("kind", trials)
    counted = [row[x] for x in ("answers", "beyond certificate", "beyond tol")]
    assert counted == [3, 2, 1]
    assert row["worst error over certified"] == pytest.approx(0.2 / 0.06)
    total = attacks.total([row | {"holds": True}] * 2)
    assert (total["answers"], total["beyond certificate"], total["holds"]) == (6, 4, 2)


def test_exact_bounds_of_rates():
    # P(more than k of 100 at .05) is at most the alarm
    assert attacks.allowed(100, 0.05, 0.01) == 11
    assert attacks.allowed(100, 0.0, 0.01) == 0
    assert attacks.upper_rate(0, 100) == pytest.approx(1 - 0.01 ** (1 / 100))
    assert attacks.upper_rate(5, 5) == 1.0


def test_heads_of_one_width_are_joined(rng):
    heads = [Head(str(d), *rng.standard_normal((3, 10, d)), d**-0.5) for d in (4, 4, 8)]
    (both,) = attacks.joined(heads)
    assert len(both) == 20
    np.testing.assert_array_equal(both.query[10:], heads[1].query)
