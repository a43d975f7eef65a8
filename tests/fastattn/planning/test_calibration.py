"""Rates: built in until measured ones are stored, never those of another machine."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import fastattn
from fastattn._ops.quantized import multiplies_quantized
from fastattn.costs import rates as _rates
from fastattn.costs.policy import POLICY
from fastattn.costs.rates import Rates, cache_path, keep, rates, speed, using
from fastattn.costs.work import exact_work, lowrank_work, multipole_work
from fastattn.planning import calibration
from fastattn.planning.calibration import Task, calibrate, fit
from sketching._ops.cpu import features

NAMES = [field.name for field in dataclasses.fields(Rates)]
OTHER = Rates(*(2.0 + i for i in range(len(NAMES))))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    speed.cache_clear()
    yield
    speed.cache_clear()


def works():
    sizes = (100, 200, 8, 5)
    counts = {"blocks": 7, "clusters": 3.0, "near": 20.0, "first_order": 11.0}
    return [
        exact_work(*sizes),
        lowrank_work(*sizes, 10, 3),
        lowrank_work(*sizes, 0, 50),
        *(multipole_work(*sizes, **{**counts, name: 400}) for name in counts),
    ]


def test_rates_are_built_in_where_nothing_was_measured():
    assert rates() == Rates()
    assert speed().source == "built in"


def test_rates_that_are_kept_are_in_force_here_and_in_the_next_process():
    before = works()
    path = keep(OTHER, 3e-11)
    assert rates() == OTHER
    assert works() != before
    assert _rates.seconds_a_product() == 3e-11
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    program = (
        "import fastattn.costs.rates as r; print(r.rates() == r.Rates(), r.speed())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == f"False {speed()}".split()


def test_only_explanations_measure_the_speed_of_this_machine(monkeypatch):
    asked = []
    monkeypatch.setattr(_rates, "_measured_product", lambda: asked.append(1) or 1e-11)
    x = np.random.default_rng(0).standard_normal((3, 1500, 8)).astype(np.float32) / 4
    for n in (64, 1500):
        fastattn.attention(*x[:, :n])
        for method in (None, fastattn.Polynomial(landmarks=8), fastattn.Multipole()):
            answer = fastattn.approximate(*x[:, :n], tol=0.3, method=method, rng=0)
        fastattn.attention_vjp(*x[:, :n], x[2, :n], tol=0.3, rng=0)
    fastattn.prepare(*x[1:], queries=x[0], tol=0.3, rng=0).query(x[0])
    fastattn.approximate(x[0, :9], (x[1, :9],) * 2, (x[2, :9],) * 2, tol=0.3, rng=0)
    explanation = fastattn.explain(*x, tol=0.3, rng=0)
    assert not asked
    assert answer.plan.predicted_seconds > 0
    assert "s  " in str(explanation)
    assert len(asked) > 1


def test_rates_may_be_put_in_force_for_a_while():
    with using(OTHER):
        assert rates() == OTHER
    assert rates() == Rates()


def test_importing_reads_no_file():
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text("{")
    program = "import warnings; warnings.simplefilter('error'); import fastattn"
    subprocess.run([sys.executable, "-c", program], check=True)


SPOILT = {
    "truncated": (lambda text: text[:60], "no complete set of rates"),
    "empty": (lambda _: "", "no complete set of rates"),
    "no object": (lambda _: "[1]", "no complete set of rates"),
    "negative": (lambda text: text.replace(": 2.0", ": -2.0"), "no complete set"),
    "not a number": (lambda text: text.replace(": 2.0", ": NaN"), "no complete set"),
    "text": (lambda text: text.replace(": 2.0", ': "2"'), "no complete set"),
    "another rate": (lambda text: text.replace("softmax", "hard"), "no complete set"),
    "newer": (lambda text: text.replace('"format": 3', '"format": 4'), "format is 4"),
    "other version": (
        lambda text: text.replace(fastattn.__version__, "9.9"),
        "fastattn is '9.9'",
    ),
    "foreign": (
        lambda text: text.replace('"processor": "', '"processor": "Other '),
        "processor is 'Other",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_does_not_fit_is_ignored_with_one_warning(name):
    spoil, message = SPOILT[name]
    path = keep(OTHER, 3e-11)
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    speed.cache_clear()
    with pytest.warns(UserWarning, match=message) as caught:
        found = [rates(), rates()]
    assert found == [Rates(), Rates()]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_a_folder_in_the_place_of_the_file_is_ignored_with_a_warning():
    cache_path().mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert rates() == Rates()


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    path = keep(OTHER, 3e-11)
    monkeypatch.setattr(_rates.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep(Rates(), 1e-11)
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["rates"] == dataclasses.asdict(OTHER)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert cache_path() == tmp_path / "cache" / "rates.json"
    monkeypatch.delenv("FASTATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path() == tmp_path / "xdg" / "fastattn" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path() == tmp_path / ".cache" / "fastattn" / "rates.json"


def tasks_of(count):
    return [Task(lambda: None, lambda i=i: works()[i]) for i in range(count)]


def test_the_fit_finds_the_rates_that_made_the_times():
    factors = np.linspace(0.6, 1.8, len(NAMES))
    built_in = np.array(dataclasses.astuple(Rates()))
    want = Rates(*(float(x) for x in factors * built_in))
    tasks = tasks_of(len(works()))
    with using(want):
        measured = np.array(works())
    found = fit(tasks, measured)
    with using(found):
        np.testing.assert_allclose(works(), measured, rtol=0.05)
    before = np.abs(np.log(np.array(works()) / measured)).max()
    assert before > 0.15


def test_the_fit_keeps_built_in_rates_where_the_times_agree_with_them():
    found = fit(tasks_of(3), np.array(works()[:3]))
    np.testing.assert_allclose(
        dataclasses.astuple(found), dataclasses.astuple(Rates()), rtol=1e-6
    )


def test_the_fit_stays_within_reach_of_the_built_in_rates():
    found = np.array(dataclasses.astuple(fit(tasks_of(4), np.full(4, 1e-3))))
    assert np.all(found >= np.array(dataclasses.astuple(Rates())) / 8.001)
    assert np.all(np.isfinite(found))


@pytest.mark.slow
def test_every_rate_shows_in_a_piece_and_comes_out_finite(monkeypatch):
    monkeypatch.setitem(vars(POLICY.calibration), "rounds", 1)
    found, product = calibrate()
    assert 1e-13 < product < 1e-7
    assert all(x > 0 for x in dataclasses.astuple(found))
    tasks = calibration._tasks(np.random.default_rng(0))
    base = [task.work() for task in tasks]
    # a processor without int8/bfloat16 matmuls has no rate for them
    here = multiplies_quantized(np.zeros(1, np.float32))
    absent = set() if here else {"coarse", "weight"}
    for name in set(NAMES) - absent:
        more = dataclasses.replace(Rates(), **{name: 2 * getattr(Rates(), name)})
        with using(more):
            assert max(b.work() / a for a, b in zip(base, tasks, strict=True)) > 1.05


def test_processors_of_one_name_are_told_apart(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : AMD EPYC\n", encoding="utf-8")
    monkeypatch.setattr(_rates, "Path", lambda _: path)
    for known in (["avx2"], ["avx2", "avx512f", "avx512bf16"]):
        monkeypatch.setattr(features, "has", known.__contains__)
        assert _rates.processor() == " ".join(["AMD EPYC", *known])
