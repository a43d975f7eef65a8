"""Archives with false sizes or contents: refused before memory is taken."""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

import fastattn
import sketching
from sketching._lib.archives import check_total, members_of, read_member, reading
from sketching._lib.files import replacing
from sketching._lib.json_text import as_text, parse_object

SIZE = 1 << 26
# what reading a small file may take, a bomb unpacked to SIZE
LITTLE = 1 << 24


def array(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def header(shape, descr="<f8", version=1):
    entry = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n"
    length = struct.pack("<H" if version == 1 else "<I", len(entry))
    return b"\x93NUMPY" + bytes([version, 0]) + length + entry.encode()


def archive(path, members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def traced(call):
    """Bytes that a refusal takes at most, and what it says."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\.npz: ") as caught:
            call()
        return tracemalloc.get_traced_memory()[1], str(caught.value)
    finally:
        tracemalloc.stop()


INDEX = {"format": "sketching.MahalanobisIndex", "version": 1}
INDEX["arrays"] = {"factor": ["<f8", [SIZE // 64, 8]]}
OPTIONS = {"lead": [], "d": 8, "p": 8, "seed": 1, "tol": 0.1, "scale": 1.0}
OPTIONS |= {"guarantee": "sampled", "dtype": "float64"}
PREPARED = {"format": "fastattn.prepared", "version": 1, "options": OPTIONS}
PREPARED["heads"] = [{}]
BOMB = header((SIZE // 64, 8)) + bytes(SIZE)
LONG_HEADER = b"\x93NUMPY\x02\x00" + struct.pack("<I", SIZE) + bytes(SIZE)


def text(x):
    return array(np.array(json.dumps(x)))


@pytest.mark.parametrize("content", [BOMB, LONG_HEADER], ids=["array", "header"])
@pytest.mark.parametrize(
    "kind",
    [zipfile.ZIP_DEFLATED, pytest.param(zipfile.ZIP_BZIP2, marks=pytest.mark.slow)],
)
def test_bombs_are_refused_before_they_unpack(tmp_path, content, kind):
    index = {"header.npy": text(INDEX), "factor.npy": content}
    path = archive(tmp_path / "index.npz", index, kind)
    taken, message = traced(lambda: sketching.load(path))
    assert taken < LITTLE
    assert "memory=" in message or "compression" in message
    prepared = {"meta.npy": text(PREPARED), "0/key.npy": content}
    path = archive(tmp_path / "prepared.npz", prepared, kind)
    assert traced(lambda: fastattn.load(path))[0] < LITTLE
    inputs = dict.fromkeys(["q.npy", "k.npy", "v.npy"], content)
    path = archive(tmp_path / "inputs.npz", inputs, kind)
    taken, _ = traced(lambda: fastattn.files.formats.read_stored(path, 1 << 20))
    assert taken < LITTLE


def test_load_takes_what_it_is_told_to(tmp_path):
    index = sketching.MahalanobisIndex(sketching.MahalanobisMetric(np.eye(3)))
    index.insert(np.zeros((50000, 3)))
    index.save(tmp_path / "index.npz")
    with np.load(tmp_path / "index.npz") as file:
        np.savez_compressed(tmp_path / "packed.npz", **file)
    assert (tmp_path / "packed.npz").stat().st_size * 16 < index.nbytes
    with pytest.raises(ValueError, match=r"where 100000 are allowed.*memory="):
        sketching.load(tmp_path / "packed.npz", memory=100_000)
    for memory in (None, 10**8):
        assert len(sketching.load(tmp_path / "packed.npz", memory=memory)) == 50000
    x = np.ones((100, 4))
    fastattn.prepare(x, x, queries=x).save(tmp_path / "keys.npz")
    with pytest.raises(ValueError, match="where 1000 are allowed"):
        fastattn.load(tmp_path / "keys.npz", memory=1000)
    with pytest.raises(ValueError, match="memory: expected an integer >= 1, got 0"):
        fastattn.load(tmp_path / "keys.npz", memory=0)
    assert fastattn.load(tmp_path / "keys.npz", memory=10**6).count == 100


HEADERS = {
    "huge": (header((2**40, 8)), "has 0 bytes where its shape"),
    "negative": (header((-1, 8)), "impossible shape"),
    "bool": (header("(True, 8)") + bytes(64), "impossible shape"),
    "object": (header((1,), "|O") + bytes(8), "Object arrays"),
    "record": (header((1,), "V8") + bytes(8), "expected numbers or text"),
    "unclosed": (header("(1, 8), }   (") + bytes(64), "no readable header"),
    "signs": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 9000, "readable"),
    "indent": (b"\x93NUMPY\x01\x00\x0f\x00  if 1:\n a\nb\n  ", "no readable header"),
    "short": (b"\x93NUMPY\x01\x00", "header of 0 bytes|no readable header"),
    "version": (header((1,), version=2)[:6] + b"\x09\x00" + bytes(9), "version"),
    "text": (b"hello", "no array of NumPy"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_crafted_headers_are_refused_in_one_line(tmp_path, name):
    content, message = HEADERS[name]
    path = archive(tmp_path / "a.npz", {"x.npy": content})
    with reading(path) as found, pytest.raises(ValueError, match=message) as caught:
        read_member(found, "x", members_of(found)["x"], 1 << 20)
    assert "\n" not in str(caught.value)


def test_two_members_of_a_name_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x.npy", array(np.ones(3)))
        made.writestr("x", array(np.ones(3)))
    with reading(path) as found, pytest.raises(ValueError, match="holds x twice"):
        members_of(found)


def test_sizes_of_members_add_up(tmp_path):
    path = archive(tmp_path / "a.npz", {f"{i}": bytes(1000) for i in range(9)})
    with reading(path) as found:
        assert check_total(path, found, 9000) == 9000
        with pytest.raises(ValueError, match="unpacks to 9000 bytes, where 8999"):
            check_total(path, found, 8999)


@pytest.mark.parametrize("wide", [False, True])
def test_a_long_list_of_members_is_not_read(tmp_path, wide):
    path = archive(tmp_path / "a.npz", {"x": b"1"})
    data = path.read_bytes()
    end = data.rfind(b"PK\x05\x06")
    tail = bytearray(data[end:])
    if wide:
        record = b"PK\x06\x06" + bytes(36) + struct.pack("<Q", 1 << 40) + bytes(8)
        locator = b"PK\x06\x07" + bytes(4) + struct.pack("<QI", end, 1)
        tail = record + locator + tail
    else:
        tail[12:16] = struct.pack("<I", 1 << 30)
    path.write_bytes(data[:end] + tail)
    with pytest.raises(ValueError, match="list of arrays takes"), reading(path):
        pass


def test_texts_are_json_for_any_parser():
    x = {"a": [np.nan, np.inf, -np.inf, 1.5], "b": {"c": (np.float64(np.nan),)}}
    found = json.loads(as_text(x), parse_constant=pytest.fail)
    assert found == {"a": ["NaN", "Infinity", "-Infinity", 1.5], "b": {"c": ["NaN"]}}
    assert [float(y) for y in found["a"][1:]] == [np.inf, -np.inf, 1.5]
    read = parse_object("x", '\ufeff{"a": NaN, "b": [-Infinity, 1e999, 2.5, 3]}')
    assert read == {"a": "NaN", "b": ["-Infinity", "1e999", 2.5, 3]}
    as_text(read)


def test_texts_may_not_be_deep():
    for depth in (70, 10**5):
        with pytest.raises(ValueError, match=r"x is (nested deeper|no JSON)"):
            parse_object("x", '{"a":' + "[" * depth + "]" * depth + "}")


def test_a_flipped_bit_of_an_array_is_found_by_its_checksum(tmp_path):
    # in an archive that was written again, so that its own checksums fit
    x = np.random.default_rng(0).standard_normal((100, 4))
    index = sketching.MahalanobisIndex(sketching.MahalanobisMetric(np.eye(4)))
    index.insert(x)
    index.save(tmp_path / "index.npz")
    fastattn.prepare(x, x, queries=x).save(tmp_path / "keys.npz")
    for name, load, member in (
        ("index.npz", sketching.load, "points.rows"),
        ("keys.npz", fastattn.load, "0/value"),
    ):
        load(tmp_path / name)
        with np.load(tmp_path / name) as file:
            arrays = dict(file)
        arrays[member].view(np.uint8)[3, 5] ^= 1
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=rf"{name}: {member} is damaged"):
            load(tmp_path / name)


def mode(path):
    return path.stat().st_mode & 0o7777


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        with replacing(path) as new:
            new.write_text("1")
        assert mode(path) == 0o640
        for bits in (0o600, 0o664, 0o444):
            path.chmod(bits)
            with replacing(path) as new:
                # never more readable than what it replaces
                assert mode(new) == bits
                new.unlink()
                new.write_text("2")
            assert mode(path) == bits
    finally:
        os.umask(old)
    assert path.read_text() == "2"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to("a")
    with replacing(tmp_path / "link") as new:
        new.write_text("2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "2"


def test_a_long_name_is_no_longer_while_it_is_written(tmp_path):
    path = tmp_path / ("x" * 255)
    with replacing(path) as new:
        new.write_text("1")
    assert path.read_text() == "1"


def test_errors_name_the_file_that_was_wanted(tmp_path):
    path = tmp_path / "none" / "a"
    missing = pytest.raises(FileNotFoundError, match="a: there is no folder")
    with missing, replacing(path):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: is no file"), replacing(tmp_path / "pipe"):
        pass
    path = tmp_path / "a"
    full = pytest.raises(OSError, match=r"No space.*'.*/a'")
    with full as caught, replacing(path) as new:
        raise OSError(28, "No space left on device", str(new))
    assert ".tmp" not in str(caught.value)
