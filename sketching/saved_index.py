"""Indexes that come back from files."""

from pathlib import Path

from sketching._index_files import PathLike, read_index
from sketching.mahalanobis import MahalanobisIndex


def load(path: PathLike) -> MahalanobisIndex:
    """Read an index that :meth:`MahalanobisIndex.save` wrote.

    Parameters
    ----------
    path : str or path
        An ``.npz`` file.

    Returns
    -------
    MahalanobisIndex
        It answers as the one that was saved would have, to the last bit.

    Raises
    ------
    ValueError
        If the file is truncated, of another kind, or of a newer release.
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
    index._engine = read_index(Path(path))
    return index
