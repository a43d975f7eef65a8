"""Growing arrays that share memory with earlier states.

Entries of a published state are never changed in place. New rows are appended behind
those of all states, in shared memory. Rows that are replaced or removed are returned as
*writes*, values that were computed beforehand: writes are idempotent, so that they can
be repeated after an interrupt.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from sketching._lib.arrays import Array

# position, component, and new value
Write = tuple[Any, Any, Any]


def make(writes: Iterable[Write]) -> None:
    """Make writes, in order."""
    for target, part, value in writes:
        target[part] = value


class Column:
    """An array with an entry for each row along one axis; the first ``size`` count."""

    __slots__ = ("_buffer", "_used", "_view", "axis", "size")

    def __init__(self, array: Array, axis: int = 0) -> None:
        self._buffer, self.axis, self.size = array, axis, int(array.shape[axis])
        # made at first access: every query needs several
        self._view: Array | None = None
        # how many rows any state has published: a list, which states share
        self._used = [self.size]

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self.array.copy(), self.axis)

    @property
    def array(self) -> Array:
        """The rows that count, as a view."""
        view = self._view
        if view is None:
            view = self._view = self._buffer[self._key(slice(self.size))]
        return view

    @property
    def nbytes(self) -> int:
        """Bytes with the room to grow."""
        return int(self._buffer.nbytes)

    def extended(self, values: Array) -> "Column":
        """With more rows; ``values`` may be stored without a copy."""
        count = values.shape[self.axis]
        if not self.size:
            return Column(values, self.axis)
        end = self.size + count
        buffer, used = self._buffer, self._used
        if buffer.shape[self.axis] < end or used[0] != self.size:
            shape = list(buffer.shape)
            shape[self.axis] = max(end, 2 * self.size)
            buffer, used = np.empty(shape, buffer.dtype), [end]
            buffer[self._key(slice(self.size))] = self.array
        # from here on nobody else may write there
        used[0] = end
        buffer[self._key(slice(self.size, end))] = values
        return self._of(buffer, end, used)

    def written(self, rows: Array, values: Array) -> Write:
        """Return the write that replaces some rows."""
        return self._buffer, self._key(rows), values

    def take(self, rows: Array) -> Array:
        """Return a copy of some rows."""
        return self._buffer.take(rows, axis=self.axis)

    def shortened(self, size: int) -> tuple["Column", Write]:
        """Without the last rows; the write makes their memory available."""
        return self._of(self._buffer, size, self._used), (self._used, 0, size)

    def private(self) -> "Column":
        """In memory of its own."""
        buffer = self._buffer.copy()
        return self._of(buffer, self.size, [self.size])

    def _of(self, buffer: Array, size: int, used: list[int]) -> "Column":
        column = object.__new__(Column)
        column._buffer, column.axis, column.size = buffer, self.axis, size
        column._used, column._view = used, None
        return column

    def _key(self, rows: Any) -> Any:
        return rows if not self.axis else (*[slice(None)] * self.axis, rows)


class Columns:
    """Columns by name, with the same number of rows."""

    __slots__ = ("_columns", "size")

    def __init__(self, columns: dict[str, Column]) -> None:
        self._columns = columns
        # the number of rows
        self.size = next((x.size for x in columns.values()), 0)

    def __getitem__(self, name: str) -> Array:
        return self._columns[name].array

    def get(self, name: str) -> Array | None:
        """Return a column, or None if there is no such."""
        return self[name] if name in self._columns else None

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(x.nbytes for x in self._columns.values())

    def arrays(self) -> dict[str, Array]:
        """All columns, as views."""
        return {name: x.array for name, x in self._columns.items()}

    def replaced(self, **values: Array) -> "Columns":
        """With other arrays in place of some."""
        new = {n: Column(x, self._columns[n].axis) for n, x in values.items()}
        return Columns(self._columns | new)

    def extended(self, **values: Array) -> "Columns":
        """With more rows, of every column."""
        items = self._columns.items()
        return Columns({n: x.extended(values[n]) for n, x in items})

    def written(self, rows: Array, /, **values: Array) -> list[Write]:
        """Return the writes that replace some rows of some columns."""
        return [self._columns[n].written(rows, x) for n, x in values.items()]

    def closed(
        self, movers: Array, holes: Array, size: int
    ) -> tuple["Columns", list[Write]]:
        """With rows moved into holes and the end cut off."""
        new, writes = {}, []
        for name, x in self._columns.items():
            new[name], free = x.shortened(size)
            if len(movers):
                writes.append(x.written(holes, x.take(movers)))
            writes.append(free)
        return Columns(new), writes

    def private(self) -> "Columns":
        """In memory of its own."""
        return Columns({name: x.private() for name, x in self._columns.items()})
