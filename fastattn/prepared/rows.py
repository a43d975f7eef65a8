"""The keys and values of one head, inserted into a structure in blocks."""

from dataclasses import dataclass

import numpy as np

from fastattn.prepared.protocol import PreparedHead
from fastattn.problem.batch import pick
from fastattn.problem.head import Head, gather_rows
from sketching._lib.arrays import Array, to_host

# rows that are inserted at once; copies of them are freed before the next block
_ROWS = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Keys, values and the mask of one head, without copies.

    Parameters
    ----------
    key, value : array, shapes (m, d), (m, p)
        Rows of one library.
    mask : boolean array, shape (m,), or None
        True for rows that take part.
    """

    key: Array
    value: Array
    mask: Array | None

    @staticmethod
    def of(
        key: Array, value: Array, mask: Array | None, place: tuple[int, ...]
    ) -> "Rows":
        """Take the head at ``place`` of a batch."""
        own = None if mask is None else pick(mask, place, 1)
        return Rows(pick(key, place), pick(value, place), own)

    def insert_into(self, head: PreparedHead, *, fold: bool) -> PreparedHead:
        """Insert all rows that take part."""
        for start in range(0, self.key.shape[0], _ROWS):
            stop = min(start + _ROWS, self.key.shape[0])
            key, value = self.key[start:stop, :], self.value[start:stop, :]
            if self.mask is not None:
                rows = np.flatnonzero(self._host(start, stop))
                key, value = gather_rows(key, rows), gather_rows(value, rows)
            head = head.insert(key, value, fold=fold)
        return head

    def head(
        self, query: Array, scale: float, guarantee: str, rng: np.random.Generator
    ) -> tuple[Head, int]:
        """The head to plan with, and the number of keys that take part.

        With a mask keys are copied, and only a sample of them, except for a proven
        bound, which needs them all.
        """
        if self.mask is None:
            return Head(query, self.key, self.value, scale), self.key.shape[0]
        rows = np.flatnonzero(self._host(0, self.key.shape[0]))
        count = len(rows)
        if guarantee == "sampled" and count > _ROWS:
            rows = np.sort(rng.choice(rows, _ROWS, replace=False))
        key, value = gather_rows(self.key, rows), gather_rows(self.value, rows)
        return Head(query, key, value, scale), count

    def _host(self, start: int, stop: int) -> Array:
        assert self.mask is not None
        return to_host(self.mask[start:stop])
