"""Attention inputs and outputs as .npz and .safetensors files.

Uncompressed arrays are memory-mapped, so that a file larger than memory can be
processed head by head.
"""

import math
import mmap
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy

from fastattn.files.mapped import META, native, read_npz, read_safetensors
from sketching._lib.arrays import Array
from sketching._lib.files import naming_the_file, replacing
from sketching._lib.json_text import as_text

PathLike: TypeAlias = str | os.PathLike[str]
# entries of a memory map that are written at once
_ENTRIES = 1 << 22


def read_inputs(path: PathLike) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Read query, key and value, memory-mapped where the file allows it.

    Arrays of a ``.safetensors`` file and uncompressed members of an ``.npz`` file
    are read-only memory maps; compressed members are loaded. bfloat16 is converted
    to float32, in memory. Further arrays in the file are ignored.

    Parameters
    ----------
    path : str or path
        A file that ends in ``.npz`` or ``.safetensors``, with arrays ``query, key,
        value``, ``q, k, v`` or ``Q, K, V``.

    Returns
    -------
    query, key, value : array
        Of dtype float16, float32 or float64; shapes are as stored.
    meta : dict
        The JSON object of the string ``meta`` in the file (an array of an ``.npz``,
        an entry of the metadata of a ``.safetensors``), all metadata of a
        ``.safetensors`` file without it, else empty. NaN and infinities, which some
        writers put into JSON, are strings.

    Raises
    ------
    ValueError
        If the file is truncated or of another format, if it has none or several of
        these triples of names, or if an array holds anything but floats.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from fastattn.files.formats import read_inputs
    >>> x = np.ones((2, 8, 4), dtype=np.float16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/heads.npz", q=x, k=x, v=x)
    ...     query, key, value, meta = read_inputs(f"{folder}/heads.npz")
    >>> type(query).__name__, query.shape, meta
    ('memmap', (2, 8, 4), {})
    """
    *arrays, meta = read_stored(path)
    return native(arrays[0]), native(arrays[1]), native(arrays[2]), meta


def read_stored(
    path: PathLike, most: float = math.inf
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Read as :func:`read_inputs` does, but with the dtypes of the file.

    Parameters
    ----------
    path : str or path
        As in :func:`read_inputs`.
    most : float, optional
        Bytes that compressed arrays may take in memory; a header may take a share of
        them.

    Returns
    -------
    query, key, value : array
        Of either byte order; bfloat16 as 16-bit unsigned integers.
    meta : dict
        As in :func:`read_inputs`.

    Raises
    ------
    ValueError
        As in :func:`read_inputs`, and if compressed arrays take more than ``most``
        bytes.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from fastattn.files.formats import read_stored
    >>> x = np.ones((8, 4), dtype=">f4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/heads.npz", q=x, k=x, v=x)
    ...     query, key, value, meta = read_stored(f"{folder}/heads.npz")
    >>> query.dtype.str
    '>f4'
    """
    path = Path(path)
    read, _ = _format_of(path)
    with naming_the_file(path):
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        arrays, meta = read(path, most)
    return *arrays, meta


def write_output(
    path: PathLike, arrays: Mapping[str, Array], metadata: Mapping[str, Any]
) -> None:
    """Write arrays and metadata to a file, atomically.

    The file is written under a temporary name in the same folder and then renamed, so
    that a crash leaves no partial file.

    Parameters
    ----------
    path : str or path
        The output; the suffix, ``.npz`` or ``.safetensors``, sets the format.
    arrays : mapping of str to array
        Arrays by name. Memory maps are streamed.
    metadata : mapping
        Stored as a JSON string named ``meta``; NaN and infinities, which JSON does not
        have, as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

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
    >>> from fastattn.files.formats import write_output
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_output(f"{folder}/out.npz", {"out": np.eye(2)}, {"tol": 0.01})
    ...     with np.load(f"{folder}/out.npz") as file:
    ...         file.files, str(file["meta"])
    (['out', 'meta'], '{"tol": 0.01}')
    """
    path = Path(path)
    check_output(path)
    _, write = _format_of(path)
    text = as_text(dict(metadata))
    plain = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    for name, x in plain.items():
        if x.dtype.hasobject or name == META:
            raise ValueError(f"{path}: cannot store an array {name!r} of {x.dtype}")
    with replacing(path) as temporary:
        write(temporary, plain, text)


def check_output(path: PathLike) -> None:
    """Raise the errors of :func:`write_output` for a path, before the computation.

    Parameters
    ----------
    path : str or path
        The output.

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
    >>> from fastattn.files.formats import check_output
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


def _write_npz(path: Path, arrays: Mapping[str, Array], text: str) -> None:
    """Write an uncompressed ``.npz`` file, which can be memory-mapped again."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in {**arrays, META: np.array(text)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_member(member, x)


def _write_member(member: IO[bytes], x: Array) -> None:
    """Write an array; pages of a memory map are released after use."""
    pages = x
    while isinstance(pages, np.ndarray):
        pages = pages.base
    if not isinstance(pages, mmap.mmap):
        npy.write_array(member, x, allow_pickle=False)
        return
    npy.write_array_header_2_0(member, npy.header_data_from_array_1_0(x))
    flat = x.reshape(-1)
    for start in range(0, x.size, _ENTRIES):
        member.write(flat[start : start + _ENTRIES].data)
        pages.madvise(mmap.MADV_DONTNEED)


def _write_safetensors(path: Path, arrays: Mapping[str, Array], text: str) -> None:
    """Write a ``.safetensors`` file."""
    safetensors = _import_safetensors()
    try:
        safetensors.numpy.save_file(dict(arrays), path, metadata={META: text})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _import_safetensors() -> Any:
    """Import the optional dependency, or raise ImportError with the pip command."""
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
    ".npz": (read_npz, _write_npz),
    ".safetensors": (read_safetensors, _write_safetensors),
}
