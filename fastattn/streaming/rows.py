"""One head of a file, whose rows are read in blocks.

Each block has its own memory map, which is closed after use: the pages of one large
map would stay in memory as long as there is room.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.files.mapped import native, native_dtype
from fastattn.problem.batch import check_shapes, own_place
from sketching._lib.arrays import Array
from sketching._lib.validation import (
    check_float_shape,
    check_number,
    not_finite,
    raise_not_finite,
)

# a block may take 1 / _SHARE of the memory: there are two, keys and values, copies
# where dtypes are converted, and the temporary arrays of attention
_SHARE = 16
# least and largest number of rows of a block
_FEWEST, _MOST = 1024, 1 << 18
# scattered rows that are taken from one map, since reading a row reads whole pages
_TAKEN = 1024

# gets the number of the first row, outputs and log-sum-exps
Put = Callable[[int, Array, Array], None]
# advances a progress bar by a share of the whole
Step = Callable[[float], None]


def mapped_anew(x: Array, advice: int = mmap.MADV_SEQUENTIAL) -> Array:
    """Map an array of a file again, with advice on how it is going to be read."""
    if not isinstance(x, np.memmap):
        return x
    path: Any = x.filename
    order: Any = "C" if x.flags.c_contiguous else "F"
    again = np.memmap(path, x.dtype, "r", x.offset, x.shape, order)
    if isinstance(again.base, mmap.mmap):
        again.base.madvise(advice)
    return np.asarray(again)


@dataclass(frozen=True, slots=True, eq=False)
class FileRows:
    """The rows of one head of an array in a file; none stay in memory.

    Parameters
    ----------
    name : str
        Name of the argument in error messages.
    stored : array, shape (..., m, c)
        All heads as stored in the file: a memory map, or the decompressed array.
    place : tuple of int
        The head; the leading dimensions of ``stored`` broadcast to it.
    """

    name: str
    stored: Array
    place: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        m, c = self.stored.shape[-2:]
        return m, c

    @property
    def ndim(self) -> int:
        """Number of dimensions, of all heads."""
        return int(self.stored.ndim)

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return native_dtype(self.stored)

    def rows(self, start: int, stop: int) -> Array:
        """Map consecutive rows."""
        return native(self._mapped()[start:stop])

    def checked(self, start: int, stop: int) -> Array:
        """Map consecutive rows; raise ``ValueError`` unless they are finite."""
        rows = self.rows(start, stop)
        if not_finite(rows)[0]:
            self._refuse()
        return rows

    def take(self, numbers: Array) -> Array:
        """Copy the rows with the given sorted indices."""
        c = self.shape[1]
        taken = np.empty((len(numbers), c), self.dtype)
        # a row in Fortran order touches as many pages as it has columns
        step = _TAKEN if self.stored.flags.c_contiguous else max(1, _TAKEN // c)
        for start in range(0, len(numbers), step):
            some = slice(start, start + step)
            taken[some] = native(self._mapped(mmap.MADV_RANDOM)[numbers[some]])
        if not_finite(taken)[0]:
            self._refuse()
        return taken

    def _mapped(self, advice: int = mmap.MADV_SEQUENTIAL) -> Array:
        """Map the whole head, which takes address space but no memory."""
        x = mapped_anew(self.stored, advice)
        return x[own_place(x, self.place)]

    def _refuse(self) -> None:
        """Raise the error of a check of the whole array."""
        count, first = 0, None
        for start in range(0, self.shape[0], _FEWEST):
            bad, where = not_finite(self.rows(start, start + _FEWEST))
            if bad and first is None:
                first = (start + where[0], where[1])
            count += bad
        raise_not_finite(self.name, count, first)


@dataclass(frozen=True, slots=True, eq=False)
class FileHead:
    """Queries, keys and values of one head in a file.

    Parameters
    ----------
    query, key, value : FileRows
        Of shapes (n, d), (m, d) and (m, p), and of one dtype.
    scale : float
        The factor of the logits.
    memory : int
        Bytes that may be used.
    """

    query: FileRows
    key: FileRows
    value: FileRows
    scale: float
    memory: int

    @staticmethod
    def of(
        arrays: tuple[Array, Array, Array],
        place: tuple[int, ...],
        scale: float | None,
        memory: int,
    ) -> "FileHead":
        """Take one head of the arrays of a file; raise where they do not fit."""
        names = ("query", "key", "value")
        query, key, value = (
            FileRows(name, x, place) for name, x in zip(names, arrays, strict=True)
        )
        for rows in (query, key, value):
            check_float_shape(rows.name, rows, least_ndim=2)
        check_shapes(query, key, value)
        d = query.shape[1]
        factor = d**-0.5 if scale is None else check_number("scale", scale)
        return FileHead(query, key, value, factor, memory)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """n, m, d and p."""
        (n, d), (m, p) = self.query.shape, self.value.shape
        return n, m, d, p

    @property
    def key_block(self) -> int:
        """Number of rows of a block of keys and values."""
        _, _, d, p = self.sizes
        return self._rows(8 * (d + p))

    @property
    def block(self) -> int:
        """Number of queries of a block, with their outputs in float64."""
        _, _, d, p = self.sizes
        return self._rows(8 * (d + 3 * p))

    def _rows(self, width: int) -> int:
        return min(_MOST, max(_FEWEST, self.memory // _SHARE // width))

    @property
    def n_key_blocks(self) -> int:
        """Number of blocks of keys."""
        return -(-self.key.shape[0] // self.key_block)

    def each_key_block(self) -> Iterator[tuple[Array, Array]]:
        """Yield blocks of keys and values; raise ``ValueError`` unless finite."""
        m, size = self.key.shape[0], self.key_block
        for start in range(0, m, size):
            stop = min(start + size, m)
            yield self.key.checked(start, stop), self.value.checked(start, stop)

    def each_block(self) -> Iterator[tuple[int, Array]]:
        """Yield the first row and the queries of each block."""
        n, size = self.query.shape[0], self.block
        for start in range(0, n, size):
            yield start, self.query.checked(start, min(start + size, n))
