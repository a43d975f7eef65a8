"""The studies of hard instances: counts, resumption and pictures."""

import json
import math

import pytest

from benches import figures, hardness, threshold
from benches.__main__ import markdown
from lowerbounds import ThresholdRow, reduce_to_attention, threshold_sweep


@pytest.fixture
def small(monkeypatch):
    """Sweeps of two sizes of one order, without times."""
    monkeypatch.setattr(threshold, "QUICK", {2: (16, 32)})
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
    sweeps = [(2, "bounded", 16)]
    rows = threshold.computed(sweeps, (0.5,), part)
    monkeypatch.setattr(threshold, "cell", lambda *_: pytest.fail("computed again"))
    assert threshold.computed(sweeps, (0.5,), part) == rows
    monkeypatch.setattr(threshold, "code_of_cells", lambda: "other")
    monkeypatch.setattr(threshold, "cell", lambda *_: [ThresholdRow(**rows[0])])
    assert threshold.computed(sweeps, (0.5,), part) == rows[:1]


def test_a_sweep_ends_once_all_ranks_have_crossed():
    def rows(rank, numerical_rank):
        return [
            {"n": 8, "error": x, "rank": rank, "numerical_rank": numerical_rank}
            for x in threshold.ERRORS
        ]

    assert not threshold.is_over(rows(8.0, 8))
    assert not threshold.is_over(rows(math.inf, 1))
    assert threshold.is_over(rows(80.0, 2))
    assert threshold.is_over(rows(math.inf, None))
    # a numerical rank may fall again where entries are large
    assert threshold.is_over(rows(8.0, 2) + rows(math.inf, 1))
    assert not threshold.is_over(rows(math.inf, 2) + rows(8.0, 2))


def test_the_table_has_a_row_for_each_crossing(small, tmp_path):
    rows = threshold.threshold(quick=True, results=tmp_path)
    assert {row["measure"] for row in rows} >= {"rank", "time"}
    for row in rows:
        assert len(row["sizes"]) == len(row["locations"]) > 0
        for _, ratios, shares in row["curves"]:
            assert len(ratios) == len(shares)
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
    row = ThresholdRow(2, "bounded", 16, 3, 1.0, 1.7, 0.1, None, *[math.inf] * 4)
    fit = threshold.fit_locations(2, "bounded", 0.1, "rank", {16: 1.0})
    assert threshold.curves_of([row], fit) == [[16, [1.0], [None]]]


def test_the_polynomial_is_timed_against_exact_attention():
    for order, n in ((2, 256), (3, 32)):
        (row,) = threshold_sweep(
            order, sizes=[n], families=["bounded"], ratios=[0.8], errors=[1e-2], rng=0
        )
        assert 0 < threshold.time_over_exact(row) < math.inf


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
