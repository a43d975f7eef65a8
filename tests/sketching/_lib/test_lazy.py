"""Attributes that are computed once, by whatever thread."""

import threading
from dataclasses import dataclass

from sketching._lib.lazy import lazy


@dataclass(frozen=True)
class Counted:
    calls: list

    @lazy
    def value(self):
        """What is computed."""
        self.calls.append(1)
        return len(self.calls)


def test_value_is_computed_once_for_each_instance():
    one, other = Counted([]), Counted([1])
    assert (one.value, one.value, other.value) == (1, 1, 2)
    assert one.calls == [1]
    assert Counted.value.__doc__ == "What is computed."


def test_one_instance_does_not_wait_for_another():
    # nor does the child of a fork for a thread that it does not have
    begun, done = threading.Event(), threading.Event()

    class Waiting:
        def __init__(self, first):
            self.first = first

        @lazy
        def value(self):
            if self.first:
                begun.set()
                return done.wait(60)
            return "at once"

    first, second = Waiting(True), Waiting(False)
    thread = threading.Thread(target=lambda: first.value)
    thread.start()
    assert begun.wait(60)
    other = threading.Thread(target=lambda: (second.value, done.set()))
    other.start()
    other.join(30)
    assert done.is_set()
    thread.join()
    assert (first.value, second.value) == (True, "at once")
