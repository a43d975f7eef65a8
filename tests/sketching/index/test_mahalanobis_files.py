"""Indexes as files: what was saved answers to the last bit, all else is refused."""

import json
import os
import zipfile

import numpy as np
import pytest

from sketching import (
    Adaptive,
    Exact,
    Filter,
    MahalanobisIndex,
    MahalanobisMetric,
    RefusalError,
    load,
)

MODES = {
    "exact": Exact(),
    "filter": Filter(size=3),
    "adaptive": Adaptive(rows=32, sketches=5, sampled=3, queries=20),
}


def make(mode, dtype=np.float32):
    rng = np.random.default_rng(0)
    metric = MahalanobisMetric(rng.standard_normal((5, 6)))
    index = MahalanobisIndex(metric, mode=mode, eps=0.4, delta=0.05, rng=2)
    x = rng.standard_normal((30, 6)).astype(dtype)
    index.insert(x)
    index.delete([4, 5])
    index.update_metric(rng.standard_normal(5), rng.standard_normal(6))
    index.query(x[:2])
    index.update_metric(2, rng.standard_normal(6))
    return index, x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_what_was_saved_goes_on_to_the_last_bit(mode, dtype, tmp_path):
    index, x = make(mode, dtype)
    index.save(tmp_path / "index.npz")
    other = load(tmp_path / "index.npz")
    for one in (index, other):
        np.testing.assert_array_equal(one.insert(x[:2] + 1), [30, 31])
        one.update_metric(0, np.ones(6))
        one.delete([0])
    assert other.mode == mode
    assert (other.eps, other.delta) == (0.4, 0.05)
    np.testing.assert_array_equal(index.numbers, other.numbers)
    np.testing.assert_array_equal(index.query(x[:9]).value, other.query(x[:9]).value)
    # the same sketches are sampled, the same points drawn
    np.testing.assert_array_equal(
        index.sample(x[0], 5, power=2), other.sample(x[0], 5, power=2)
    )


def test_answers_given_are_remembered(tmp_path):
    index, x = make(Adaptive(rows=32, sketches=5, sampled=3, queries=20))
    index.query(x[:17])
    index.save(tmp_path / "index.npz")
    other = load(tmp_path / "index.npz")
    other.query(x[:1])
    with pytest.raises(RefusalError, match=r"20 of 20 queries.*redraw"):
        other.query(x[:1])
    assert other.redraw(0).query(x[:1]).value.shape == (1, 28)


def test_saving_over_a_file_replaces_it_whole(tmp_path):
    index, _ = make(Exact())
    path = tmp_path / "index.npz"
    path.write_text("old")
    index.save(path)
    assert len(load(path)) == 28
    assert os.listdir(tmp_path) == ["index.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    index, _ = make(Exact())
    path = tmp_path / "index.npz"
    index.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"index\.npz: no space"):
        index.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["index.npz"]


def test_an_empty_index_is_not_saved(tmp_path):
    index = MahalanobisIndex(MahalanobisMetric(np.eye(2)))
    with pytest.raises(ValueError, match="empty"):
        index.save(tmp_path / "index.npz")


@pytest.fixture
def saved(tmp_path):
    index, _ = make(MODES["adaptive"])
    index.save(tmp_path / "index.npz")
    return tmp_path / "index.npz"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"index\.npz: "):
        load(saved)


def test_a_flipped_bit_is_refused(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 16
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=r"index\.npz: .*CRC"):
        load(saved)


def rewrite(path, change):
    """Write the file again with its header or arrays changed."""
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header")))
    change(header, arrays)
    np.savez(path, header=np.array(json.dumps(header)), **arrays)


def set_entry(name, value):
    return lambda header, _: header.__setitem__(name, value)


def shorten(header, arrays):
    arrays["points.rows"] = arrays["points.rows"][:-1]


def shorten_with_header(header, arrays):
    shorten(header, arrays)
    header["arrays"]["points.rows"][1][0] -= 1


def poison(header, arrays):
    arrays["points.stats"][0, 3] = np.nan


def misnumber(header, arrays):
    arrays["points.numbers"][0] = arrays["points.numbers"][1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_entry("version", 2), "newer release: version 2"),
        (set_entry("version", "1"), "version is '1'"),
        (set_entry("format", "another"), "not a file of sketching.MahalanobisIndex"),
        (set_entry("mode", "Fast"), "Fast"),
        (set_entry("options", {"rows": -1}), "rows: expected an integer >= 1"),
        (set_entry("streams", []), "streams|shorter|argument"),
        (lambda _, a: a.pop("points.rows"), "missing or foreign: points.rows"),
        (lambda _, a: a.update(extra=np.ones(2)), "missing or foreign: extra"),
        (shorten, "points.rows is .* the header says"),
        (shorten_with_header, "shape"),
        (poison, "points.stats has entries that are not finite"),
        (misnumber, "contradict"),
        (lambda h, _: h.pop("eps"), "eps"),
    ],
)
def test_what_does_not_fit_is_refused(saved, change, match):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=match):
        load(saved)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match="not a file of sketching"):
        load(path)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=r"a\.npz: "):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")


def test_pickles_are_never_loaded(saved):
    with np.load(saved) as file:
        arrays = dict(file)
    with zipfile.ZipFile(saved, "w") as archive:
        for name, x in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                bad = np.array([{}], dtype=object) if name == "factor" else x
                np.lib.format.write_array(member, bad, allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load(saved)
