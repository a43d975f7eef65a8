"""The arrays of .npz and .safetensors files as they are stored, memory-mapped."""

import json
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from sketching._lib.arrays import Array

# the names under which a file may hold its query, key and value
NAMINGS = (("query", "key", "value"), ("q", "k", "v"), ("Q", "K", "V"))
META = "meta"
_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# the limit that safetensors itself sets
_LARGEST_HEADER = 100_000_000


def native(x: Array) -> Array:
    """Turn what is stored into floats of this machine; the bits of bfloat16 too."""
    if x.dtype.kind == "u":
        # a bfloat16 is the upper half of a float32
        wide = x.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def native_dtype(x: Array) -> Any:
    """Return the dtype of what ``native`` makes of an array."""
    return native(x[(slice(0, 0),) * x.ndim]).dtype if x.ndim else x.dtype


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


def parse_object(what: str, text: str | bytes) -> dict[str, Any]:
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
    return np.memmap(path, dtype, "r", start, shape, order)


def read_npz(path: Path, most: float) -> tuple[list[Array], dict[str, Any]]:
    """Read the three arrays and the metadata of an ``.npz`` file."""
    with zipfile.ZipFile(path) as archive:
        members = {
            info.filename.removesuffix(".npy"): info for info in archive.infolist()
        }
        names = _choose(members.keys() - {META})
        arrays = [
            _read_member(path, archive, name, members[name], most) for name in names
        ]
        if META not in members:
            return arrays, {}
        with archive.open(members[META]) as member:
            text = npy.read_array(member, allow_pickle=False)
        if text.dtype.kind != "U" or text.ndim:
            raise ValueError(f"{META} is no string")
        return arrays, parse_object(META, str(text))


def _read_member(
    path: Path,
    archive: zipfile.ZipFile,
    name: str,
    info: zipfile.ZipInfo,
    most: float,
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
        if size > most:
            raise ValueError(
                f"{name} is compressed and takes {size} bytes, more than memory is "
                "allowed: store it with numpy.savez, which does not compress"
            )
        with archive.open(info) as member:
            return npy.read_array(member, allow_pickle=False)
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


def read_safetensors(
    path: Path,
    most: float,  # noqa: ARG001
) -> tuple[list[Array], dict[str, Any]]:
    """Read the three tensors and the metadata of a ``.safetensors`` file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(path.stat().st_size - 8, _LARGEST_HEADER):
            raise ValueError("not a .safetensors file, or truncated in its header")
        header = parse_object("not a .safetensors file: its header", file.read(size))
    meta = dict(header.pop("__metadata__", {}))
    arrays = [
        _read_tensor(path, name, header[name], 8 + size) for name in _choose(header)
    ]
    return arrays, parse_object(META, meta[META]) if META in meta else meta


def _read_tensor(path: Path, name: str, entry: Any, start: int) -> Array:
    """Map one tensor, bfloat16 as integers of its size."""
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
    return _map(path, name, dtype, start + begin, shape, "C")
