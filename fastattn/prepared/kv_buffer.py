"""The KV buffer: keys and values in arrays that grow."""

import math
from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array, array_namespace, place_of

# rows of the first buffer, and the growth factor of later ones
_LEAST = 16
_GROWTH = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class KVBuffer:
    """Keys and values, in the first rows of buffers with room for more.

    Results of ``append`` share the buffers with their origin: append to one KVBuffer
    only once.

    Parameters
    ----------
    keys, values : array, shapes (c, d), (c, p)
        The buffers.
    count : int
        Number of rows in use.
    """

    keys: Array
    values: Array
    count: int

    @staticmethod
    def none(key: Array, value: Array) -> "KVBuffer":
        """Start without rows, with the widths, library and dtype of the arrays."""
        return KVBuffer(key[:0, :], value[:0, :], 0)

    @property
    def key(self) -> Array:
        """The keys, ``(m, d)``."""
        return self.keys[: self.count, :]

    @property
    def value(self) -> Array:
        """The values, ``(m, p)``."""
        return self.values[: self.count, :]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return bytes_of(self.keys) + bytes_of(self.values)

    def empty(self) -> "KVBuffer":
        """Return a buffer without rows."""
        return KVBuffer.none(self.keys, self.values)

    def append(self, key: Array, value: Array) -> "KVBuffer":
        """Copy rows to the end; returns the longer buffer."""
        count = self.count + key.shape[0]
        if place_of(self.keys) != "cpu":
            # the array API has concat, but no writing in place
            xp = array_namespace(self.keys)
            key = xp.concat([self.key, key], axis=0)
            return KVBuffer(key, xp.concat([self.value, value], axis=0), count)
        keys, values = self.keys, self.values
        if count > len(keys):
            # a large first insertion gets no spare room: few rows follow, as a rule
            size = max(count, int(self.count * _GROWTH), _LEAST)
            keys, values = (_moved(x, self.count, size) for x in (keys, values))
        keys[self.count : count] = key
        values[self.count : count] = value
        return KVBuffer(keys, values, count)


def bytes_of(x: Array) -> int:
    """Bytes of an array of any library."""
    size = int(math.prod(x.shape))
    return size * int(array_namespace(x).finfo(x.dtype).bits) // 8


def _moved(x: Array, count: int, size: int) -> Array:
    """Copy the first rows to a buffer of another size."""
    buffer = np.empty((size, x.shape[1]), x.dtype)
    buffer[:count] = x[:count]
    return buffer
