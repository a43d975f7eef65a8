"""The example of triples: every unit is right, and no pairwise one can be."""

import numpy as np
import pytest

from fastattn import Exact, attention

EXAMPLE = "match3"


def test_the_tensor_unit_solves_match3(example):
    rng = np.random.default_rng(1)
    inputs = example.instances(100, 64, 37, example.match3, rng)
    answers = [example.match3(x, 37) for x in inputs]
    # the inputs are no trivial ones: as many of each density
    quarters = np.minimum(4 * np.array([x.mean() for x in answers]), 3).astype(int)
    np.testing.assert_array_equal(np.bincount(quarters), 25)
    right = [
        np.array_equal(example.tensor_unit(x, 37), y)
        for x, y in zip(inputs, answers, strict=True)
    ]
    assert sum(right) == 100


def test_the_pairwise_unit_solves_match2_and_not_match3(example):
    rng = np.random.default_rng(2)
    inputs = example.instances(40, 64, 37, example.match2, rng)
    pairs = [(x, 37) for x in inputs]
    assert example.score(example.pairwise_unit, example.match2, pairs) == 40
    assert example.score(example.pairwise_unit, example.match3, pairs) < 20


def test_definitions_agree_with_loops(example):
    rng = np.random.default_rng(3)
    for _ in range(20):
        x = rng.integers(0, 11, 5)
        two = [any((a + b) % 11 == 0 for b in x) for a in x]
        three = [any((a + b + c) % 11 == 0 for b in x for c in x) for a in x]
        np.testing.assert_array_equal(example.match2(x, 11), two)
        np.testing.assert_array_equal(example.match3(x, 11), three)


@pytest.mark.parametrize("seed", range(3))
def test_no_pairwise_unit_is_right_on_four_inputs(example, seed):
    rng = np.random.default_rng(seed)
    inputs = example.four_inputs(64, 37, rng)
    # the proof: a unit says yes where a sum over tokens is positive, and the inputs to
    # say yes to hold the same tokens, together, as those to say no to
    np.testing.assert_array_equal(
        np.sort(inputs[:2], axis=None), np.sort(inputs[2:], axis=None)
    )
    wanted = np.array([example.match3(x, 37)[0] for x in inputs])
    np.testing.assert_array_equal(wanted, [True, True, False, False])
    got = [example.tensor_unit(x, 37)[0] for x in inputs]
    np.testing.assert_array_equal(got, wanted)
    for width in (1, 7, 64):
        query, key = 3 * rng.standard_normal((2, 37, width))
        value = rng.standard_normal((37, 1))
        out = [
            attention(query[x[:1]], key[x], value[x], method=Exact(), rng=0)[0, 0]
            for x in inputs
        ]
        assert example.best_of_threshold(np.array(out), wanted) < 4


def test_units_compose_functions_and_relations(example):
    rng = np.random.default_rng(4)
    for n in (2, 3, 30):
        table = rng.integers(0, n, n)
        np.testing.assert_array_equal(
            example.composed_function(table), table[table] == 0
        )
    for _ in range(20):
        first, second = example.relations(rng)
        assert 6 <= len(first) <= 8
        np.testing.assert_array_equal(
            example.composed_relation(first, second), (first.astype(int) @ second) > 0
        )


def test_it_runs(example, capsys):
    assert example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("100 of 100 inputs right" in line for line in lines) == 4
    assert "the tensor unit 4 right" in lines[-1]
