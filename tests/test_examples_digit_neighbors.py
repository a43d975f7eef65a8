"""The example of digits: the learned metric is no worse, and the index follows it."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

EXAMPLE = "digit_neighbors"


def test_it_runs_and_is_no_worse_than_euclidean(example, capsys):
    assert example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == example.ROUNDS + 3


@pytest.mark.slow
def test_learning_helps_with_any_split(example):
    x, y = load_digits(return_X_y=True)
    found = [example.run(x / 16, y, seed)[1] for seed in range(1, 4)]
    assert np.mean([last - first for first, *_, last in found]) > 0


def test_triplets_are_of_one_digit_and_of_another(example):
    x, y = load_digits(return_X_y=True)
    digit_of = {row.tobytes(): digit for row, digit in zip(x, y, strict=True)}
    stream = example.triplets(x, y, np.random.default_rng(0))
    for _ in range(50):
        one, near, far = (digit_of[point.tobytes()] for point in next(stream))
        assert one == near != far


def test_the_index_answers_as_one_built_anew(example):
    x, y = load_digits(return_X_y=True)
    index = example.filled(example.first_metric(x), x)
    learner = example.HingeGradient(index, rate=example.RATE)
    stream = example.triplets(x, y, np.random.default_rng(0))
    for _ in range(200):
        learner.update_triplet(*next(stream))
    anew = example.filled(index.metric, x)
    np.testing.assert_array_equal(
        index.kneighbors(x[:50], 5)[1], anew.kneighbors(x[:50], 5)[1]
    )
