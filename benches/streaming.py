"""The study of keys and values larger than memory: the command, and the library."""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from benches.cases import CASES
from fastattn.files.formats import read_inputs

_D, _QUERIES, _CHECKED = 64, 4096, 16
_KEYS, _QUICK_KEYS = 40_000_000, 200_000
_BLOCK = 1 << 17
# bytes that stay free on the disk
_SPARE = 2_000_000_000

# the process's own peak, mapped pages among it
_PEAK = """
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
"""

_COMMAND = f"""
import sys
from fastattn.cli.main import main
{_PEAK}
assert main(sys.argv[1:]) == 0
print(peak())
"""

_LIBRARY = f"""
import json, os, sys
import numpy as np
import fastattn
from fastattn.files.formats import read_inputs
{_PEAK}
folder, scale, tol, size = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), {_BLOCK}
query = np.array(read_inputs(folder + "/big.npz")[0])
m = len(read_inputs(folder + "/big.npz")[1])

def block(start):
    # a map of its own, which is gone with its rows
    _, key, value, _ = read_inputs(folder + "/big.npz")
    return key[start : start + size], value[start : start + size]

sample = [np.array(x[:65536]) for x in block(m // 2)]
options = dict(queries=query, scale=scale, tol=tol, rng=0)
prepared = fastattn.prepare(*sample, **options).empty()
for start in range(0, m, size):
    prepared.insert(*block(start))
prepared.save(folder + "/keys.npz")
answer = fastattn.load(folder + "/keys.npz").query(query)
np.savez(folder + "/library.npz", out=answer.value)
print(json.dumps(dict(
    peak=peak(), error=answer.certificate.error, method=str(answer.plan.method),
    summary=os.path.getsize(folder + "/keys.npz"), keys=int(prepared.count),
)))
"""


def streaming(*, quick):
    """A file of keys and values larger than memory, by the command and the library."""
    # few keys lie far outside the bounds of the sample
    case = replace(CASES["bounded"], tol=1e-1) if quick else CASES["bounded"]
    with tempfile.TemporaryDirectory() as folder:
        big = Path(folder, "big.npz")
        wanted = _QUICK_KEYS if quick else _KEYS
        room = (shutil.disk_usage(folder).free - _SPARE) // (8 * _D)
        m = min(wanted, int(room))
        _write(big, m, np.random.default_rng(0))
        rows = np.sort(np.random.default_rng(1).permutation(_QUERIES)[:_CHECKED])
        truth = _truth(big, rows, case.scale)
        found = [_by_command(folder, case), _by_library(folder, case)]
        for row in found:
            error = np.linalg.norm(row.pop("answer")[rows] - truth)
            row["realised"] = float(error / np.linalg.norm(truth))
            assert row["realised"] <= row["certified"] <= case.tol
    common = {"keys": m, "wanted": wanted, "GB of keys and values": m * _D * 8 / 1e9}
    return [{**common, **row} for row in found]


def _write(path, m, rng):
    """Write an uncompressed file, block by block."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, count in (("query", _QUERIES), ("key", m), ("value", m)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, _D)}
                npy.write_array_header_1_0(member, header)
                for start in range(0, count, _BLOCK):
                    shape = min(_BLOCK, count - start), _D
                    member.write(rng.standard_normal(shape, dtype=np.float32).data)


def _truth(path, rows, scale):
    """Attention of some rows from the definition, in float64, block by block."""
    query, key, _, _ = read_inputs(path)
    query, m = scale * query[rows].astype(np.float64), len(key)
    total, sums = 0.0, 0.0
    for start in range(0, m, _BLOCK):
        _, key, value, _ = read_inputs(path)
        some = slice(start, start + _BLOCK)
        # logits are bounded: their exponentials need no shift
        weights = np.exp(query @ key[some].T.astype(np.float64))
        total = total + weights.sum(axis=1, keepdims=True)
        sums = sums + weights @ value[some].astype(np.float64)
    return sums / total


def _by_command(folder, case):
    """Answer by ``fastattn attend`` in a process of its own."""
    out = f"{folder}/out.npz"
    options = ["--tol", case.tol, "--scale", case.scale, "--memory", "1.5GB"]
    arguments = ["attend", f"{folder}/big.npz", "-o", out, "--json", *options]
    *_, report, peak = _run(_COMMAND, arguments)
    (head,) = json.loads(report)["heads"]
    with np.load(out) as file:
        answer = file["out"].astype(np.float64)
    return {
        "by": "fastattn attend --memory 1.5GB",
        "peak MB": int(peak) / 1e6,
        "method": head["method"],
        "MB saved": None,
        "certified": head["error"],
        "answer": answer,
    }


def _by_library(folder, case):
    """Answer by ``prepare``, ``insert``, ``save`` and ``load`` in a process."""
    *_, text = _run(_LIBRARY, [folder, case.scale, case.tol])
    report = json.loads(text)
    with np.load(f"{folder}/library.npz") as file:
        answer = file["out"].astype(np.float64)
    return {
        "by": "prepare, insert, save, load, query",
        "peak MB": report["peak"] / 1e6,
        "method": report["method"],
        "MB saved": report["summary"] / 1e6,
        "certified": report["error"],
        "answer": answer,
    }


def _run(code, arguments):
    """Run Python code in a fresh process; return the lines that it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()
