"""Compiled code without a folder to cache it in, and with damaged cache files."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sketching._lib.arrays import place_of
from sketching._ops.cpu import compile as compilation
from sketching._ops.cpu.compile import njit

CALLS = """
import numpy as np, fastattn, sketching
x = np.random.default_rng(0).standard_normal((3, 50, 8)).astype(np.float32)
print(float(np.abs(fastattn.attention(*x)).sum()))
for kind in sketching.HadamardProjection, sketching.SparseProjection:
    print(float(np.abs(kind.draw(8, size=4, rng=0).apply(x[0])).sum()))
print(sketching.MahalanobisKMeans(2, random_state=0).fit(x[0]).inertia_)
print(sketching.MahalanobisNeighbors(n_neighbors=2).fit(x[0]).kneighbors(x[0])[1].sum())
"""
NOWHERE = """
import numba.core.caching as caching
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(lambda cls, *args, **options: None)
"""


def run(code, **environment):
    """What a script prints in a process of its own."""
    known = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    found = subprocess.run(
        [sys.executable, "-c", code], env={**known, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return [float(x) for x in found.stdout.split()]


@pytest.fixture(scope="module")
def want():
    return run(CALLS)


@pytest.mark.slow
def test_without_a_folder_for_code_everything_is_compiled(want):
    assert run(NOWHERE + CALLS) == want


@pytest.mark.slow
def test_where_numba_may_not_compile_the_references_answer(want):
    np.testing.assert_allclose(run(CALLS, NUMBA_DISABLE_JIT="1"), want, rtol=1e-5)


def test_numba_that_is_told_later_not_to_compile_counts(monkeypatch):
    assert place_of(np.ones(2)) == "cpu"
    monkeypatch.setattr(sys.modules["numba"].config, "DISABLE_JIT", 1)
    assert place_of(np.ones(2)) is None


def truncated(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.slow
def test_damaged_code_is_compiled_anew(tmp_path, want):
    assert run(CALLS, NUMBA_CACHE_DIR=str(tmp_path)) == want
    # one kind of damage a function, to its list of code or to the code
    damages = itertools.product([truncated, flipped, lambda _: b""], [".nbi", ".nbc"])
    bad = {}
    for path, (damage, suffix) in zip(
        sorted(tmp_path.rglob("*.nbi")), itertools.cycle(damages), strict=False
    ):
        for file in path.parent.glob(f"{path.stem}*{suffix}"):
            bad[file] = damage(file.read_bytes())
            file.write_bytes(bad[file])
    assert len(bad) >= 6
    assert run(CALLS, NUMBA_CACHE_DIR=str(tmp_path)) == want
    # and cached, so that the next process need not compile
    assert all(path.read_bytes() != data for path, data in bad.items())
    assert not list(tmp_path.rglob("*.tmp.*"))


def _double(x):
    return 2 * x


def test_a_full_disk_costs_the_code_that_would_be_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["numba"].config, "CACHE_DIR", str(tmp_path))
    made = njit(cache=True)(_double)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compilation._CheckedFile, "_save_data", full)
    assert made(3) == 6
    assert made(0.5) == 1
    assert not list(Path(tmp_path).rglob("*.nbc"))
