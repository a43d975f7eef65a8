"""Values that are replaced as a whole: readers need no lock, writers take turns."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def under(lock: Any, work: Callable[[], _R]) -> _R:
    """Call ``work`` while a lock is held.

    Entering, the call and leaving share a line: an interrupt has no place between the
    end of the call and the release of the lock.
    """
    # fmt: off
    with lock: return work()  # noqa: E701
    # fmt: on


class Cell(Generic[_T]):
    """A value that is never changed in place, but replaced by a new one at once.

    A reader takes ``value`` once, and has a consistent one. An exception inside a
    change, an interrupt too, leaves either the old or the new value.
    """

    __slots__ = ("_lock", "value")

    def __init__(self, value: _T) -> None:
        self.value = value
        # reentrant: a signal handler may change the value while its thread holds the
        # lock
        self._lock = threading.RLock()

    def change(self, work: Callable[[_T], tuple[_T, _R]]) -> _R:
        """Set the value to the first result of ``work``, return the second."""

        def replace() -> _R:
            after, found = work(self.value)
            self.value = after
            return found

        return under(self._lock, replace)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell, (self.value,)
