"""The studies of linear attention measure what their columns say."""

import numpy as np
import pytest

from benches import linear_figures
from benches.linear_heads import entropy, linear_heads, numerical_rank, softmax
from benches.single_location import MODELS, Task, bayes, known, learn, risk
from benches.softmax_vs_linear import Setting, recalled, success, tokens
from fastattn import Identity, RandomFeatures


def test_softmax_tells_the_classes_apart_and_linear_attention_does_not():
    found = success(Setting(), 10, np.random.default_rng(3))
    assert found["softmax"] >= 0.9
    assert found["linear"] == found["elu+1"] == 0


def test_softmax_needs_the_constant_the_gap_and_the_small_entries():
    for change in ({"C": 1.0}, {"a1": 0.3}, {"b": 0.7, "c": 0.3}):
        found = success(Setting(n=256, **change), 10, np.random.default_rng(3))
        assert found["softmax"] <= 0.1


def test_tokens_are_those_of_the_construction():
    setting = Setting(n=100, d=6, b=0.25, c=0.75)
    found = tokens(setting, 0.5, np.random.default_rng(0)) / np.sqrt(np.log(100))
    assert found.shape == (100, 6)
    np.testing.assert_array_equal(np.sort(found[:, 0])[-2:], [0, 0.5])
    np.testing.assert_array_equal(found[:, 1:5], 0.25 * np.tile(np.eye(4), (25, 1)))
    np.testing.assert_array_equal(found[:, 5], 0.75)


def test_recall_of_few_pairs_is_easy_and_of_many_needs_softmax():
    assert recalled(8, Identity(), 1.0) == 1
    assert recalled(1024, None, 16.0) == 1
    assert recalled(1024, Identity(), 1.0) < 0.2
    # a map whose weights vanish recalls nothing
    assert recalled(64, RandomFeatures(2), 1e6) < 0.2


def test_entropy_and_rank_of_known_weights():
    assert entropy(np.full((3, 8), 1 / 8)) == pytest.approx(np.log(8))
    assert entropy(np.eye(5)) == 0
    assert numerical_rank(np.eye(10), 1e-6) == 10
    assert numerical_rank(np.ones((10, 4)), 1e-6) == 1
    # a rank of r leaves a share 1 - r / 100 of the squares of an identity
    assert numerical_rank(np.eye(100), 0.5) == 75
    weights = softmax(np.zeros((2, 3)), np.zeros((4, 3)), 1.0)
    np.testing.assert_array_equal(weights, 0.25)


def test_softmax_attention_has_the_risk_of_bayes():
    task = Task(length=6, strength=2.0)
    tokens, target = task.draw(200, np.random.default_rng(0))
    best = np.mean((bayes(task, tokens) - target) ** 2)
    assert known(task, tokens, target) == pytest.approx(best)
    # no other query, and no other readout, does better on many draws
    moved, asked = task.directions()
    for weights in ((moved, asked), (2 * moved, 0.9 * asked)):
        assert risk(MODELS["softmax"], weights, tokens, target) > best
    # where the token stands out it is known
    tokens, target = Task(strength=50.0).draw(20, np.random.default_rng(1))
    np.testing.assert_allclose(bayes(Task(strength=50.0), tokens), target)


@pytest.mark.slow
def test_what_is_learned_of_one_token_is_near_bayes_for_softmax_only():
    task = Task(length=6, strength=4.0, d=4)
    seen = task.draw(200, np.random.default_rng(2))
    judged = task.draw(400, np.random.default_rng(3))
    variance = np.mean(judged[1] ** 2)
    found = {
        name: risk(model, learn(task, model, *seen), *judged) / variance
        for name, model in MODELS.items()
    }
    best = np.mean((bayes(task, judged[0]) - judged[1]) ** 2) / variance
    assert found.pop("softmax") < best + 0.05
    assert min(found.values()) > best + 0.05


def test_panels_stand_in_rows_of_a_page():
    figure, panels = linear_figures._figure(5, "title")
    assert len(panels) == len(figure.axes) == 5
    assert figure.get_figwidth() < 10
    assert len({panel.get_subplotspec().rowspan.start for panel in panels}) == 2


DRAWN = ["draw_two_classes", "draw_recall", "draw_heads", "draw_single_location"]


@pytest.mark.parametrize("draw", DRAWN)
def test_pictures_are_drawn(draw, tmp_path):
    rows = {
        "draw_two_classes": [
            {"sweep": "m", "at": x, "draws": 2, "softmax": x, "linear": 0.0}
            for x in (1.0, 2.0)
        ],
        "draw_recall": [
            {"method": "softmax", "pairs": x, "pairs over state": 1.0, "accuracy": 1.0}
            for x in (16, 64)
        ],
        "draw_single_location": [
            {"sweep": sweep, "at": x, "Bayes": 0.1, "softmax": 0.2, "linear": 0.9}
            for sweep in ("strength", "length")
            for x in (4.0, 16.0)
        ],
        "draw_heads": [
            {"head": "h", "n": 4, "keys of a row": 2.0, "rank at 10 %": 1, "relu": 0.5}
        ],
    }[draw]
    path = tmp_path / "picture.png"
    getattr(linear_figures, draw)({"rows": rows}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_row_of_real_heads_has_every_error():
    row = linear_heads(quick=True, data=[])[2]
    assert row["head"].startswith("minilm")
    assert all(np.isfinite(x) for x in row.values() if isinstance(x, float))
