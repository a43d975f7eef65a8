"""The study of clusters: its data, its pairs, and the text of a row."""

import numpy as np
import pytest

from benches import clustering
from benches.measure import Ratio
from benches.pages import markdown


def test_patches_are_cut_from_both_photos():
    found = clustering.patches(200, 4)
    assert found.shape == (200, 48)
    assert found.dtype == np.float32
    assert 0 <= found.min() < found.max() <= 1
    assert abs(found[:100].mean() - found[100:].mean()) > 0.01


def test_pairs_are_of_one_class_as_often_as_of_two():
    y = np.repeat([0, 1, 2], 10)
    pairs = list(clustering._pairs(y, 100, np.random.default_rng(0)))
    assert sum(y[i] == y[j] for i, j in pairs) == 50


def test_triplets_are_near_in_the_class_and_near_outside(rng):
    y = np.repeat([0, 1, 2], 10)
    x = rng.standard_normal((30, 2))
    squares = ((x[:, None] - x) ** 2).sum(axis=2)
    for i, near, far in clustering._triplets(x, y, 50, rng):
        assert i != near
        assert y[i] == y[near] != y[far]
        closer = squares[i] < squares[i, near]
        closer[i] = False
        assert (closer & (y == y[i])).sum() < 3
        assert ((squares[i] < squares[i, far]) & (y != y[i])).sum() < 10


def test_kmeans_is_compared_on_the_same_points(rng, monkeypatch):
    monkeypatch.setattr(
        clustering,
        "faster",
        lambda ours, theirs, **_: (ours(), theirs()) and Ratio(2, 1, 3),
    )
    x = rng.standard_normal((300, 4)).astype(np.float32)
    rows = clustering._kmeans("points", x, 5, True)
    assert [row["times faster"] for row in rows] == [2, 2]
    share = float(rows[0]["answer"].split()[1])
    assert share == pytest.approx(1, abs=0.15)
    assert markdown(rows).count("\n") == 3
