"""Files that are written whole or not at all, and read with care."""

import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sketching._lib.arrays import Array

_HEADER = "header"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new file to write, which becomes ``path`` if all goes well."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
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


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
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
        KeyError,
        OverflowError,
        EOFError,
        RuntimeError,  # an encrypted or unsupported member; JSON nested too deeply
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def write_arrays(
    path: Path, arrays: Mapping[str, Array], header: Mapping[str, Any]
) -> None:
    """Write arrays and a JSON header as an uncompressed ``.npz`` file.

    The header lists dtype and shape of every array, so that a file with parts missing
    or exchanged is found out.
    """
    plain = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    listed = {name: [x.dtype.str, list(x.shape)] for name, x in plain.items()}
    text = json.dumps({**header, "arrays": listed})
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, x in {_HEADER: np.array(text), **plain}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, x, allow_pickle=False)


def read_arrays(
    path: Path, *, kind: str, version: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read arrays and header of a file of this ``kind``, not newer than ``version``."""
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.removesuffix(".npy") for info in archive.infolist()}
        if _HEADER not in names:
            raise ValueError(f"not a file of {kind}: it has no header")
        header = _read_header(archive, kind)
        if not isinstance(header.get("version"), int) or header["version"] < 1:
            raise ValueError(f"its version is {header.get('version')!r}")
        if header["version"] > version:
            raise ValueError(
                f"written by a newer release: version {header['version']} of the "
                f"format, where this one reads up to {version}"
            )
        listed = header["arrays"]
        if set(listed) != names - {_HEADER}:
            wrong = sorted(set(listed) ^ (names - {_HEADER}))
            raise ValueError(f"arrays are missing or foreign: {', '.join(wrong)}")
        arrays = {name: _read_member(archive, name) for name in listed}
    for name, x in arrays.items():
        if [x.dtype.str, list(x.shape)] != listed[name]:
            raise ValueError(
                f"{name} is {x.dtype} of shape {x.shape}, the header says "
                f"{listed[name]}"
            )
    return arrays, header


def _read_header(archive: zipfile.ZipFile, kind: str) -> dict[str, Any]:
    text = _read_member(archive, _HEADER)
    if text.dtype.kind != "U" or text.ndim:
        raise ValueError(f"not a file of {kind}: its header is no string")
    header = json.loads(str(text))
    if not isinstance(header, dict) or header.get("format") != kind:
        raise ValueError(f"not a file of {kind}: its header says otherwise")
    return header


def _read_member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as member:
        return npy.read_array(member, allow_pickle=False)
