"""Indexes that come back from files."""

from pathlib import Path

from sketching.index.files import PathLike, read_index
from sketching.index.mahalanobis import MahalanobisIndex


def load(path: PathLike, *, memory: int | None = None) -> MahalanobisIndex:
    """Read an index that :meth:`MahalanobisIndex.save` wrote.

    Parameters
    ----------
    path : str or path
        An ``.npz`` file.
    memory : int, optional
        Bytes that its arrays may take; by default 16 times the size of the file, and
        at least 64 MiB. ``save`` does not compress: only a file that somebody packed,
        perhaps to do harm, takes more than its size.

    Returns
    -------
    MahalanobisIndex
        It answers as the one that was saved would have, to the last bit.

    Raises
    ------
    ValueError
        If the file is truncated or damaged, of another kind or of a newer release, or
        if it unpacks to more than ``memory``.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sketching import MahalanobisIndex, MahalanobisMetric, load
    >>> index = MahalanobisIndex(MahalanobisMetric(np.eye(2)))
    >>> numbers = index.insert(np.eye(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     index.save(f"{folder}/index.npz")
    ...     len(load(f"{folder}/index.npz"))
    2
    """
    index = object.__new__(MahalanobisIndex)
    index._engine = read_index(Path(path), memory)
    return index
