"""Runs of studies: stored, resumed and compared results, and their page."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from benches import __main__ as runs
from benches import compare, maps, pages, resume, sketches
from benches.figures import FIGURES
from benches.measure import Ratio, spread
from benches.studies import FAMILIES, STUDIES, Study


def study(name="one", *, times=(2.0, 1.9, 2.2), **options):
    """A study that measures nothing, and how often it ran."""
    calls = []

    def run(*, quick):
        """The notes of the study."""
        calls.append(quick)
        return [{"n": 4, **spread("times faster", Ratio(*times))}]

    run.__module__ = "benches.imports"
    return Study(name, "family", run, ("n",), **options), calls


@pytest.fixture
def registry(monkeypatch):
    """Put studies in place of the real ones."""

    def put(*studies):
        monkeypatch.setattr(runs, "STUDIES", {x.name: x for x in studies})
        monkeypatch.setattr(runs, "FAMILIES", ("family",))

    return put


def test_every_family_has_studies_and_every_picture_a_study():
    assert FAMILIES[:2] == ("exact attention", "polynomials")
    assert set(FIGURES) <= set(STUDIES)
    # a name on the command line is one or the other
    assert not set(FAMILIES) & set(STUDIES)
    for one in STUDIES.values():
        assert one.run.__doc__
        wanted = runs.wanted(
            one.run, dict.fromkeys(runs._parser().parse_args([]).__dict__)
        )
        assert "quick" in wanted


def test_a_run_writes_tables_and_one_page(registry, tmp_path, capsys):
    first, _ = study()
    other, ran = study("other", needs=("no_such_package",))
    registry(first, other)
    assert runs.main(["--quick", "--results", str(tmp_path)]) == 0
    assert not ran
    assert "no_such_package is not installed" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"one.json", "one.md", "index.md"}
    record = json.loads((tmp_path / "one.json").read_text())
    assert record["command"] == "python -m benches one --threads 1 --quick"
    assert record["environment"]["cores"]
    page = (tmp_path / "index.md").read_text()
    assert "## Family" in page
    assert "| 4 | 2 | 1.9 | 2.2 |" in page
    assert "No result: no_such_package is not installed." in page


def test_quick_results_do_not_go_where_full_ones_do(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "full")
    monkeypatch.setattr(runs, "QUICK", tmp_path / "quick")
    registry(study()[0])
    for arguments, folder in ((["--quick"], "quick"), ([], "full")):
        assert not (tmp_path / folder).exists()
        assert runs.main(arguments) == 0
        assert (tmp_path / folder / "one.json").exists()


def test_a_study_that_fails_leaves_the_others(registry, tmp_path, capsys):
    broken = Study("bad", "family", lambda: 1 / 0, ())
    good, ran = study("good")
    registry(broken, good)
    assert runs.main(["--results", str(tmp_path)]) == 1
    assert len(ran) == 1
    assert "failed: bad" in capsys.readouterr().err
    assert (
        "No result: it failed in the last run." in (tmp_path / "index.md").read_text()
    )


def test_a_run_goes_on_with_what_is_missing_or_changed(registry, tmp_path, monkeypatch):
    first, ran = study()
    second, others = study("two")
    registry(first)
    arguments = ["--resume", "--results", str(tmp_path)]
    runs.main(arguments)
    registry(first, second)
    runs.main(arguments)
    assert (len(ran), len(others)) == (1, 1)
    # other sizes, other code, another environment
    runs.main([*arguments, "--quick"])
    assert (len(ran), len(others)) == (2, 2)
    runs.main([*arguments, "--quick"])
    assert (len(ran), len(others)) == (2, 2)
    monkeypatch.setattr(runs, "code_of", lambda _: "other")
    runs.main([*arguments, "--quick"])
    assert (len(ran), len(others)) == (3, 3)
    monkeypatch.setattr(runs, "environment", lambda: {"processor": "other", **PLACE})
    runs.main([*arguments, "--quick"])
    assert (len(ran), len(others)) == (4, 4)
    runs.main([*arguments[1:], "--quick"])
    assert (len(ran), len(others)) == (5, 5)


PLACE = dict.fromkeys(("commit", "numpy", "numba", "torch"))


def test_unknown_studies_are_named(capsys):
    with pytest.raises(SystemExit):
        runs.main(["nothing"])
    assert "unknown study ['nothing']" in capsys.readouterr().err
    chosen = [x.name for x in runs._chosen(["tensor attention", "exact"], None)]
    rest = "sampled", "wide", "order"
    assert chosen == ["exact", "tensor", *(f"tensor-{x}" for x in rest)]


def test_code_of_a_study_is_its_own_and_what_it_imports():
    files, names = resume._closure("benches.causal")
    stems = {path.stem for path in files}
    assert stems == {"causal", "cases", "measure"}
    assert names == {"fastattn"}
    files, names = resume._closure("benches.threshold")
    assert {"threshold", "resume", "progress", "measure"} <= {x.stem for x in files}
    assert "lowerbounds" in names
    assert resume.code_of("benches.causal") == resume.code_of("benches.causal")
    assert resume.code_of("benches.causal") != resume.code_of("benches.imports")


@pytest.mark.parametrize(
    ("after", "more", "less"),
    [
        ((2.1, 1.8, 2.4), "same within spread", "same within spread"),
        ((2.6, 2.45, 2.8), "better", "worse"),
        ((1.3, 1.2, 1.4), "worse", "better"),
        # ranges lie apart, but medians differ by less than runs do
        ((2.1, 2.09, 2.12), "same within spread", "same within spread"),
        ((math.nan, math.nan, math.nan), "missing: after", "missing: after"),
    ],
)
def test_verdicts_know_the_spread(after, more, less):
    before = (2.0, 1.95, 2.05)
    for name, verdict in (("times faster", more), ("time over torch", less)):
        first, second = (
            compare.measured(spread(name, Ratio(*x))) for x in (before, after)
        )
        found = compare.verdict(
            first.get(name),
            second.get(name),
            more_is_better=name.startswith("times faster"),
        )
        assert found == verdict


def test_single_measurements_have_no_verdict():
    once, again = Ratio(1.0, 1.0, 1.0), Ratio(9.0, 9.0, 9.0)
    assert "no verdict" in compare.verdict(once, again, more_is_better=True)


def test_ranges_of_the_same_thing_seldom_lie_apart(rng):
    from scipy.special import comb

    trials, found = 4000, 0
    for _ in range(trials):
        first, second = rng.lognormal(0, 0.5, (2, 5))
        ratios = [Ratio(np.median(x), min(x), max(x)) for x in (first, second)]
        found += compare.verdict(*ratios, more_is_better=True) != "same within spread"
    assert 0 < found / trials < 2 * 2 / comb(10, 5)


def test_results_are_compared_case_by_case(registry, tmp_path, capsys):
    before, after = tmp_path / "before", tmp_path / "after"
    registry(study()[0], study("gone")[0], study("worse")[0])
    runs.main(["--results", str(before)])
    registry(study(times=(2.1, 2.0, 2.3))[0], study("worse", times=(1.0, 0.9, 1.1))[0])
    runs.main(["--results", str(after)])
    capsys.readouterr()
    arguments = ["--compare", str(before), str(after)]
    assert runs.main(arguments) == 0
    text = capsys.readouterr().out
    assert (
        "| worse | 4 | times faster | 2.00 (1.90..2.20) | 1.00 (0.90..1.10) |" in text
    )
    assert "| gone | all |  |  |  | missing: after |" in text
    assert "1 same within spread" in text
    assert runs.main([*arguments, "--fail-on-worse"]) == 1
    files = [str(folder / "one.json") for folder in (before, after)]
    assert runs.main(["--compare", *files, "--fail-on-worse"]) == 0
    assert runs.main(["--compare", str(tmp_path), str(tmp_path)]) == 2
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a result"):
        compare.loaded(tmp_path / "other.json")


def test_other_commands_and_machines_are_not_compared():
    record = {
        "command": "a",
        "environment": {"processor": "x", "commit": "1"},
        "rows": [{"n": 4, "right": 3}, {"n": 4, "right": 2}],
        "case": ["n"],
    }
    places = record["environment"]
    for change, word in (
        ({"command": "b"}, "not comparable: `a`, then `b`"),
        (
            {"environment": places | {"processor": "y"}},
            "not comparable: other processor",
        ),
        ({"environment": places | {"commit": "2"}}, "same row"),
        ({"rows": [{"n": 4, "right": 3}, {"n": 4, "right": 1}]}, "other row"),
        ({"rows": record["rows"][:1]}, "missing: after"),
    ):
        found = list(compare.compared({"s": record}, {"s": record | change}))
        assert found[-1].verdict == word


def test_tables_have_every_column_and_dashes():
    table = pages.markdown([{"a": 1.0, "b": [1]}, {"a": math.nan, "c": None}])
    assert table.splitlines() == [
        "| a | c |",
        "| --- | --- |",
        "| 1 | - |",
        "| - | - |",
    ]


def test_a_long_table_is_cut_on_the_page_of_all(tmp_path):
    one, _ = study("long")
    record = {
        "study": "long",
        "command": "c",
        "environment": PLACE | {"processor": "p"},
        "notes": "Notes.",
        "rows": [{"n": np.int64(i)} for i in range(40)],
    }
    pages.keep(tmp_path, record)
    pages.write_index(tmp_path, [one], {})
    page = (tmp_path / "index.md").read_text()
    assert "The first 24 of 40 rows; [all](long.md)." in page
    assert json.loads((tmp_path / "long.json").read_text())["rows"][7] == {"n": 7}
    assert (tmp_path / "long.md").read_text().count("\n| ") == 42


def test_the_winner_is_the_fastest_that_keeps_the_tolerance():
    rows = [
        {"n": 4, "entries": 1.0, "method": name, "times faster than torch": speed}
        for name, speed in ((maps.AUTO, 9.0), ("a", 2.0), ("b", 3.0), ("c", math.nan))
    ]
    assert maps.winners(rows)[4, 1.0]["method"] == "b"


def test_an_attack_is_told_the_truth_by_exact_answers():
    x = np.eye(8)[:2]
    index = SimpleNamespace(
        query=lambda q: SimpleNamespace(value=np.linalg.norm(q[:, None] - x, axis=2))
    )
    found = list(sketches.climb(index, x[0], [0, 5, 20], np.random.default_rng(0)))
    assert [steps for steps, _ in found] == [0, 5, 20]
    for _, told in found:
        assert told == pytest.approx([1.0] * 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["growth", "map", "sketch-error", "attack"])
def test_curves_are_drawn(name, tmp_path):
    times = spread("time over a product", Ratio(1.0, 0.9, 1.2))
    speeds = spread("times faster than torch", Ratio(2.0, 1.9, 2.2))
    rows = {
        "growth": [
            {"method": "m", "n": n, "error": 0.1, "fitted exponent": 1.0, **times}
            | {"MB beyond inputs and output": 0.0}
            for n in (4, 8)
        ]
        + [{"method": "torch SDPA: torch is not installed"}],
        "map": [
            {"n": 4, "entries": b, "method": m, "ran": "Exact", **speeds}
            for b in (1.0, 2.0)
            for m in (maps.AUTO, "Exact()")
        ],
        "sketch-error": sketches.sketch_error(quick=True),
        "attack": [
            {"mode": "m", "steps": steps, "told over the truth": 1.0}
            | {"least of five": 0.9, "most of five": 1.1, "claimed error": 0.3}
            for steps in (0, 10)
        ],
    }[name]
    FIGURES[name]({"rows": rows}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
