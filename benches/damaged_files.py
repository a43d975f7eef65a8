"""The study of damaged and crafted files: memory and messages of reading them.

Files of each kind are damaged, cut, padded and crafted at random, and read in a
process of their own: files that are not read must be refused in one line that names
the file.
"""

import bz2
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

KINDS = ("npz", "safetensors", "prepared", "index", "cnf")
SUFFIX = {"safetensors": ".safetensors", "cnf": ".cnf"}
# bytes that a command is allowed, and that any file may take
ALLOWED, MOST = 200_000_000, 2_000_000_000


def damaged(*, quick):
    """Files of each kind: how many are read, refused in a line, or worse."""
    rows = [run_apart(kind, 60 if quick else 2000) for kind in KINDS]
    for row in rows:
        assert row["worse"] == row["files left behind"] == 0, row
        assert 1e6 * row["MB, most"] < MOST, row
    return rows


def run_apart(kind, count, seed=0):
    """Read ``count`` files in a new process; return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from benches.damaged_files import main; main(*sys.argv[1:])"
        command = [sys.executable, "-c", code, kind, str(count), str(seed), folder]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"{kind}: {found.returncode}: {found.stderr[-2000:]}")
        row = json.loads(found.stdout)
        row["files left behind"] = len(os.listdir(folder))
    return row


def main(kind, count, seed, folder):
    """Read the files of one kind and print the counts of outcomes."""
    folder, rng = Path(folder), np.random.default_rng(int(seed))
    sound = make(kind, folder)
    before, counts, worst = peak(), Counter(), ""
    for _ in range(int(count)):
        path = folder / f"file{SUFFIX.get(kind, '.npz')}"
        path.write_bytes(spoiled(kind, sound, rng))
        said = outcome(kind, path)
        if said.startswith("wrong"):
            worst = worst or said
        counts[said[:5]] += 1
        path.unlink()
    print(
        json.dumps(
            {
                "kind": kind,
                "files": int(count),
                "read": counts["read"],
                "refused in one line": counts["refus"],
                "worse": counts["wrong"],
                "the first of these": worst,
                "MB, most": peak() // 1000,
                "MB, before": before // 1000,
            }
        )
    )


def peak():
    """Kilobytes that this process has taken at most."""
    # ru_maxrss also counts the process that this one was forked from
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1])


def outcome(kind, path):
    """Read a file: "read", "refused", or "wrong" and what went wrong."""
    try:
        read(kind, path)
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" in message or str(path) not in message:
            return f"wrong message: {message!r}"
        return "refused"
    except BaseException as error:
        return f"wrong: {type(error).__name__}: {error}"
    return "read"


def read(kind, path):
    """Read a file as its users do."""
    if kind in ("npz", "safetensors"):
        from fastattn.files.formats import read_stored

        read_stored(path, ALLOWED)
    elif kind == "cnf":
        from fastattn import RefusalError
        from lowerbounds import from_cnf

        try:
            from_cnf(path)
        except RefusalError as error:
            raise ValueError(f"{path}: {error}") from error
    elif kind == "index":
        import sketching

        sketching.load(path)
    else:
        import fastattn

        fastattn.load(path)


def make(kind, folder):
    """The bytes of a sound file."""
    rng = np.random.default_rng(0)
    path = folder / f"sound{SUFFIX.get(kind, '.npz')}"
    x = rng.standard_normal((2, 30, 4)).astype(np.float32)
    if kind == "npz":
        np.savez(path, q=x, k=x, v=x, meta=np.array('{"layer": 1.5}'))
    elif kind == "safetensors":
        entries = {
            name: {
                "dtype": "F32",
                "shape": list(x.shape),
                "data_offsets": [i * x.nbytes, (i + 1) * x.nbytes],
            }
            for i, name in enumerate("qkv")
        }
        text = json.dumps({"__metadata__": {"layer": "1"}, **entries}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + 3 * x.tobytes())
    elif kind == "prepared":
        import fastattn

        fastattn.prepare(x, x, queries=x, rng=0).save(path)
    elif kind == "index":
        from sketching import MahalanobisIndex, MahalanobisMetric

        index = MahalanobisIndex(MahalanobisMetric(np.eye(4)), rng=0)
        index.insert(x[0])
        index.save(path)
    else:
        from lowerbounds import random_formula

        clauses = random_formula(8, rng=0)
        lines = [f"p cnf 8 {len(clauses)}"]
        lines += [" ".join(map(str, clause)) + " 0" for clause in clauses]
        path.write_text("c a formula\n" + "\n".join(lines) + "\n")
    data = path.read_bytes()
    path.unlink()
    return data


def spoiled(kind, sound, rng):
    """Damage a file in one of the ways that its kind can be damaged."""
    ways = [flipped, cut, overwritten, repeated, emptied]
    if kind == "cnf":
        ways += [crafted_formula, packed]
    elif kind == "safetensors":
        ways += [crafted_tensors]
    else:
        ways += [crafted_array, crafted_text, bomb]
    return ways[rng.integers(len(ways))](sound, rng)


def flipped(data, rng):
    x = np.frombuffer(data, np.uint8).copy()
    for _ in range(rng.integers(1, 5)):
        x[rng.integers(len(x))] ^= 1 << int(rng.integers(8))
    return x.tobytes()


def cut(data, rng):
    return data[: rng.integers(len(data))]


def overwritten(data, rng):
    start = int(rng.integers(len(data)))
    noise = rng.bytes(int(rng.integers(1, 40)))
    return data[:start] + noise + data[start + len(noise) :]


def repeated(data, rng):
    start, stop = np.sort(rng.integers(len(data), size=2))
    return data[:stop] + data[start:]


def emptied(data, rng):
    start, stop = np.sort(rng.integers(len(data), size=2))
    return data[:start] + bytes(int(stop - start)) + data[stop:]


def rewritten(data, change, kind=zipfile.ZIP_STORED):
    """Write an archive again, with other members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                for part in content if isinstance(content, list) else [content]:
                    member.write(part)
    return file.getvalue()


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 0, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 8), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<f4', 'fortran_order': 3, 'shape': (True, 8), }",
    "{'descr': '<U99999999', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (40, 8), }   (",
    "  if 1:\n      a\n   b",
    "-" * 9000 + "1",
    "(" * 9000,
    "[" * 200 + "]" * 200,
    "",
)


def crafted_array(data, rng):
    """One member has a header of its own."""
    text = HEADERS[rng.integers(len(HEADERS))] + "\n"
    if rng.random() < 0.3:
        version, length = b"\x02\x00", struct.pack("<I", 1 << 31)
    else:
        version, length = b"\x01\x00", struct.pack("<H", len(text))
    content = b"\x93NUMPY" + version + length + text.encode() + rng.bytes(8)

    def change(members):
        names = list(members)
        members[names[rng.integers(len(names))]] = content
        if rng.random() < 0.2:
            members["7/key.npy"] = content

    return rewritten(data, change)


TEXTS = (
    "null", "[]", "{}", "{" * 5000, '{"a": ' * 3000 + "1" + "}" * 3000, "NaN",
    '{"format": "fastattn.prepared", "version": 1, "options": null, "heads": []}',
    '{"format": "fastattn.prepared", "version": 1e999, "options": {}, "heads": 3}',
    '{"format": "sketching.MahalanobisIndex", "version": 1, "arrays": null}',
    '{"format": "sketching.MahalanobisIndex", "version": NaN, "arrays": {"a": 1}}',
    "9" * 5000,
)  # fmt: skip


def crafted_text(data, rng):
    """The header says something else, wholly or in one place."""

    def change(members):
        name = "header.npy" if "header.npy" in members else "meta.npy"
        text = str(np.load(io.BytesIO(members[name])))
        if rng.random() < 0.5:
            text = TEXTS[rng.integers(len(TEXTS))]
        else:
            found = json.loads(text)
            place = found
            while isinstance(place, (dict, list)) and len(place):
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = keys[rng.integers(len(keys))]
                if rng.random() < 0.4 or not isinstance(place[key], (dict, list)):
                    values = None, -1, "x", [], {}, 1e308, 10**30, True, [[1]]
                    place[key] = values[rng.integers(len(values))]
                    break
                place = place[key]
            text = json.dumps(found)
        file = io.BytesIO()
        np.save(file, np.array(text))
        members[name] = file.getvalue()

    return rewritten(data, change)


def bomb(data, rng):
    """A member that unpacks to far more than the file has."""
    # packing takes longest: a few cases are enough
    size = 1 << (28 if rng.random() < 0.05 else 20)
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size // 4},), }}\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    kind = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)[rng.integers(2)]

    def change(members):
        names = list(members)
        # in parts, so that writing takes no more memory than reading
        members[names[rng.integers(len(names))]] = [
            head,
            *(size >> 20) * [bytes(1 << 20)],
        ]

    return rewritten(data, change, kind)


def crafted_tensors(data, rng):
    """The header of a .safetensors file says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    values = None, -1, 1.5, "F32", [], [1 << 40, 0], [-3, -2], [True], {}, 1 << 62
    name = "qkv"[rng.integers(3)]
    if rng.random() < 0.3:
        header["__metadata__"] = values[rng.integers(len(values))]
    else:
        field = ("dtype", "shape", "data_offsets")[rng.integers(3)]
        header[name][field] = values[rng.integers(len(values))]
    text = json.dumps(header).encode()
    claimed = len(text) if rng.random() < 0.8 else int(rng.integers(1 << 62))
    return struct.pack("<Q", claimed) + text + rest


LINES = (
    b"p cnf 8 3", b"p cnf+ 8 3", b"p wcnf 8 3 5", b"x1 2 0", b"1 2 <= 1", b"cword",
    b"1 -2 0 99 0", b"9" * 5000 + b" 0", b"1_0 0", b"p cnf -1 -1", b"%", b"\x00\xff",
    b"p cnf 1000000000000 1000000000000", b"0 " * 2000,
)  # fmt: skip


def crafted_formula(data, rng):
    """Lines of other formats, and of none, among those of a formula."""
    lines = data.split(b"\n")
    for _ in range(rng.integers(1, 4)):
        lines.insert(rng.integers(len(lines)), LINES[rng.integers(len(LINES))])
    mark = (b"", b"\xef\xbb\xbf", b"\xff\xfe")[rng.integers(3)]
    return mark + b"\n".join(lines)


def packed(data, rng):
    """A compressed file, sound, damaged, or of many zeros."""
    packer = (gzip, bz2)[rng.integers(2)]
    way = rng.integers(3)
    if way == 0:
        return packer.compress(data)
    if way == 1:
        return flipped(packer.compress(data), rng)
    return packer.compress(bytes(1 << 24))
