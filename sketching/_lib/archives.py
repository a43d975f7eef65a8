"""Archives of arrays, read without using more memory than is allowed.

A compressed member of two megabytes may hold gigabytes, a header of an array may be as
long, and sizes may lie. So the header is read up to the length that headers have, sizes
are compared with each other and with the limit before an array is made, and no more
bytes are unpacked than the header says.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from sketching._lib.arrays import Array
from sketching._lib.validation import check_integer

# bytes of the list of members: each becomes an object some ten times as large
_LONGEST_LIST = 1 << 25
# bytes of an array's own header, as NumPy limits them, and signs and brackets in it,
# which a parser nests
_LONGEST_HEADER, _MOST_NESTED = 10_000, 256
# what is unpacked at once
_CHUNK = 1 << 20
# a file may unpack to so many times its size, or so many bytes, if memory= is not given
_GROWTH, _LEAST = 16, 1 << 26
# the end of an archive, with the longest comment
_TAIL = (1 << 16) + 128
# other compressions are unpacked without a limit
_KINDS = {zipfile.ZIP_STORED: "not", zipfile.ZIP_DEFLATED: "by deflate"}


@contextmanager
def reading(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive, unless its list of members is too long."""
    _check_list(path)
    with zipfile.ZipFile(path) as archive:
        yield archive


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Arrays of an archive by name; raise where two have the same."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise ValueError(f"holds {name} twice")
        found[name] = info
    return found


def check_total(path: Path, archive: zipfile.ZipFile, memory: int | None) -> int:
    """Raise unless all arrays fit in ``memory`` bytes; return what they may take.

    By default that is a multiple of the size of the file, which compressed numbers
    rarely exceed.
    """
    if memory is None:
        most = max(_LEAST, _GROWTH * path.stat().st_size)
    else:
        most = check_integer("memory", memory, least=1)
    total = sum(info.file_size for info in archive.infolist())
    if total > most:
        raise ValueError(
            f"unpacks to {total} bytes, where {most} are allowed: pass a larger "
            "memory= if the file is to be trusted"
        )
    return most


def read_header(name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any, int]:
    """Read shape, order, dtype and length of an array's header; the data come next."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8:
        raise ValueError(f"{name} is no array of NumPy")
    version = start[6], start[7]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has version {version} of .npy, expected 1.0 or 2.0")
    width = 2 * version[0]
    length = file.read(width)
    size = int.from_bytes(length, "little")
    if len(length) < width or size > _LONGEST_HEADER:
        raise ValueError(
            f"{name} has a header of {size} bytes, expected at most {_LONGEST_HEADER}"
        )
    text = file.read(size)
    if sum(text.count(sign) for sign in b"([{-+~") > _MOST_NESTED:
        raise ValueError(f"{name} has no readable header")
    read = npy.read_array_header_1_0 if width == 2 else npy.read_array_header_2_0
    try:
        shape, is_fortran, dtype = read(io.BytesIO(length + text))
    except Exception as error:
        # NumPy reads it as Python source, of which anything can be wrong
        raise ValueError(f"{name} has no readable header: {error}") from error
    if any(x < 0 for x in shape) or any(isinstance(x, bool) for x in shape):
        raise ValueError(f"{name} has an impossible shape {shape}")
    return shape, is_fortran, dtype, 8 + width + size


def check_size(
    name: str, info: zipfile.ZipInfo, shape: tuple[int, ...], dtype: Any, start: int
) -> int:
    """Return the bytes that an array's data take; raise if the file has others."""
    size = math.prod(shape) * int(dtype.itemsize)
    if start + size != info.file_size:
        raise ValueError(
            f"{name} has {info.file_size - start} bytes where its shape {shape} "
            f"takes {size}"
        )
    return size


def read_member(
    archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo, most: float
) -> Array:
    """Read an array of at most ``most`` bytes and verify its checksum."""
    with opened(archive, name, info) as file:
        shape, is_fortran, dtype, start = read_header(name, file)
        if dtype.hasobject:
            raise ValueError(
                f"{name} holds pickles: Object arrays cannot be loaded "
                "(allow_pickle=False)"
            )
        if dtype.kind not in "fiubU":
            raise ValueError(f"{name} has dtype {dtype}, expected numbers or text")
        size = check_size(name, info, shape, dtype, start)
        if size > most:
            raise ValueError(f"{name} takes {size} bytes, where {most} are allowed")
        out = np.empty(size, np.uint8)
        place = 0
        while place < size:
            data = file.read(min(_CHUNK, size - place))
            if not data:
                raise ValueError(f"{name} ends after {place} of {size} bytes")
            out[place : place + len(data)] = np.frombuffer(data, np.uint8)
            place += len(data)
        # at the end zipfile compares the checksum
        file.read(1)
    if not size:
        return np.empty(shape, dtype)
    return out.view(dtype).reshape(shape, order="F" if is_fortran else "C")


def read_text(
    archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo, most: float
) -> str:
    """Read an array that is one string."""
    text = read_member(archive, name, info, most)
    if text.dtype.kind != "U" or text.ndim:
        raise ValueError(f"{name} is no string")
    return str(text)


def opened(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> IO[bytes]:
    """Open a member, unless its compression is not supported."""
    if info.compress_type not in _KINDS:
        kinds = " or ".join(_KINDS.values())
        raise ValueError(
            f"{name} has compression {info.compress_type} of the zip format, expected "
            f"a file that is compressed {kinds}"
        )
    return archive.open(info)


def _check_list(path: Path) -> None:
    """Raise where the list of members, as the end of the file has it, is too long."""
    with path.open("rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(-min(file.tell(), _TAIL), io.SEEK_END)
        data = file.read()
        end = data.rfind(b"PK\x05\x06")
        if end < 0:
            # zipfile says so
            return
        sizes = {int.from_bytes(data[end + 12 : end + 16], "little")}
        locator = data[max(0, end - 20) : end]
        if locator.startswith(b"PK\x06\x07"):
            # a record of large archives has the size in eight bytes: right before, or
            # where the locator says
            file.seek(min(int.from_bytes(locator[8:16], "little"), 1 << 62))
            records = data[max(0, end - 76) : end - 20], file.read(56)
            sizes |= {
                int.from_bytes(x[40:48], "little")
                for x in records
                if x.startswith(b"PK\x06\x06")
            }
            sizes.discard(0xFFFFFFFF)
    if max(sizes, default=0) > _LONGEST_LIST:
        raise ValueError(
            f"its list of arrays takes {max(sizes)} bytes, expected at most "
            f"{_LONGEST_LIST}"
        )
