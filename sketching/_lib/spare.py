"""Memory of replaced values, for the next one, unless somebody still reads it."""

import sys

from sketching._lib.arrays import Array


class Spare:
    """The memory of an array that another one has replaced.

    Fresh memory costs as much as a pass over it. A reader who still has the array, or a
    view of it, is counted by its references.
    """

    __slots__ = ("_array",)

    def __init__(self) -> None:
        self._array: Array | None = None

    def keep(self, array: Array) -> None:
        """Keep an array whose owner has let it go."""
        self._array = array

    def take(self) -> Array | None:
        """Return the array, or None if there is none, or if somebody has it."""
        array, self._array = self._array, None
        # known by this name only, as the array has to be
        alone = object()
        if array is None or sys.getrefcount(array) > sys.getrefcount(alone):
            return None
        return array

    def __reduce__(self) -> tuple[type["Spare"], tuple[()]]:
        return Spare, ()
