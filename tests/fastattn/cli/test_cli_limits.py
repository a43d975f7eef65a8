"""The command where memory, heads or the disk run out, and where JSON does."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastattn.cli import heads as file_heads
from fastattn.cli import main as cli
from fastattn.streaming import memory


def refused(capsys, *arguments):
    assert cli.main([str(x) for x in arguments]) == 2
    printed, line = capsys.readouterr()
    assert not printed
    assert line.startswith("fastattn: error: ")
    assert line.count("\n") == 1
    return line


@pytest.fixture
def path(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    np.savez(tmp_path / "in.npz", q=x, k=x, v=x)
    return tmp_path / "in.npz"


def attend(path, *options):
    return ["attend", path, "-o", path.with_name("out.npz"), *options]


def test_heads_that_broadcast_to_billions_are_refused(tmp_path, capsys):
    path = tmp_path / "in.npz"
    q, k = np.ones((60000, 1, 1, 1), "f4"), np.ones((1, 60000, 1, 1), "f4")
    np.savez(path, q=q, k=k, v=k)
    for command in (attend(path), ["explain", path]):
        assert "3600000000 heads" in refused(capsys, *command)
    assert os.listdir(tmp_path) == ["in.npz"]


def test_answers_that_the_disk_does_not_hold_are_refused(path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    assert "answers take 2880 bytes" in refused(capsys, *attend(path))
    assert os.listdir(path.parent) == ["in.npz"]


def test_memory_that_runs_out_is_one_line(path, capsys, monkeypatch):
    def short(*_):
        raise MemoryError("Unable to allocate 3. GiB")

    monkeypatch.setattr(file_heads.FileHeads, "_copied", short)
    line = refused(capsys, *attend(path))
    assert "not enough memory: Unable to allocate 3. GiB" in line
    assert "--memory" in line
    assert os.listdir(path.parent) == ["in.npz"]


def test_metadata_with_nan_is_reported_as_json(tmp_path, capsys):
    x, path = np.ones((4, 2), "f4"), tmp_path / "in.npz"
    np.savez(path, q=x, k=x, v=x, meta=np.array('{"loss": NaN}'))
    assert cli.main([*map(str, attend(path)), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["input_meta"] == {"loss": "NaN"}


def test_limits_of_processes_and_containers_count(tmp_path):
    group = tmp_path / "sys/fs/cgroup/user/job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/job\n")
    without = memory.usable_memory(tmp_path)
    assert without == memory.usable_memory(tmp_path / "nowhere")
    (group / "memory.max").write_text("max\n")
    assert memory.usable_memory(tmp_path) == without
    (group.parent / "memory.max").write_text("3000000\n")
    assert memory.usable_memory(tmp_path) == 3_000_000
    # the first version, as a container sees its own group
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/docker/1\n1:pids:/\n")
    mount = tmp_path / "sys/fs/cgroup/memory"
    mount.mkdir()
    (mount / "memory.limit_in_bytes").write_text("2000000\n")
    assert memory.usable_memory(tmp_path) == 2_000_000


def test_a_limit_on_addresses_counts():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31)); "
        "from fastattn.streaming.memory import usable_memory; print(usable_memory())"
    )
    one = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.check_output([sys.executable, "-c", code], env=one)
    assert int(found) <= 1 << 31
