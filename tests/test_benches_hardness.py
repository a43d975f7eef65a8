"""The studies of hard instances: counts, resumption and pictures."""

import json
import math

import numpy as np
import pytest

from benches import deciding, figures, hardness, threshold
from benches.pages import markdown
from lowerbounds import (
    ThresholdRow,
    at_entry_bound,
    audit_methods,
    polynomial_within,
    reduce_to_attention,
    threshold_sweep,
)


@pytest.fixture
def small(monkeypatch):
    """Sweeps of two sizes of one order, without times."""
    monkeypatch.setattr(threshold, "QUICK", {2: (16, 32)})
    monkeypatch.setattr(deciding, "FAMILIES", ("planted",))
    monkeypatch.setattr(threshold, "RATIOS", (0.3, 0.5, 0.7, 1.0, 1.4, 2.0))
    monkeypatch.setattr(threshold, "FAMILIES", ("bounded", "planted"))
    monkeypatch.setattr(threshold, "time_over_exact", lambda row: row.ratio / 0.7)


def test_a_sweep_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    ran, cell = [], threshold.cell

    def counted(*key):
        ran.append(key)
        if len(ran) == 5:
            raise KeyboardInterrupt
        return cell(*key)

    monkeypatch.setattr(threshold, "cell", counted)
    with pytest.raises(KeyboardInterrupt):
        threshold.threshold(quick=True, results=tmp_path)
    rows = threshold.threshold(quick=True, results=tmp_path)
    # 3 ratios of 2 families and 2 sizes, and the one that was interrupted again
    assert len(ran) == 13
    assert len(set(ran)) == 12
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(threshold, "cell", cell)
    again = threshold.threshold(quick=True, results=tmp_path)
    assert json.dumps(rows) == json.dumps(again)


def test_other_code_begins_anew(tmp_path, monkeypatch):
    part = tmp_path / "part.jsonl"

    def computed():
        with part.open("a") as file:
            return threshold.computed([(2, "bounded", 16)], (0.5,), part, file)

    def decided():
        with part.open("a") as file:
            return threshold.decision_rows((16,), part, file, 2)

    rows, decisions = computed(), decided()
    monkeypatch.setattr(threshold, "cell", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(deciding, "decided", lambda *_: pytest.fail("decided again"))
    assert computed() == rows
    assert json.dumps(decided()) == json.dumps(decisions)
    monkeypatch.setattr(threshold, "code_of_cells", lambda: "other")
    monkeypatch.setattr(threshold, "code_of_decisions", lambda: "other")
    monkeypatch.setattr(threshold, "cell", lambda *_: [ThresholdRow(**rows[0])])
    assert computed() == rows[:1]
    other = {"stated": 1.0, "shares": {"exact": [0.5] * 12}, "least": 2.0}
    monkeypatch.setattr(deciding, "decided", lambda *_: other)
    assert decided()[0]["crossed"] == "never"


def test_a_sweep_ends_once_all_ranks_have_crossed():
    def rows(rank, *numerical_ranks, n=8):
        ranks = numerical_ranks * (1 if len(numerical_ranks) > 1 else 3)
        return [
            {"n": n, "error": x, "rank": rank, "numerical_rank": y}
            for x, y in zip(threshold.ERRORS, ranks, strict=True)
        ]

    assert not threshold.is_over(rows(8.0, 8))
    assert not threshold.is_over(rows(math.inf, 1))
    assert threshold.is_over(rows(80.0, 2))
    assert threshold.is_over(rows(math.inf, None))
    # a numerical rank may fall again where entries are large
    assert threshold.is_over(rows(8.0, 2) + rows(math.inf, 1))
    assert not threshold.is_over(rows(math.inf, 2) + rows(8.0, 2))
    # where it was not computed it has not crossed
    assert not threshold.is_over(rows(8.0, 1) + rows(math.inf, None))
    # at large n the numerical rank of the largest error is not computed
    assert not threshold.is_over(rows(math.inf, 1, 2, 2))
    assert threshold.is_over(rows(math.inf, 1, 2000, 2000, n=8000))
    assert not threshold.is_over(rows(math.inf, 1, 1999, 2000, n=8000))


def test_large_matrices_are_looked_at_at_every_other_entry_bound(monkeypatch):
    monkeypatch.setattr(threshold, "_SPARSE", 64)
    for ratio, known in ((threshold.RATIOS[4], True), (threshold.RATIOS[5], False)):
        for row in threshold.cell(2, "bounded", 64, ratio):
            assert (row.numerical_rank is not None) is known


def test_both_ends_of_a_bracket_are_in_the_table():
    def row(ratio, low, high):
        return ThresholdRow(
            2, "bounded", 64, 4, ratio, ratio, 1e-2, low, high, 1.0, 1.0, 1.0, 1.0
        )

    rows = [row(1.0, 4, 4), row(2.0, 8, 16), row(4.0, 16, 32)]
    (found,) = threshold.summaries(rows)
    assert (found["measure"], found["at n"]) == ("numerical_rank", "64: 2.000..4.000")
    ratios, low, high = [1.0, 2.0, 4.0], [1 / 16, 1 / 8, 1 / 4], [1 / 16, 1 / 4, 1 / 2]
    assert found["curves"] == [[64, ratios, low, high]]


def test_the_table_has_a_row_for_each_crossing(small, tmp_path):
    rows = threshold.threshold(quick=True, results=tmp_path)
    assert {row["measure"] for row in rows} >= {"rank", "time", "decided, exact"}
    for row in rows:
        assert len(row["sizes"]) == len(row["locations"])
        assert len(row["sizes"]) > 0 or row["crossed"] == "never"
        for _, ratios, *shares in row["curves"]:
            assert {len(x) for x in shares} == {len(ratios)}
    (timed,) = (row for row in rows if row["measure"] == "time")
    assert timed["locations"] == pytest.approx([0.7] * len(timed["locations"]))
    table = markdown(rows)
    assert "locations" not in table
    assert table.count("\n") == len(rows) + 1


def test_a_sweep_is_drawn(small, tmp_path):
    rows = threshold.threshold(quick=True, results=tmp_path)
    path, picture = tmp_path / "threshold.json", tmp_path / "threshold.png"
    path.write_text(json.dumps({"study": "threshold", "rows": rows}))
    assert figures.main([str(path), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_infinite_rank_is_left_out_of_the_picture():
    row = ThresholdRow(2, "bounded", 16, 3, 1.0, 1.7, 0.1, None, None, *[math.inf] * 4)
    fit = threshold.fit_locations(2, "bounded", 0.1, "rank", {16: 1.0})
    assert threshold.curves_of([row], fit) == [[16, [1.0], [None]]]


def test_the_polynomial_is_timed_against_exact_attention():
    for order, n in ((2, 256), (3, 32)):
        (row,) = threshold_sweep(
            order, sizes=[n], families=["bounded"], ratios=[0.8], errors=[1e-2], rng=0
        )
        assert 0 < threshold.time_over_exact(row) < math.inf


@pytest.mark.parametrize("family", deciding.FAMILIES)
def test_budgets_decide_as_the_deciders_of_the_library(family):
    n, count = 32, 4
    found = deciding.decided(family, n, count)
    made = [reduce_to_attention(x) for x in deciding.instances(family, n, count)]
    assert sum(x.instance.has_solution for x in made) == count / 2
    deciders = {
        "exact": lambda x: np.exp(x.log_output()),
        "n^1 monomials": polynomial_within(n),
        "n^2 monomials": polynomial_within(n * n),
    }
    assert set(found["shares"]) == set(deciders)
    for i in (0, 6, 11):
        scaled = [at_entry_bound(x, deciding.FACTORS[i] * x.entry_bound) for x in made]
        for row in audit_methods(deciders, {family: scaled}):
            assert found["shares"][row.method][i] == row.right / count
    # what the reduction states is enough for exact attention, and for a polynomial of
    # more than n^2 monomials
    assert found["shares"]["exact"][-1] == 1.0
    assert 2 < found["least"] < math.inf
    assert found["stated"] == pytest.approx(
        np.mean([x.entry_bound for x in made]) / math.sqrt(math.log(n))
    )


@pytest.mark.parametrize("construction", ["calibrated", "padded"])
@pytest.mark.parametrize("order", [2, 3])
def test_reductions_are_checked(order, construction):
    made = [
        reduce_to_attention(
            hardness.draw("orthogonal", order, 8, seed), construction=construction
        )
        for seed in range(6)
    ]
    row = hardness.checked("orthogonal", order, 8, construction, made)
    assert (row["right"], row["with a solution"]) == (6, 3)
    assert (row["flipped by the error"], row["flipped by 4 times it"]) == (0, 6)
    deep = order == 3 and construction == "padded"
    assert row["computed"] == ("in logarithms" if deep else "in float64")


def test_formulas_are_checked_against_a_solver():
    pytest.importorskip("pysat.solvers", reason="python-sat is not installed")
    row = hardness.solved(2, 8, 6)
    assert row["right"] == row["instances"] == 6
    assert row["n"] == 16


def test_an_audit_counts_every_method():
    rows = hardness.audited(
        {
            "proven Exact": hardness.PROVEN["proven Exact"],
            "Relu": hardness.OTHERS["linear Relu"],
        },
        {"planted": [hardness.draw("orthogonal", 2, 8, seed) for seed in range(4)]},
    )
    exact, relu = rows
    assert (exact["right"], exact["certified"], exact["certified and wrong"]) == (
        4,
        4,
        0,
    )
    assert relu["right"] + relu["wrong"] == 4
    assert relu["wrong"] > 0
    total, other = hardness.totals(rows + rows)
    assert (total["family"], total["method"]) == ("all", "proven Exact")
    assert (total["instances"], total["right"]) == (8, 8)
    assert total["right among answers"] == 1.0
    assert other["right among answers"] == relu["right among answers"]


def test_half_of_the_formulas_are_satisfiable():
    for order in (2, 3):
        instances = hardness.formulas(order, 8, 6)
        assert [x.has_solution for x in instances] == [True] * 3 + [False] * 3
        assert all(len(x) == 8 for y in instances for x in y.vectors)


def test_decisions_are_drawn(tmp_path):
    made = [
        reduce_to_attention(hardness.draw("orthogonal", 2, 8, seed)) for seed in (0, 1)
    ]
    methods = {"mean": hardness.OTHERS["mean of the values"]}
    rows = hardness.shares(2, "orthogonal", 8, made, methods)
    assert rows[0]["shares"] == [0.5] * len(rows[0]["ratios"])
    assert rows[0]["right at the stated bound"] == 0.5
    path, picture = tmp_path / "decisions.json", tmp_path / "decisions.png"
    path.write_text(json.dumps({"study": "decisions", "rows": rows}))
    assert figures.main([str(path), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
