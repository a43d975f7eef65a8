"""Attention inputs and outputs as .npz and .safetensors files.

What a file stores as plain bytes is memory-mapped, so that a file larger than memory
can be worked through head by head.
"""

import json
import math
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy

from sketching._lib.arrays import Array

PathLike: TypeAlias = str | os.PathLike[str]

# the names under which a file may hold its query, key and value
NAMINGS = (("query", "key", "value"), ("q", "k", "v"), ("Q", "K", "V"))
_META = "meta"


def read_inputs(path: PathLike) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Read query, key and value, memory-mapped where the file allows it.

    Arrays of a ``.safetensors`` file and uncompressed members of an ``.npz`` file
    are read-only memory maps; compressed members are loaded. bfloat16 is converted
    to float32, in memory. Other arrays in the file are left alone.

    Parameters
    ----------
    path : str or path
        A file that ends in ``.npz`` or ``.safetensors``, with arrays of one naming:
        ``query, key, value``, ``q, k, v`` or ``Q, K, V``.

    Returns
    -------
    query, key, value : array
        Of dtype float16, float32 or float64; shapes are as stored.
    meta : dict
        The JSON object of the string ``meta`` in the file (an array of an ``.npz``,
        an entry of the metadata of a ``.safetensors``), all metadata of a
        ``.safetensors`` file without it, else empty.

    Raises
    ------
    ValueError
        If the file is truncated or of another format, if it lacks a complete naming
        or has two, or if an array holds anything but floats.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from fastattn.formats import read_inputs
    >>> x = np.ones((2, 8, 4), dtype=np.float16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/heads.npz", q=x, k=x, v=x)
    ...     query, key, value, meta = read_inputs(f"{folder}/heads.npz")
    >>> type(query).__name__, query.shape, meta
    ('memmap', (2, 8, 4), {})
    """
    path = Path(path)
    read, _ = _format_of(path)
    with _naming_the_file(path):
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        arrays, meta = read(path)
    return *arrays, meta


def write_output(
    path: PathLike, arrays: Mapping[str, Array], metadata: Mapping[str, Any]
) -> None:
    """Write arrays and metadata to a file, whole or not at all.

    The file is written under another name in the same folder and then renamed, so
    that no crash leaves half of it behind.

    Parameters
    ----------
    path : str or path
        Where to; the suffix, ``.npz`` or ``.safetensors``, picks the format.
    arrays : mapping of str to array
        What to write. Memory maps are streamed.
    metadata : mapping
        Stored as a JSON string named ``meta``.

    Raises
    ------
    ValueError
        If the suffix is unknown, an array has no plain dtype or is called ``meta``.
    TypeError
        If the metadata does not fit in JSON.
    OSError
        If the file cannot be written.
    ImportError
        If safetensors is wanted and not installed.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from fastattn.formats import write_output
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_output(f"{folder}/out.npz", {"out": np.eye(2)}, {"tol": 0.01})
    ...     with np.load(f"{folder}/out.npz") as file:
    ...         file.files, str(file["meta"])
    (['out', 'meta'], '{"tol": 0.01}')
    """
    path = Path(path)
    check_output(path)
    _, write = _format_of(path)
    text = json.dumps(dict(metadata))
    plain = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    for name, x in plain.items():
        if x.dtype.hasobject or name == _META:
            raise ValueError(f"{path}: cannot store an array {name!r} of {x.dtype}")
    with _replacing(path) as temporary:
        write(temporary, plain, text)


def check_output(path: PathLike) -> None:
    """Raise what :func:`write_output` would raise for this path, before the work.

    Parameters
    ----------
    path : str or path
        Where an output is to be written.

    Raises
    ------
    ValueError
        If the suffix is unknown.
    OSError
        If the folder does not exist, or the path is a folder itself.
    ImportError
        If safetensors is wanted and not installed.

    Examples
    --------
    >>> from fastattn.formats import check_output
    >>> check_output("out.npz")
    """
    path = Path(path)
    _, write = _format_of(path)
    if write is _write_safetensors:
        _import_safetensors()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")


@contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Say which file it was, in one line, whatever a parser stumbles over."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(f"{path}: {error}") from error
        raise
    except (
        ValueError,
        TypeError,
        OverflowError,
        EOFError,
        RuntimeError,  # an encrypted or unsupported member; JSON nested too deeply
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a new file to write, which becomes ``path`` if all goes well."""
    temporary = path.with_name(f".fastattn-{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        # safetensors puts a private file of its own in place of this one
        temporary.chmod(mode)
        # a rename may reach the disk before the data do
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _choose(names: Collection[str]) -> tuple[str, str, str]:
    """Pick the one complete naming among ``names``."""
    complete = [naming for naming in NAMINGS if set(naming) <= set(names)]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise ValueError(f"expected one of the namings {complete}, found them all")
    wanted = " or ".join(", ".join(naming) for naming in NAMINGS)
    # a checkpoint of a model may hold thousands
    found = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
    raise ValueError(f"expected arrays {wanted}; found {found or 'none'}")


def _check_dtype(name: str, dtype: Any) -> None:
    """Raise ``ValueError`` unless attention can be computed in ``dtype``."""
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled Python objects, which are never loaded")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(
            f"{name} has dtype {dtype}, expected float16, float32 or float64"
        )


def _parse_object(what: str, text: str | bytes) -> dict[str, Any]:
    """Decode a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _map(
    path: Path, name: str, dtype: Any, start: int, shape: tuple[int, ...], order: Any
) -> Array:
    """Map an array whose bytes lie in the file from ``start``."""
    end = start + math.prod(shape) * dtype.itemsize
    size = path.stat().st_size
    if end > size:
        raise ValueError(f"truncated: {name} ends at byte {end}, the file at {size}")
    if end == start:
        return np.empty(shape, dtype=dtype)
    return _native(np.memmap(path, dtype, "r", start, shape, order))


def _native(x: Array) -> Array:
    """Bring an array from a machine of the other byte order into this one's."""
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _read_npz(path: Path) -> tuple[list[Array], dict[str, Any]]:
    """Read the three arrays and the metadata of an ``.npz`` file."""
    with zipfile.ZipFile(path) as archive:
        members = {
            info.filename.removesuffix(".npy"): info for info in archive.infolist()
        }
        names = _choose(members.keys() - {_META})
        arrays = [_read_member(path, archive, name, members[name]) for name in names]
        if _META not in members:
            return arrays, {}
        with archive.open(members[_META]) as member:
            text = npy.read_array(member, allow_pickle=False)
        if text.dtype.kind != "U" or text.ndim:
            raise ValueError(f"{_META} is no string")
        return arrays, _parse_object(_META, str(text))


def _read_member(
    path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo
) -> Array:
    """Map a stored member of an ``.npz`` file, load a compressed one."""
    with archive.open(info) as member:
        shape, is_fortran, dtype = _read_npy_header(name, member)
        start = member.tell()
    _check_dtype(name, dtype)
    size = math.prod(shape) * dtype.itemsize
    if start + size != info.file_size:
        raise ValueError(
            f"{name} has {info.file_size - start} bytes where its shape {shape} "
            f"takes {size}"
        )
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            return _native(npy.read_array(member, allow_pickle=False))
    order = "F" if is_fortran else "C"
    return _map(path, name, dtype, _data_start(path, info) + start, shape, order)


def _read_npy_header(name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Read shape, order and dtype, and leave the file where the data begin."""
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"{name} has version {version} of .npy, expected 1.0 or 2.0")
    if any(size < 0 for size in shape):
        raise ValueError(f"{name} has an impossible shape {shape}")
    return shape, is_fortran, dtype


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Find where the bytes of a stored member begin.

    The local header repeats the name and may have other extra fields than the central
    directory, so its own lengths count.
    """
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    lengths = np.frombuffer(header, dtype="<u2", count=2, offset=26)
    return info.header_offset + 30 + int(lengths.sum(dtype=np.int64))


def _write_npz(path: Path, arrays: Mapping[str, Array], text: str) -> None:
    """Write an uncompressed ``.npz`` file, which can be memory-mapped again."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in {**arrays, _META: np.array(text)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, x, allow_pickle=False)


def _read_safetensors(path: Path) -> tuple[list[Array], dict[str, Any]]:
    """Read the three tensors and the metadata of a ``.safetensors`` file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(path.stat().st_size - 8, _LARGEST_HEADER):
            raise ValueError("not a .safetensors file, or truncated in its header")
        header = _parse_object("not a .safetensors file: its header", file.read(size))
    meta = dict(header.pop("__metadata__", {}))
    arrays = [
        _read_tensor(path, name, header[name], 8 + size) for name in _choose(header)
    ]
    return arrays, _parse_object(_META, meta[_META]) if _META in meta else meta


def _read_tensor(path: Path, name: str, entry: Any, start: int) -> Array:
    """Map one tensor; bfloat16 becomes float32 in memory."""
    try:
        kind, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sizes_fit = min(begin, *shape, 0) == 0
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has a malformed entry in the header") from error
    if kind not in _DTYPES:
        raise ValueError(f"{name} has dtype {kind}, expected one of {list(_DTYPES)}")
    dtype = np.dtype(_DTYPES[kind])
    if not sizes_fit or begin + math.prod(shape) * dtype.itemsize != end:
        raise ValueError(f"{name} has bytes {begin} to {end} for shape {shape}")
    mapped = _map(path, name, dtype, start + begin, shape, "C")
    if kind != "BF16":
        return mapped
    # a bfloat16 is the upper half of a float32
    wide = mapped.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _write_safetensors(path: Path, arrays: Mapping[str, Array], text: str) -> None:
    """Write a ``.safetensors`` file."""
    safetensors = _import_safetensors()
    try:
        safetensors.numpy.save_file(dict(arrays), path, metadata={_META: text})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _import_safetensors() -> Any:
    """Import the optional dependency, or say how to get it."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "writing .safetensors needs safetensors: pip install 'fastattn[cli]'"
        ) from error
    return safetensors


def _format_of(path: Path) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Return the reader and the writer for the suffix of a path."""
    if path.suffix.lower() not in _FORMATS:
        known = " or ".join(_FORMATS)
        raise ValueError(f"{path}: expected a file name that ends in {known}")
    return _FORMATS[path.suffix.lower()]


_FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    ".npz": (_read_npz, _write_npz),
    ".safetensors": (_read_safetensors, _write_safetensors),
}
_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# the limit that safetensors itself sets
_LARGEST_HEADER = 100_000_000
