"""Files that are written whole or not at all, and read with care."""

import hashlib
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sketching._lib.archives import (
    check_total,
    members_of,
    read_member,
    read_text,
    reading,
)
from sketching._lib.arrays import Array
from sketching._lib.json_text import as_text, parse_object

_HEADER = "header"
# of arrays, in the headers of files
CHECKSUMS = "checksums"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new file to write, which becomes ``path`` if all goes well.

    It has the mode of the file that it replaces, else that of any new file. A link
    stays, and what it leads to is replaced.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: is no file that could be replaced")
    # a name of its own: one made of a long name would be too long
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with _naming(path, temporary):
            mode = _made_like(target, temporary)
            yield temporary
            # safetensors puts a private file of its own in place of this one
            temporary.chmod(mode)
            # a rename may be on disk before the data are
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _made_like(target: Path, temporary: Path) -> int:
    """Make the temporary file, and return the mode that it is to have."""
    temporary.touch(exist_ok=False)
    if not target.exists():
        return stat.S_IMODE(temporary.stat().st_mode)
    old, new = target.stat(), temporary.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        # without permission to change the owner the file stays the caller's
        with suppress(PermissionError):
            os.chown(temporary, old.st_uid, old.st_gid)
    mode = stat.S_IMODE(old.st_mode)
    temporary.chmod(mode)
    return mode


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors name the requested file, not the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Name the file in one line, whatever error a parser raises."""
    try:
        yield
    except OSError as error:
        if error.filename is None and not str(error).startswith(f"{path}: "):
            raise OSError(f"{path}: {error}") from error
        raise
    except MemoryError as error:
        raise ValueError(f"{path}: takes more memory than there is") from error
    except Exception as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def checksum(x: Array) -> str:
    """Return the SHA-256 of the bytes of an array, in C order."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return hashlib.sha256(memoryview(flat)).hexdigest()  # type: ignore[arg-type]


def check_sums(arrays: Mapping[str, Array], header: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first array with another checksum than was written.

    Files of earlier releases have no checksums.
    """
    known = header.get(CHECKSUMS)
    if known is None:
        return
    for name, x in arrays.items():
        if known.get(name) != checksum(x):
            raise ValueError(f"{name} is damaged: its checksum is another")


def write_arrays(
    path: Path, arrays: Mapping[str, Array], header: Mapping[str, Any]
) -> None:
    """Write arrays and a JSON header as an uncompressed ``.npz`` file.

    The header lists dtype, shape and checksum of every array, so that a file with
    parts missing, exchanged or damaged is found out.
    """
    plain = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    listed = {name: [x.dtype.str, list(x.shape)] for name, x in plain.items()}
    sums = {name: checksum(x) for name, x in plain.items()}
    text = as_text({**header, "arrays": listed, CHECKSUMS: sums})
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, x in {_HEADER: np.array(text), **plain}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, x, allow_pickle=False)


def read_arrays(
    path: Path, *, kind: str, version: int, memory: int | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read arrays and header of a file of this ``kind``, not newer than ``version``.

    Checksums are left to :func:`check_sums`, after checks with clearer messages.
    """
    with reading(path) as archive:
        members = members_of(archive)
        if _HEADER not in members:
            raise ValueError(f"not a file of {kind}: it has no header")
        most = check_total(path, archive, memory)
        text = read_text(archive, _HEADER, members.pop(_HEADER), most)
        header = _checked_header(text, kind, version)
        listed = header["arrays"]
        if set(listed) != set(members):
            wrong = sorted(set(listed) ^ set(members))[:20]
            raise ValueError(f"arrays are missing or foreign: {', '.join(wrong)}")
        arrays = {
            name: read_member(archive, name, members[name], most) for name in listed
        }
    for name, x in arrays.items():
        if [x.dtype.str, list(x.shape)] != listed[name]:
            raise ValueError(
                f"{name} is {x.dtype} of shape {x.shape}, the header says "
                f"{listed[name]}"
            )
    return arrays, header


def _checked_header(text: str, kind: str, version: int) -> dict[str, Any]:
    """Decode the header; refuse other kinds, and what a newer release wrote."""
    header = parse_object(f"not a file of {kind}: its header", text)
    if header.get("format") != kind:
        raise ValueError(f"not a file of {kind}: its header says otherwise")
    number = header.get("version")
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"its version is {number!r}")
    if number > version:
        raise ValueError(
            f"written by a newer release: version {number} of the "
            f"format, where this one reads up to {version}"
        )
    if not isinstance(header.get("arrays"), dict):
        raise ValueError("its header lists no arrays")
    return header
