"""The command line: the library's own answers, one line for every mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest

import fastattn
from fastattn.cli import demo
from fastattn.cli import main as cli
from fastattn.cli.main import main
from fastattn.costs import rates
from fastattn.costs.policy import POLICY
from fastattn.files import formats
from fastattn.planning import calibration
from tests import oracles

pytest.importorskip("safetensors", reason="safetensors missing")


@pytest.fixture
def arrays(rng):
    """Grouped heads: three query heads share the keys and values of one."""
    shapes = {"query": (2, 3, 40, 8), "key": (2, 1, 30, 8), "value": (2, 1, 30, 5)}
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def source(tmp_path, arrays):
    path = tmp_path / "in.npz"
    np.savez(path, **arrays)
    return str(path)


def run(capsys, *arguments):
    """Run a command that must succeed; return what it printed to stdout."""
    assert main([str(x) for x in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *arguments):
    """Run a command that must be refused; return its one line."""
    assert main([str(x) for x in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastattn: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def load(path):
    """Read an output with the formats' own libraries."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file), json.loads(str(file["meta"]))
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found, json.loads(file.metadata()["meta"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_attend_answers_as_the_library(tmp_path, capsys, arrays, suffix, dtype):
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    formats.write_output(tmp_path / f"in{suffix}", arrays, {"layer": 3})
    out = tmp_path / f"out{suffix}"
    text = run(capsys, "attend", tmp_path / f"in{suffix}", "-o", out, "--seed", 5)
    assert "1,2   Exact()" in text
    found, meta = load(out)
    want = fastattn.approximate(**arrays, rng=5)
    assert found["out"].dtype == dtype
    np.testing.assert_array_equal(found["out"], want.value)
    np.testing.assert_array_equal(found["log_normalizer"], want.log_normalizer)
    assert meta["fastattn"] == fastattn.__version__
    assert meta["input_meta"] == {"layer": 3}
    heads = meta["heads"]
    assert [head["head"] for head in heads] == [
        [i, j] for i in (0, 1) for j in range(3)
    ]
    certificate = want.certificate
    assert [x["error"] for x in heads] == list(certificate.error.ravel())
    assert [x["failure"] for x in heads] == list(certificate.failure.ravel())
    assert [x["source"] for x in heads] == list(certificate.source.ravel())
    assert {x["norm"] for x in heads} == {certificate.norm}


def test_attend_takes_scale_and_causal(tmp_path, capsys, arrays, source):
    out = tmp_path / "out.npz"
    run(capsys, "attend", source, "-o", out, "--scale", -0.7, "--causal")
    found, _ = load(out)
    want, normalizer = oracles.attention(*arrays.values(), scale=-0.7, is_causal=True)
    np.testing.assert_allclose(found["out"], want, atol=1e-4)
    np.testing.assert_allclose(found["log_normalizer"], normalizer, atol=1e-4)


def test_attend_takes_method_and_guarantee(tmp_path, capsys, arrays):
    path, out = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(path, **{name: x[0, 0] * 0.3 for name, x in arrays.items()})
    options = ["--method", "polynomial", "--guarantee", "proven", "--tol", "0.1"]
    report = json.loads(run(capsys, "attend", path, "-o", out, "--json", *options))
    (head,) = report["heads"]
    assert head["head"] == []
    assert head["method"].startswith("Polynomial(degree=")
    assert (head["failure"], head["norm"]) == (0, "max")
    found, meta = load(out)
    assert found["out"].shape == (40, 5)
    assert report == {**meta, "output": str(out)}


def test_explain_prints_the_explanation(capsys, arrays, source):
    text = run(capsys, "explain", source, "--tol", "0.1")
    assert text == f"{fastattn.explain(**arrays, tol=0.1, rng=0)}\n"
    report = json.loads(run(capsys, "explain", source, "--tol", "0.1", "--json"))
    assert report["tol"] == 0.1
    assert [head["head"] for head in report["heads"]][:2] == [[0, 0], [0, 1]]
    assert report["heads"][0]["candidates"][0]["accepted"] is True


def test_explain_has_no_number_for_a_refusal(capsys, source):
    options = ["--guarantee", "proven", "--tol", "1e-12", "--method", "polynomial"]
    report = json.loads(run(capsys, "explain", source, "--json", *options))
    (candidate,) = report["heads"][0]["candidates"]
    assert candidate["accepted"] is False
    assert candidate["predicted_error"] is None
    assert "logits" in candidate["reason"]


def test_explain_runs_what_it_explains(capsys, source):
    report = json.loads(run(capsys, "explain", source, "--run", "--json"))
    for head in report["heads"]:
        (candidate,) = head["candidates"]
        assert candidate["seconds"] > 0
        assert 0 < candidate["measured"] <= candidate["certified"]
        assert candidate["failure"] == ""
    assert "measured" in run(capsys, "explain", source, "--run").splitlines()[0]


@pytest.mark.slow
def test_calibrate_puts_rates_in_force(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    rates.speed.cache_clear()
    monkeypatch.setitem(vars(POLICY.calibration), "rounds", 1)
    try:
        assert json.loads(run(capsys, "info", "--json"))["rates"] == "built in"
        report = json.loads(run(capsys, "calibrate", "--json"))
        assert report["path"] == str(tmp_path / "rates.json")
        info = json.loads(run(capsys, "info", "--json"))
        assert info["rates"] == report["path"]
        assert info["seconds a product"] == report["seconds a product"]
        for name, rate in report["rates"].items():
            assert info[f"rate {name}"] == rate > 0
        lines = run(capsys, "calibrate").splitlines()
        assert lines[0].split() == ["rate", "built", "in", "measured"]
        assert len(lines) == len(report["rates"]) + 2
    finally:
        rates.speed.cache_clear()


def test_calibrate_says_where_it_may_not_write(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(calibration, "calibrate", lambda: (rates.Rates(), 1e-11))
    assert "Not a directory" in refused(capsys, "calibrate")


def test_info_knows_this_machine(capsys):
    report = json.loads(run(capsys, "info", "--json"))
    assert report["numpy"] == np.__version__
    assert report["seconds a product"] > 0
    assert fastattn.__version__ in run(capsys, "info")


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--json"], marks=pytest.mark.slow)]
)
def test_demo_draws_a_picture(tmp_path, capsys, options):
    picture = tmp_path / "demo.png"
    text = run(
        capsys,
        "demo", "--samples", "minilm-mixed", "--tol", "0.1", "0.01",
        "--picture", picture, *options,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    if not options:
        assert "minilm-mixed  11    0.01" in text
        assert "measured <= certified <= tol: 24 of 24" in text
        return
    report = json.loads(text)
    assert report["held"] == len(report["measurements"]) == 24
    for row in report["measurements"]:
        assert row["measured"] <= row["certified"] <= row["tol"]
        assert row["time_ratio"] > 0


BAD_ARRAYS = {
    "columns": ({"key": np.ones((2, 1, 30, 9), "f4")}, "query has 8 columns and key"),
    "rows": ({"value": np.ones((2, 1, 31, 5), "f4")}, "key has 30 rows and value"),
    "lead": ({"key": np.ones((5, 1, 30, 8), "f4")}, "do not broadcast"),
    "flat": ({"query": np.ones(8, "f4")}, "query: expected at least 2 dimensions"),
    "heads": ({"query": np.ones((2, 0, 40, 8), "f4")}, "there are no heads"),
    "empty": ({"query": np.ones((2, 3, 0, 8), "f4")}, "query: expected a non-empty"),
    "nan": (
        {"value": np.full((2, 1, 30, 5), np.nan, "f4")},
        "head 0,0: value: expected finite numbers, got 150 NaN",
    ),
    "dtypes": ({"value": np.ones((2, 1, 30, 5))}, "one dtype expected"),
    "integers": ({"query": np.ones((2, 3, 40, 8), int)}, "query has dtype int64"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("command", ["attend", "explain"])
def test_bad_arrays_are_refused_in_one_line(tmp_path, capsys, arrays, name, command):
    changes, message = BAD_ARRAYS[name]
    path, out = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(path, **{**arrays, **changes})
    output = ["-o", out] if command == "attend" else []
    line = refused(capsys, command, path, *output)
    assert message in line
    assert str(path) in line
    assert list(tmp_path.iterdir()) == [path]


BAD_OPTIONS = {
    "-o out.npz --tol 0": "argument --tol: expected a number above 0, got '0'",
    "-o out.npz --tol nan": "argument --tol: expected a number above 0, got 'nan'",
    "-o out.npz --tol small": "argument --tol: expected a number above 0, got 'small'",
    "-o out.npz --scale inf": "argument --scale: expected a finite number",
    "-o out.npz --seed -1": "argument --seed: expected an integer >= 0, got '-1'",
    "-o out.npz --memory 0": "argument --memory: expected a size such as 1.5GB, got",
    "-o out.npz --memory all": "argument --memory: expected a size such as 1.5GB, got",
    "-o out.npz --memory 1.5PB": "argument --memory: expected a size such as 1.5GB",
    "-o out.npz --method fast": "argument --method: invalid choice: 'fast'",
    "-o out.npz --guarantee no": "argument --guarantee: invalid choice: 'no'",
    "-o out.npz --cause": "unrecognized arguments: --cause",
    "-o out.txt": "out.txt: expected a file name that ends in .npz or .safetensors",
    "-o nowhere/out.npz": "nowhere/out.npz: there is no folder nowhere",
    "": "the following arguments are required: -o/--output",
    "-o out.npz --tol 1e-12": "head 0,0: tol=1e-12",
    "-o out.npz --causal --method polynomial --tol 1e-9": "in.npz: head 0,0: Poly",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(
    tmp_path, capsys, monkeypatch, source, options
):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "attend", "in.npz", *options.split())
    assert BAD_OPTIONS[options] in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_bad_files_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("q, k\nv")
    (tmp_path / "empty.safetensors").touch()
    np.savez(tmp_path / "half.npz", q=np.ones(3), w=np.ones(3))
    np.savez(tmp_path / "pickle.npz", q=np.array([{}]), k=np.ones(3), v=np.ones(3))
    for name, message in {
        "missing.npz": "No such file",
        "missing.safetensors": "No such file",
        "text.npz": "not a zip file",
        "empty.safetensors": "the file is empty",
        "half.npz": "found q, w",
        "pickle.npz": "q holds pickled Python objects",
        "inputs.csv": "ends in .npz or .safetensors",
    }.items():
        line = refused(capsys, "explain", tmp_path / name)
        assert message in line
        assert name in line


def test_bad_demos_are_refused_before_they_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "measure", None)
    good = tmp_path / "demo.png"
    line = refused(capsys, "demo", "--picture", good, "--samples", "minilm")
    assert "gaussian-bounded" in line
    line = refused(capsys, "demo", "--picture", tmp_path / "demo.txt")
    assert "demo.txt: expected a file name that ends in one of" in line
    line = refused(capsys, "demo", "--picture", tmp_path / "no" / "demo.png")
    assert "there is no folder" in line
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(capsys, "demo", "--picture", good)
    assert "pip install 'fastattn[cli]'" in line
    assert list(tmp_path.iterdir()) == []


def test_without_safetensors_the_line_says_what_to_install(
    tmp_path, capsys, monkeypatch, source
):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    line = refused(capsys, "attend", source, "-o", tmp_path / "out.safetensors")
    assert "pip install 'fastattn[cli]'" in line


def test_an_interrupt_leaves_nothing_behind(tmp_path, capsys, monkeypatch, source):
    calls = []

    def interrupted(*arrays, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return approximate(*arrays, **options)

    approximate = fastattn.approximate
    monkeypatch.setattr(fastattn, "approximate", interrupted)
    assert main(["attend", source, "-o", str(tmp_path / "out.npz")]) == 130
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, monkeypatch, source):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.npy, "write_array", full)
    line = refused(capsys, "attend", source, "-o", tmp_path / "out.npz")
    assert "No space left" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_heads_are_read_one_at_a_time(tmp_path, monkeypatch, source):
    shapes = []

    def watched(*arrays, **options):
        shapes.append([x.shape for x in arrays])
        return approximate(*arrays, **options)

    approximate = fastattn.approximate
    monkeypatch.setattr(fastattn, "approximate", watched)
    assert main(["attend", source, "-o", str(tmp_path / "out.npz")]) == 0
    assert shapes == [[(40, 8), (30, 8), (30, 5)]] * 6


def test_progress_goes_to_a_terminal_only(tmp_path, capsys, monkeypatch, source):
    arguments = ["attend", source, "-o", str(tmp_path / "out.npz"), "--json"]
    run(capsys, *arguments)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "heads" in captured.err
    json.loads(captured.out)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2 << 30),
        ("300 mb", 300_000_000),
        ("4k", 4000),
        ("5e5", 500_000),
        ("17", 17),
        ("1e999TB", sys.maxsize),
    ],
)
def test_sizes_have_units(text, size):
    assert cli._bytes(text) == size


def test_help_and_version_exit_with_zero(capsys):
    for arguments in (["--help"], ["attend", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert fastattn.__version__ in capsys.readouterr().out


def test_importing_the_command_is_light():
    heavy = ["matplotlib", "rich", "numba", "scipy", "sklearn", "safetensors"]
    code = (
        "import sys, fastattn.cli.main; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_module_is_a_program_whose_reader_may_leave(source):
    command = [sys.executable, "-m", "fastattn.cli", "explain", source]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
