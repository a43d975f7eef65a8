"""Files of queries, keys and values: what goes in comes out, anything else is named."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest

from fastattn.files import formats
from fastattn.files.formats import check_output, read_inputs, write_output
from fastattn.files.mapped import NAMINGS

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors missing")

SUFFIXES = (".npz", ".safetensors")
META = {"scale": 0.25, "layers": [1, 2], "text": "1", "causal": False}


@pytest.fixture
def inputs(rng):
    """Query, key and value of different sizes, so that no two can be mixed up."""
    shapes = [(2, 7, 4), (2, 5, 4), (2, 5, 3)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def save(path, arrays, metadata=None):
    """Write with the formats' own libraries."""
    if path.suffix == ".safetensors":
        safetensors.save_file(arrays, path, metadata=metadata)
    else:
        extra = {} if metadata is None else {"meta": np.array(json.dumps(metadata))}
        np.savez(path, **arrays, **extra)


def raw_safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def is_mapped(x):
    return isinstance(x, np.memmap) or isinstance(x.base, np.memmap)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_reads_what_was_saved_and_maps_it(tmp_path, inputs, suffix, naming, dtype):
    path = tmp_path / f"inputs{suffix}"
    inputs = [x.astype(dtype) for x in inputs]
    save(path, dict(zip(naming, inputs, strict=True)) | {"other": np.arange(3)})
    *found, meta = read_inputs(path)
    assert meta == {}
    for x, want in zip(found, inputs, strict=True):
        assert is_mapped(x)
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_written_arrays_and_metadata_come_back(tmp_path, inputs, suffix):
    path = tmp_path / f"inputs{suffix}"
    query, key, value = inputs
    swapped = np.swapaxes(query.copy(), 0, 1)
    write_output(str(path), {"q": swapped, "k": key, "v": value}, META)
    *found, meta = read_inputs(str(path))
    assert meta == META
    for x, want in zip(found, [swapped, key, value], strict=True):
        assert is_mapped(x)
        np.testing.assert_array_equal(x, want)


def test_other_libraries_read_what_was_written(tmp_path, inputs):
    arrays = {"out": inputs[0], "log_normalizer": inputs[1][..., 0]}
    for suffix in SUFFIXES:
        write_output(tmp_path / f"out{suffix}", arrays, META)
    with np.load(tmp_path / "out.npz") as file:
        assert json.loads(str(file["meta"])) == META
        stored = {name: file[name] for name in arrays}
    for found in (stored, safetensors.load_file(tmp_path / "out.safetensors")):
        assert found.keys() == arrays.keys()
        for name, want in arrays.items():
            np.testing.assert_array_equal(found[name], want)


def test_foreign_metadata_of_safetensors_stays_text(tmp_path, inputs):
    path = tmp_path / "inputs.safetensors"
    save(path, dict(zip("qkv", inputs, strict=True)), {"format": "np", "layer": "3"})
    assert read_inputs(path)[3] == {"format": "np", "layer": "3"}


@pytest.mark.parametrize("metadata", [None, {}])
def test_metadata_of_safetensors_may_be_null(tmp_path, metadata):
    header = {"__metadata__": metadata} | {name: ENTRY for name in "qkv"}
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(raw_safetensors(header, X.tobytes()))
    *found, meta = read_inputs(path)
    assert meta == {}
    for x in found:
        np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_that_json_does_not_have_are_strings(tmp_path, inputs, suffix):
    path = tmp_path / f"inputs{suffix}"
    arrays = dict(zip("qkv", inputs, strict=True))
    text = '\ufeff{"a": NaN, "b": [Infinity, -1e999]}'
    if suffix == ".npz":
        np.savez(path, **arrays, meta=np.array(text))
    else:
        safetensors.save_file(arrays, path, metadata={"meta": text})
    meta = read_inputs(path)[3]
    assert meta == {"a": "NaN", "b": ["Infinity", "-1e999"]}
    write_output(tmp_path / "out.npz", arrays, {"a": np.nan, "b": [np.inf]})
    with np.load(tmp_path / "out.npz") as file:
        found = json.loads(str(file["meta"]), parse_constant=pytest.fail)
    assert found == {"a": "NaN", "b": ["Infinity"]}


def test_compressed_members_are_loaded(tmp_path, inputs):
    path = tmp_path / "inputs.npz"
    np.savez_compressed(path, **dict(zip("qkv", inputs, strict=True)))
    for x, want in zip(read_inputs(path)[:3], inputs, strict=True):
        assert not is_mapped(x)
        np.testing.assert_array_equal(x, want)


def test_fortran_order_and_foreign_byte_order(tmp_path, inputs):
    path = tmp_path / "inputs.npz"
    query, key, value = inputs
    np.savez(path, q=np.asfortranarray(query), k=key.astype(">f4"), v=value)
    for x, want in zip(read_inputs(path)[:3], inputs, strict=True):
        assert x.dtype.isnative
        np.testing.assert_array_equal(x, want)


def test_bfloat16_becomes_float32(tmp_path):
    # numbers with 8 significant bits survive the cut to the upper 16 bits
    want = np.array([[1.5, -2.0, 0.0], [2.0**-130, 3.0e38, 255]], dtype=np.float32)
    want = (want.view(np.uint32) & 0xFFFF0000).view(np.float32)
    half = (want.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {
        name: {
            "dtype": "BF16",
            "shape": [2, 3],
            "data_offsets": [i * len(half), (i + 1) * len(half)],
        }
        for i, name in enumerate("qkv")
    }
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(raw_safetensors(header, 3 * half))
    for x in read_inputs(path)[:3]:
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, want)


def _npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _encrypted():
    # the flag alone: zipfile asks for the password before it reads anything
    content = bytearray(_npz(q=X, k=X, v=X))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + at] |= 1
            place = content.find(signature, place + 1)
    return bytes(content)


def _wide_member():
    # the header claims more bytes than the member has
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 4)}
    with zipfile.ZipFile(file, "w") as archive:
        for name in "qkv":
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, header)
    return file.getvalue()


X = np.ones((3, 2), dtype=np.float32)
ENTRY = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
BAD = {
    "empty.npz": (b"", "the file is empty"),
    "empty.safetensors": (b"", "the file is empty"),
    "foreign.npz": (b"GIF89a" * 20, "not a zip file"),
    "foreign.safetensors": (b"GIF89a" * 20, "not a .safetensors file"),
    "list.safetensors": (raw_safetensors([1]), "header is no JSON object"),
    "text.safetensors": (raw_safetensors(b"{nonsense"), "header is no JSON"),
    "deep.safetensors": (raw_safetensors(b"[" * 10**5), r"deep\.safetensors: "),
    "half.npz": (_npz(q=X, k=X), "expected arrays .* found k, q"),
    "none.safetensors": (raw_safetensors({}), "expected arrays .* found none"),
    "many.npz": (
        _npz(**{f"x{i}": X for i in range(30)}),
        r"expected arrays .* found x0, .*, \.\.\.$",
    ),
    "two.npz": (
        _npz(q=X, k=X, v=X, Q=X, K=X, V=X),
        "expected arrays of one of .* found all of them",
    ),
    "pickle.npz": (
        _npz(q=X, k=X, v=np.array([{}, []], dtype=object)),
        "v holds pickled Python objects",
    ),
    "integer.npz": (_npz(q=X, k=X.astype(int), v=X), "k has dtype int64"),
    "complex.npz": (_npz(q=X.astype(complex), k=X, v=X), "q has dtype complex128"),
    "wide.npz": (_wide_member(), r"q has 0 bytes where its shape \(1099511627776, 4\)"),
    "encrypted.npz": (_encrypted(), "encrypted"),
    "meta.npz": (_npz(q=X, k=X, v=X, meta=X), "meta is no string"),
    "prose.npz": (_npz(q=X, k=X, v=X, meta=np.array("hi")), "meta is no JSON"),
    "number.npz": (_npz(q=X, k=X, v=X, meta=np.array("3")), "meta is no JSON object"),
    "integer.safetensors": (
        raw_safetensors({n: ENTRY | {"dtype": "I32"} for n in "qkv"}, bytes(24)),
        "q has dtype I32, expected one of",
    ),
    "metadata.safetensors": (
        raw_safetensors({"__metadata__": [1]} | dict.fromkeys("qkv", 1), bytes(24)),
        "its __metadata__ is a list",
    ),
    "long.safetensors": (
        (1 << 27).to_bytes(8, "little") + bytes(1 << 20),
        "truncated in its header",
    ),
    "bool.safetensors": (
        raw_safetensors({n: ENTRY | {"shape": [True, 6]} for n in "qkv"}, bytes(24)),
        "q has a malformed entry",
    ),
    "entry.safetensors": (
        raw_safetensors({name: {"dtype": "F32"} for name in "qkv"}),
        "q has a malformed entry",
    ),
    "offsets.safetensors": (
        raw_safetensors({n: ENTRY | {"shape": [3, 3]} for n in "qkv"}, bytes(24)),
        "q has bytes 0 to 24 for shape",
    ),
    "negative.safetensors": (
        raw_safetensors({n: ENTRY | {"shape": [-3, -2]} for n in "qkv"}, bytes(24)),
        "q has bytes 0 to 24 for shape",
    ),
    "short.safetensors": (
        raw_safetensors(dict.fromkeys("qkv", ENTRY), bytes(20)),
        "truncated: q ends at",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_inputs(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, inputs, suffix):
    path = tmp_path / f"inputs{suffix}"
    save(path, dict(zip("qkv", inputs, strict=True)))
    content = path.read_bytes()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"inputs{suffix}: "):
            read_inputs(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_read_or_refused(tmp_path, inputs, rng, suffix):
    path = tmp_path / f"inputs{suffix}"
    save(path, dict(zip("qkv", inputs, strict=True)))
    content = path.read_bytes()
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        damaged[rng.integers(len(damaged), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        message = ""
        try:
            read_inputs(path)
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
        assert not message or str(path) in message
    assert refused > 0


def test_missing_files_and_folders(tmp_path):
    for suffix in SUFFIXES:
        missing = tmp_path / f"missing{suffix}"
        with pytest.raises(FileNotFoundError, match=f"missing{suffix}"):
            read_inputs(missing)
        folder = tmp_path / f"folder{suffix}"
        folder.mkdir()
        with pytest.raises(OSError, match=f"folder{suffix}"):
            read_inputs(folder)
        with pytest.raises(IsADirectoryError, match="is a folder"):
            write_output(folder, {}, {})
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            check_output(tmp_path / "nowhere" / f"out{suffix}")


@pytest.mark.parametrize("name", ["inputs.npy", "inputs", "inputs.npz.gz"])
def test_unknown_suffixes_name_the_known_ones(tmp_path, name):
    for call in (read_inputs, check_output, lambda path: write_output(path, {}, {})):
        with pytest.raises(ValueError, match=r"ends in \.npz or \.safetensors"):
            call(tmp_path / name)


def test_outputs_that_no_file_can_hold(tmp_path):
    path = tmp_path / "out.npz"
    with pytest.raises(ValueError, match="cannot store an array 'out' of object"):
        write_output(path, {"out": np.array([{}])}, {})
    with pytest.raises(ValueError, match="cannot store an array 'meta'"):
        write_output(path, {"meta": X}, {})
    with pytest.raises(TypeError, match="JSON"):
        write_output(path, {"out": X}, {"array": X})
    assert list(tmp_path.iterdir()) == []


def _fail_midway(monkeypatch, error):
    """Let either format write a part and then fail."""
    written, write_array = [], np.lib.format.write_array

    def write_one(file, x, **options):
        if written:
            raise error
        written.append(x)
        write_array(file, x, **options)

    def save_half(arrays, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    monkeypatch.setattr(formats.npy, "write_array", write_one)
    monkeypatch.setattr(safetensors, "save_file", save_half)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, suffix, error):
    _fail_midway(monkeypatch, error)
    with pytest.raises(type(error)):
        write_output(tmp_path / f"out{suffix}", {"out": X, "more": X}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"out{suffix}"
    write_output(path, {"out": X}, META)
    before = path.read_bytes()
    _fail_midway(monkeypatch, OSError(28, "No space left"))
    with pytest.raises(OSError, match="No space left"):
        write_output(path, {"out": 2 * X, "more": X}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_outputs_are_as_readable_as_other_files(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_output(path, {"out": X}, {})
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_an_output_may_replace_its_mapped_input(tmp_path, inputs):
    for suffix in SUFFIXES:
        path = tmp_path / f"inputs{suffix}"
        save(path, dict(zip("qkv", inputs, strict=True)))
        query, key, value, _ = read_inputs(path)
        write_output(path, {"q": value, "k": key, "v": query}, {})
        np.testing.assert_array_equal(query, inputs[0])
        np.testing.assert_array_equal(read_inputs(path)[2], inputs[0])


def test_without_safetensors_writing_says_what_to_install(
    tmp_path, inputs, monkeypatch
):
    path = tmp_path / "inputs.safetensors"
    save(path, dict(zip("qkv", inputs, strict=True)))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (check_output, lambda path: write_output(path, {"out": X}, {})):
        with pytest.raises(ImportError, match=r"pip install 'fastattn\[cli\]'"):
            call(path)
    np.testing.assert_array_equal(read_inputs(path)[0], inputs[0])
