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
    """A value that nobody changes in place; a new one takes its place at once.

    Who reads takes ``value`` once, and has a consistent one. An exception inside a
    change, an interrupt too, leaves the value before it or the one after it.
    """

    __slots__ = ("_lock", "value")

    def __init__(self, value: _T) -> None:
        self.value = value
        # the thread that holds it may come again: out of a handler of signals
        self._lock = threading.RLock()

    def change(self, work: Callable[[_T], tuple[_T, _R]]) -> _R:
        """Put the first that ``work`` has of the value in place, return the second."""

        def replace() -> _R:
            after, found = work(self.value)
            self.value = after
            return found

        return under(self._lock, replace)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell, (self.value,)
