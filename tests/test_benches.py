"""Statistics of the benches, and opponents against their own definitions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benches import figures, peers, resume, seeds
from benches.__main__ import wanted
from benches.cases import CASES, heads_of
from benches.heads import Head, case_head, real_heads


def row(method, error, time, *, head="h", ours=False):
    return {
        "head": head,
        "n": 4,
        "method": method,
        "family": method,
        "ours": ours,
        "error": error,
        "time over torch": time,
        "beaten by": "",
    }


def test_front_keeps_what_nothing_beats():
    points = [(2.0, 0.1), (1.0, 0.5), (3.0, 0.2), (0.5, 0.5), (4.0, 0.01)]
    assert figures.front(points) == [(0.5, 0.5), (2.0, 0.1), (4.0, 0.01)]


def test_beaten_needs_less_error_and_less_time_on_the_same_head():
    rows = [
        row("slow", 0.01, 0.9, ours=True),
        row("fast", 0.05, 0.2, ours=True),
        row("elsewhere", 0.0, 0.0, head="other", ours=True),
        row("theirs", 0.0, 0.0),
    ]
    assert peers.beaten_by(row("peer", 0.1, 1.0), rows) == "fast"
    assert peers.beaten_by(row("peer", 0.03, 1.0), rows) == "slow"
    assert peers.beaten_by(row("peer", 0.05, 0.5), rows) == ""


def test_unmatched_lists_useful_cells_of_peers_only():
    cells = [
        row("useless", 0.6, 0.1),
        row("left", 0.1, 0.1),
        row("own", 0.1, 0.1, ours=True),
        row(peers.UNIT, 1e-7, 1.0),
        row("beaten", 0.2, 0.1) | {"beaten by": "own"},
    ]
    first, *rest = peers.unmatched(cells)
    assert first.startswith("1 of 2 cells")
    assert [line.split()[3] for line in rest] == ["left:"]


def test_unit_is_timed_again_once_its_time_has_passed(monkeypatch):
    took = {"unit": 2.0, "a": 1.0, "b": 1.5, "c": 4.0}
    calls = []

    def seconds(call):
        calls.append(call())
        return took[calls[-1]]

    monkeypatch.setattr(peers, "seconds", seconds)
    ratios = peers.times_over(lambda: "unit", [lambda x=x: x for x in "abc"], rounds=2)
    # c is long and lost to the unit: once is enough
    assert ratios == [[0.5, 0.5], [0.75, 0.75], [2.0]]
    assert calls == ["unit", "a", "b", "unit", "c", "unit", "b", "a"]


def test_seeds_are_counted_and_misses_listed():
    trials = [
        {"seed": 0, "realised": 0.05, "certified": 0.08, "method": "Polynomial"},
        {"seed": 1, "realised": 0.12, "certified": 0.09, "method": "Polynomial"},
        {"seed": 2, "realised": float("nan"), "certified": 0.1, "method": "Exact"},
    ]
    counted = seeds.summary("h", 4, 0.1, trials)
    assert (counted["seeds"], counted["within"], counted["certificate holds"]) == (
        3, 1, 1,
    )  # fmt: skip
    assert counted["methods"] == "Exact 1, Polynomial 2"
    assert [x.split(":")[0] for x in counted["misses"].split("; ")] == [
        "seed 1", "seed 2",
    ]  # fmt: skip
    summed = seeds.total([counted, counted])
    assert (summed["head"], summed["seeds"], summed["within"]) == ("all", 6, 2)


def test_partial_results_are_recalled_for_the_same_code_only(tmp_path):
    part = tmp_path / "part.jsonl"
    with part.open("a") as file:
        for code, seed in (("old", 0), ("new", 1)):
            resume.record(file, code, ("h", 4, 0.1, seed), {"seed": seed})
        # a killed run leaves half a line
        file.write('{"code": "new"')
    assert resume.recall(part, "new") == {("h", 4, 0.1, 1): {"seed": 1}}
    assert resume.recall(tmp_path / "none", "new") == {}


def test_a_fingerprint_follows_the_sources(tmp_path):
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    found = set()
    for text in ("", "x = 1\n"):
        (tmp_path / "module.py").write_text(text)
        found |= {resume.fingerprint(package), resume.fingerprint(package)}
    assert len(found) == 2


def test_seeds_go_on_where_they_stopped(tmp_path, monkeypatch, rng):
    head = Head("h", *rng.standard_normal((3, 8, 4), dtype=np.float32), 0.5)
    monkeypatch.setattr(seeds, "real_heads", lambda _, **__: [head])
    options = {"quick": True, "data": [], "heads_each": None, "results": tmp_path}
    ran = []

    def trial(head, tol, seed):
        ran.append((tol, seed))
        if len(ran) == 4:
            raise KeyboardInterrupt
        return {"seed": seed, "realised": 0.0, "certified": 0.0, "method": "Exact"}

    monkeypatch.setattr(seeds, "trial", trial)
    with pytest.raises(KeyboardInterrupt):
        seeds.seeds(**options)
    rows = seeds.seeds(**options)
    assert sorted(ran) == sorted(
        [(tol, s) for tol in seeds.TOLS for s in (0, 1)] + [ran[3]]
    )
    assert rows[-1]["within"] == 10
    assert not list(tmp_path.iterdir())


def test_studies_get_the_options_that_they_take():
    def study(*, quick, results):
        return quick, results

    assert wanted(study, {"quick": 1, "data": 2, "results": 3}) == {
        "quick": 1,
        "results": 3,
    }


def test_rows_of_a_file_can_be_cut(tmp_path, rng):
    path = tmp_path / "some.npz"
    arrays = dict(zip("QKV", rng.standard_normal((3, 2, 8, 4)), strict=True))
    np.savez(path, **arrays)
    names = [(name, query.shape) for name, query, *_ in heads_of(f"{path}@5")]
    assert names == [("some@5[0]", (5, 4)), ("some@5[1]", (5, 4))]


def test_heads_are_limited_by_file_and_length():
    names = [head.name for head in real_heads([], each=1, least=1000)]
    assert names == ["minilm-diffuse[0]", "minilm-sharp[0]"]


@pytest.mark.parametrize(("name", "largest"), [("iid1", 1), ("iid4", 4), ("lowdim", 4)])
def test_cases_have_the_largest_logit_that_they_name(name, largest, rng):
    query, key, _ = CASES[name].inputs(512, rng)
    logits = CASES[name].scale * query @ key.T
    assert np.abs(logits).max() == pytest.approx(largest, rel=1e-4)


def test_truth_of_a_head_is_attention(rng):
    head = case_head("iid1", 600)
    logits = head.scale * head.query.astype(float) @ head.key.T
    weights = np.exp(logits)
    truth = weights @ head.value / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.truth, truth, atol=1e-6)
    assert head.error(head.truth) == 0
    assert head.error(2 * head.truth) == pytest.approx(1)


def test_peers_are_drawn(tmp_path, capsys):
    rows = [row("torch SDPA", 1e-7, 1.0), row("own", 0.1, 0.2, ours=True)]
    path, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    path.write_text(json.dumps({"study": "peers", "threads": 1, "rows": rows}))
    assert figures.main([str(path), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    # what a stopped run left, half a line among it
    part = tmp_path / "peers.part.jsonl"
    with part.open("a") as file:
        resume.record(file, "code", ("h", 4), rows)
        file.write('{"code": "co')
    assert figures.main([str(part), str(picture)]) == 0
    path.write_text(json.dumps({"study": "exact", "rows": []}))
    assert figures.main([str(path), str(picture)]) == 2
    assert "'exact' has no picture" in capsys.readouterr().err


@pytest.fixture
def tensors(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return list(torch.from_numpy(rng.standard_normal((3, 1, 1, 256, 8))).float() * 0.7)


def relative(tensors, got):
    from benches.opponents import sdpa

    truth = sdpa(*tensors)().numpy().ravel()
    return np.linalg.norm(np.asarray(got).ravel() - truth) / np.linalg.norm(truth)


def test_nystrom_with_every_key_is_exact(tensors):
    from benches.opponents import kernel_features, nystrom_on_keys, sampled_keys

    own = nystrom_on_keys(*tensors, size=256, temperature=2, ridge=1e-7)
    assert relative(tensors, own()) < 1e-3
    theirs = kernel_features(*tensors, sampler="Nystroem", size=256)
    assert relative(tensors, theirs()) < 1e-2
    assert relative(tensors, sampled_keys(*tensors, size=256)()) < 1e-5
    few = nystrom_on_keys(*tensors, size=32, temperature=2)
    assert 1e-3 < relative(tensors, few()) < 1


def test_published_layers_attend_to_what_they_are_given(tensors):
    from benches.opponents import nystromformer, taylor

    pytest.importorskip("nystrom_attention", reason="nystrom-attention is missing")
    pytest.importorskip(
        "taylor_series_linear_attention", reason="taylor-series is missing"
    )
    query, key, value = tensors
    small = [query * 0.1, key, value]
    assert relative(small, taylor(*small)().detach()) < 1e-2
    assert relative(small, nystromformer(*small, size=128)().detach()) < 0.2
