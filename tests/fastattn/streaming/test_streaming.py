"""Heads larger than the memory that they may use: read in blocks, with one result."""

import json
import subprocess
import sys

import numpy as np
import pytest

import fastattn
from fastattn.cli import main as cli
from fastattn.costs.policy import POLICY
from fastattn.files import formats
from fastattn.streaming import attend as streaming
from fastattn.streaming import rows as file_rows
from fastattn.streaming.rows import FileHead, FileRows
from tests import oracles
from tests.chance import assert_fails_rarely

TINY = "20KB"


@pytest.fixture
def arrays(rng):
    """Logits of low rank, with more keys than a block."""
    query, key = (
        0.5 * rng.standard_normal((n, 8)).astype(np.float32) for n in (700, 5000)
    )
    return {"query": query, "key": key, "value": rng.standard_normal((5000, 3))}


def as_dtype(arrays, dtype):
    return {name: x.astype(dtype) for name, x in arrays.items()}


def save(folder, arrays, suffix=".npz"):
    """Write a file; numpy.savez keeps byte order and Fortran order."""
    path = folder / f"in{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        formats.write_output(path, arrays, {})
    return path


def attend(path, *options, memory=TINY):
    """Run the command; return the output and what it says of its heads."""
    out = path.with_name("out.npz")
    arguments = ["attend", path, "-o", out, "--memory", memory, *options]
    assert cli.main([str(x) for x in arguments]) == 0
    with np.load(out) as file:
        heads = json.loads(str(file["meta"]))["heads"]
        return file["out"], file["log_normalizer"], heads


def refused(capsys, command, path, *options, memory=TINY):
    """Run a command that must be refused; return its one line."""
    output = ["-o", path.with_name("out.npz")] if command == "attend" else []
    arguments = [command, path, *output, "--memory", memory, *options]
    assert cli.main([str(x) for x in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


STORED = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rows", [1024, 7])
def test_rows_of_a_file_are_those_of_the_array(
    tmp_path, rng, monkeypatch, stored, rows
):
    monkeypatch.setattr(file_rows, "_TAKEN", rows)
    x = rng.standard_normal((2, 1, 50, 4)).astype(np.float32)
    path = save(tmp_path, dict.fromkeys("qkv", STORED[stored](x)))
    found = FileRows("key", formats.read_stored(path)[0], (1, 6))
    assert (found.shape, found.dtype) == ((50, 4), np.float32)
    np.testing.assert_array_equal(found.rows(3, 20), x[1, 0, 3:20])
    numbers = np.sort(rng.choice(50, 20, replace=False))
    np.testing.assert_array_equal(found.take(numbers), x[1, 0, numbers])


CASES = {
    "auto": ("Polynomial(rank=", ["--tol", 0.1]),
    "auto, small tol": ("Exact()", ["--tol", 1e-5]),
    "auto proven": ("Exact()", ["--tol", 0.1, "--guarantee", "proven"]),
    "polynomial": ("Polynomial(degree=", ["--method", "polynomial", "--tol", 0.1]),
    "exact": ("Exact()", ["--method", "exact"]),
    "exact proven": ("Exact()", ["--method", "exact", "--guarantee", "proven"]),
}


# half precision does not hold the small tolerance
KINDS = [
    (name, dtype)
    for name in CASES
    for dtype in (np.float16, np.float32, np.float64)
    if (name, dtype) != ("auto, small tol", np.float16)
]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_certificates_hold(tmp_path, arrays, name, dtype):
    arrays = as_dtype(arrays, dtype)
    method, options = CASES[name]
    suffix = ".safetensors" if dtype == np.float16 else ".npz"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors missing")
    found, logarithm, (head,) = attend(save(tmp_path, arrays, suffix), *options)
    assert head["method"].startswith(method)
    assert found.dtype == dtype
    truth, normalizer = oracles.attention(**arrays)
    assert oracles.error_in(head["norm"], found, truth) <= head["error"]
    if method == "Exact()":
        np.testing.assert_allclose(logarithm, normalizer, atol=1e-5)


@pytest.mark.parametrize("stored", STORED)
def test_exact_is_exact_for_grouped_heads(tmp_path, rng, stored):
    query = rng.standard_normal((2, 3, 30, 4)).astype(np.float32)
    key, value = (
        STORED[stored](rng.standard_normal((2, 1, 3000, c)).astype(np.float32))
        for c in (4, 5)
    )
    path = save(tmp_path, {"query": query, "key": key, "value": value})
    # larger blocks than there are queries, and smaller ones than there are keys
    found, logarithm, heads = attend(path, "--method", "exact", "--scale", -1.5)
    whole, whole_log, _ = attend(
        path, "--method", "exact", "--scale", -1.5, memory="1GB"
    )
    assert [x["head"] for x in heads] == [[i, j] for i in (0, 1) for j in range(3)]
    assert all("streamed in 3 blocks" in x["source"] for x in heads)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(logarithm, whole_log, rtol=0, atol=1e-5)


def test_many_queries_are_answered_in_blocks(tmp_path, rng):
    query, key, value = (
        0.5 * rng.standard_normal((m, 4)).astype(np.float32) for m in (3000, 500, 500)
    )
    arrays = {"query": query, "key": key, "value": value}
    for options in (["--method", "exact"], ["--method", "polynomial", "--tol", 0.2]):
        found, _, (head,) = attend(save(tmp_path, arrays), *options)
        truth, _ = oracles.attention(**arrays)
        assert oracles.frobenius_error(found, truth) <= head["error"]


def test_bfloat16_is_widened_piece_by_piece(tmp_path, arrays, monkeypatch):
    header, data = {}, b""
    for name, x in as_dtype(arrays, np.float32).items():
        half = (x.view(np.uint32) >> 16).astype("<u2")
        offsets = [len(data), len(data) + half.nbytes]
        entry = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": offsets}
        header[name], data = entry, data + half.tobytes()
        arrays[name] = (half.astype(np.uint32) << 16).view(np.float32)
    text = json.dumps(header).encode()
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    sizes, native = [], file_rows.native

    def watched(x):
        sizes.append(len(x))
        return native(x)

    monkeypatch.setattr(file_rows, "native", watched)
    found, _, (head,) = attend(path, "--tol", 0.1)
    truth, _ = oracles.attention(**arrays)
    assert oracles.frobenius_error(found, truth) <= head["error"] <= 0.1
    assert max(sizes) == file_rows._FEWEST


@pytest.mark.parametrize("method", ["auto", "polynomial"])
def test_sums_that_miss_over_all_keys_are_not_used(
    tmp_path, capsys, arrays, monkeypatch, method
):
    plan = streaming._planned
    # as if the sample were unlike the keys, and its error smaller
    monkeypatch.setattr(
        streaming, "_planned", lambda method, task: plan(method, task._replace(tol=0.3))
    )
    path = save(tmp_path, as_dtype(arrays, np.float32))
    options = ["--tol", 1e-4, "--method", method]
    if method == "polynomial":
        assert "misses tol=0.0001 over all keys" in refused(
            capsys, "attend", path, *options
        )
        return
    found, _, (head,) = attend(path, *options)
    assert head["method"] == "Exact()"
    assert "misses tol=0.0001 over all keys" in head["reason"]
    truth, _ = oracles.attention(**arrays)
    assert oracles.frobenius_error(found, truth) <= head["error"] <= 1e-4


def test_far_keys_may_not_fill_memory(tmp_path, arrays, monkeypatch):
    monkeypatch.setitem(vars(POLICY.streaming), "memory_share", 1 << 20)
    monkeypatch.setitem(vars(POLICY.streaming), "keys", 1024)
    arrays = as_dtype(arrays, np.float32)
    arrays["key"][::500] *= 5
    _, _, (head,) = attend(save(tmp_path, arrays), "--tol", 0.1)
    assert head["method"] == "Exact()"
    assert "too many far keys" in head["reason"]


def test_queries_that_sums_refuse_are_answered_exactly(tmp_path, arrays, monkeypatch):
    monkeypatch.setitem(vars(POLICY.streaming), "queries", 512)
    arrays = as_dtype(arrays, np.float32)
    arrays["query"][[5, 690]] *= 40
    # the sample of the queries holds neither
    path = save(tmp_path, arrays)
    found, logarithm, (head,) = attend(path, "--tol", 0.1, "--seed", 8)
    assert head["method"].startswith("Polynomial(")
    assert "2 rows computed exactly" in head["reason"]
    truth, normalizer = oracles.attention(**arrays)
    np.testing.assert_allclose(found[[5, 690]], truth[[5, 690]], atol=1e-4)
    np.testing.assert_allclose(logarithm[[5, 690]], normalizer[[5, 690]], rtol=1e-5)
    assert oracles.frobenius_error(found, truth) <= head["error"]


def test_values_of_zero_have_an_answer_of_zero(tmp_path, arrays):
    arrays["value"] *= 0
    path = save(tmp_path, as_dtype(arrays, np.float32))
    found, _, (head,) = attend(path, "--method", "exact")
    assert not found.any()
    assert 0 <= head["error"] < 1e-30


def test_a_seed_makes_a_run_reproducible(tmp_path, arrays):
    path = save(tmp_path, as_dtype(arrays, np.float32))
    one, two, other = (attend(path, "--tol", 0.1, "--seed", x)[0] for x in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_explain_plans_on_a_sample(tmp_path, capsys, arrays):
    path = save(tmp_path, as_dtype(arrays, np.float32))
    arguments = ["explain", str(path), "--tol", "0.1", "--memory", TINY, "--json"]
    assert cli.main(arguments) == 0
    (head,) = json.loads(capsys.readouterr().out)["heads"]
    sums, exact = head["candidates"]
    assert "planned on a sample of 5000 keys" in sums["reason"]
    assert sums["accepted"]
    assert exact["method"] == "Exact(block=None)"
    assert attend(path, "--tol", 0.1)[2][0]["method"].startswith("Polynomial(")


BAD_ARRAYS = {
    "nan": ("value", lambda x: np.put(x, [4000, 9001], np.nan)),
    "infinite": ("key", lambda x: np.put(x, [39000], np.inf)),
    "query": ("query", lambda x: np.put(x, [5], -np.inf)),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_numbers_are_refused_as_in_memory(tmp_path, capsys, arrays, name, method):
    arrays, (which, spoil) = as_dtype(arrays, np.float32), BAD_ARRAYS[name]
    spoil(arrays[which])
    path = save(tmp_path, arrays)
    options = ["--tol", 0.1, "--method", method]
    line = refused(capsys, "attend", path, *options)
    assert f"{which}: expected finite numbers, got" in line
    assert line == refused(capsys, "attend", path, *options, memory="1GB")
    assert list(tmp_path.iterdir()) == [path]


BAD_SHAPES = {
    "columns": {"key": np.ones((5000, 9), "f4")},
    "rows": {"value": np.ones((5001, 3), "f4")},
    "dtypes": {"value": np.ones((5000, 3))},
    "no query": {"query": np.ones((0, 8), "f4")},
}


@pytest.mark.parametrize("name", BAD_SHAPES)
@pytest.mark.parametrize("command", ["attend", "explain"])
def test_shapes_are_refused_as_in_memory(tmp_path, capsys, arrays, name, command):
    path = save(tmp_path, as_dtype(arrays, np.float32) | BAD_SHAPES[name])
    line = refused(capsys, command, path)
    assert line == refused(capsys, command, path, memory="1GB")


REFUSED = {
    "--causal": "causal attention needs the keys of a head in memory",
    "--method multipole": "Multipole needs the keys of a head in memory",
    "--method polynomial --guarantee proven": "a proven state needs the keys",
    "--method polynomial --tol 1e-9": "Polynomial(",
    "--method exact --tol 1e-12": "is below what float32 holds",
    "--guarantee proven --tol 1e-18": "cannot be proven: rounding in float64",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_streamed_is_refused(tmp_path, capsys, arrays, options):
    path = save(tmp_path, as_dtype(arrays, np.float32))
    assert REFUSED[options] in refused(capsys, "attend", path, *options.split())
    assert list(tmp_path.iterdir()) == [path]


def test_explain_does_not_run_what_streams(tmp_path, capsys, arrays):
    path = save(tmp_path, as_dtype(arrays, np.float32))
    assert "--run needs the keys" in refused(capsys, "explain", path, "--run")


def test_overflow_is_refused(tmp_path, capsys, arrays):
    arrays["value"] *= 5e37
    arrays = as_dtype(arrays, np.float32)
    line = refused(
        capsys, "attend", save(tmp_path, arrays), "--method", "exact", "--tol", 0.1
    )
    assert "overflow" in line


def test_compressed_arrays_may_not_fill_memory(tmp_path, capsys, arrays):
    path = tmp_path / "in.npz"
    np.savez_compressed(path, **as_dtype(arrays, np.float32))
    assert "query is compressed and takes 22400 bytes" in refused(
        capsys, "attend", path
    )
    attend(path, memory="1MB")


def test_progress_moves_to_the_end(tmp_path, capsys, arrays, monkeypatch):
    shares = []

    class Bar:
        def __enter__(self):
            return shares.append

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("fastattn.cli.heads.progress", lambda *_: Bar())
    path = save(tmp_path, as_dtype(arrays, np.float32))
    for options in (["--tol", 0.1], ["--method", "exact"]):
        shares.clear()
        attend(path, *options)
        assert len(shares) >= 5
        assert sum(shares) == pytest.approx(1)


PEAK = """
import sys
from fastattn.cli.main import main
assert main(sys.argv[1:]) == 0
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    rng, peaks = np.random.default_rng(0), []
    query = rng.standard_normal((16, 16)).astype(np.float32)
    for megabytes in (8, 108):
        rows = rng.standard_normal((megabytes * 7812, 16), dtype=np.float32)
        path = save(tmp_path, {"query": query, "key": rows, "value": rows})
        arguments = ["attend", path, "-o", tmp_path / "out.npz", "--memory", "4MB"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments), "--method", "exact"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(1024 * int(done.stdout.split()[-1]))
    # the larger file has 100 MB more
    assert peaks[1] - peaks[0] < 25e6


@pytest.mark.slow
def test_certificates_rarely_fail(tmp_path, arrays):
    arrays = as_dtype(arrays, np.float32)
    stored = tuple(arrays.values())
    truth, _ = oracles.attention(**arrays)
    summed = []

    def trial(rng):
        found = np.empty_like(truth)

        def put(start, value, logarithm):
            found[start : start + len(value)] = value

        head = FileHead.of(stored, (), None, 20_000)
        answer = streaming.attend_streamed(
            head, 0.1, fastattn.Auto(), "sampled", rng, put, lambda _: None
        )
        summed.append(isinstance(answer.plan.method, fastattn.Polynomial))
        return oracles.frobenius_error(found, truth) <= answer.certificate.error

    assert_fails_rarely(trial, failure=0.05, trials=60)
    assert sum(summed) > 40
