"""The arrays of .npz and .safetensors files as they are stored, memory-mapped."""

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from sketching._lib.archives import (
    check_size,
    members_of,
    opened,
    read_header,
    read_member,
    read_text,
    reading,
)
from sketching._lib.arrays import Array
from sketching._lib.json_text import parse_object

# the names under which a file may hold its query, key and value
NAMINGS = (("query", "key", "value"), ("q", "k", "v"), ("Q", "K", "V"))
META = "meta"
_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# limits on the bytes of a header: 1 / _SHARE of the memory, because its Python objects
# are some twenty times as large, but at least _SHORT; and the limit of safetensors
_SHARE, _SHORT, _LARGEST_HEADER = 32, 1 << 20, 1 << 26


def native(x: Array) -> Array:
    """Convert a stored array to native floats; bfloat16 bits to float32."""
    if x.dtype.kind == "u":
        # a bfloat16 is the upper half of a float32
        wide = x.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def native_dtype(x: Array) -> Any:
    """Return the dtype of ``native(x)``."""
    return native(x[(slice(0, 0),) * x.ndim]).dtype if x.ndim else x.dtype


def _choose(names: Collection[str]) -> tuple[str, str, str]:
    """Return the one triple of ``NAMINGS`` that is in ``names``; raise ValueError."""
    complete = [naming for naming in NAMINGS if set(naming) <= set(names)]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise ValueError(f"expected arrays of one of {complete}, found all of them")
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
    with reading(path) as archive:
        members = members_of(archive)
        names = _choose(members.keys() - {META})
        arrays = []
        for name in names:
            arrays.append(_read_member(path, archive, name, members[name], most))
            if members[name].compress_type != zipfile.ZIP_STORED:
                # the memory that remains for later arrays
                most -= arrays[-1].nbytes
        if META not in members:
            return arrays, {}
        text = read_text(archive, META, members[META], min(most, _LARGEST_HEADER))
        return arrays, parse_object(META, text)


def _read_member(
    path: Path,
    archive: zipfile.ZipFile,
    name: str,
    info: zipfile.ZipInfo,
    most: float,
) -> Array:
    """Map a stored member of an ``.npz`` file, load a compressed one."""
    with opened(archive, name, info) as member:
        shape, is_fortran, dtype, start = read_header(name, member)
    _check_dtype(name, dtype)
    size = check_size(name, info, shape, dtype, start)
    if info.compress_type != zipfile.ZIP_STORED:
        if size > most:
            raise ValueError(
                f"{name} is compressed and takes {size} bytes, more than the "
                f"{most:.0f} bytes of memory that remain: store it with numpy.savez, "
                "which does not compress, or allow more by --memory"
            )
        return read_member(archive, name, info, most)
    order = "F" if is_fortran else "C"
    return _map(path, name, dtype, _data_start(path, info) + start, shape, order)


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the offset of the bytes of a stored member.

    The local header repeats the name and may have different extra fields from the
    central directory, so that its own lengths must be used.
    """
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    lengths = np.frombuffer(header, dtype="<u2", count=2, offset=26)
    return info.header_offset + 30 + int(lengths.sum(dtype=np.int64))


def read_safetensors(path: Path, most: float) -> tuple[list[Array], dict[str, Any]]:
    """Read the three tensors and the metadata of a ``.safetensors`` file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= path.stat().st_size - 8:
            raise ValueError("not a .safetensors file, or truncated in its header")
        limit = min(_LARGEST_HEADER, max(_SHORT, most / _SHARE))
        if size > limit:
            raise ValueError(
                f"its header has {size} bytes, expected at most {limit:.0f}"
            )
        header = parse_object("not a .safetensors file: its header", file.read(size))
    # some writers store null
    meta = header.pop("__metadata__", None) or {}
    if not isinstance(meta, dict):
        raise ValueError(f"its __metadata__ is a {type(meta).__name__}, not an object")
    arrays = [
        _read_tensor(path, name, header[name], 8 + size) for name in _choose(header)
    ]
    if META not in meta:
        return arrays, meta
    if not isinstance(meta[META], str):
        raise ValueError(f"{META} in its __metadata__ is no string")
    return arrays, parse_object(META, meta[META])


def _read_tensor(path: Path, name: str, entry: Any, start: int) -> Array:
    """Map one tensor, bfloat16 as 16-bit unsigned integers."""
    try:
        kind, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (begin, end, *shape)
        if not all(type(x) is int for x in numbers):
            raise TypeError("sizes are integers")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has a malformed entry in the header") from error
    if kind not in _DTYPES:
        raise ValueError(f"{name} has dtype {kind}, expected one of {list(_DTYPES)}")
    dtype = np.dtype(_DTYPES[kind])
    if min(numbers) < 0 or begin + math.prod(shape) * dtype.itemsize != end:
        raise ValueError(f"{name} has bytes {begin} to {end} for shape {shape}")
    return _map(path, name, dtype, start + begin, shape, "C")
