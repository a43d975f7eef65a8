"""The example of clusters: a metric of a few pairs finds them, medians keep them."""

import numpy as np
import pytest

EXAMPLE = "clustering"


@pytest.mark.parametrize("seed", [1, 2])
def test_the_metric_of_pairs_finds_the_groups(example, seed):
    euclidean, _, pairs, batches, means, medians = example.compare(seed).values()
    assert euclidean < 0.3
    assert min(pairs, batches, medians) > 0.9
    assert means < medians


def test_pairs_are_of_one_group(example):
    x, groups = np.arange(40.0).reshape(20, 2), np.arange(20)
    rng = np.random.default_rng(0)
    # every point its own group: all differences are zero, and no metric is made
    with pytest.raises(ValueError, match="covariance"):
        example.metric_of_pairs(x, groups, rng)


def test_agreement_ignores_names(example):
    groups = np.array([0, 0, 1, 1, 2, 2])
    assert example.agreement(groups, (groups + 1) % 3) == 1


def test_it_runs(example, capsys):
    assert example.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
