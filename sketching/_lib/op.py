"""Ops: one reference body in the array API, faster bodies registered beside it.

An op lives in ``<package>/_ops/<module>.py``. Its reference is specification,
fallback and oracle at once. A faster body for a place is the function of the same
name in ``<package>/_ops/<place>/<module>.py``; it is imported when first called, so
that importing the package loads neither numba nor cupy.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from sketching._lib.arrays import Array, place_of


class Op:
    """A function of arrays with a reference body and bodies for some places."""

    def __init__(self, reference: Callable[..., Any], places: tuple[str, ...]) -> None:
        self.reference = reference
        self.places = places
        functools.update_wrapper(self, reference)

    def __call__(self, *arrays: Array, **options: Any) -> Any:
        """Run the body for the place where the arrays are."""
        return self.body(place_of(*arrays))(*arrays, **options)

    def body(self, place: str | None) -> Callable[..., Any]:
        """Return the body for ``place``, the reference where there is none."""
        if place is None or place not in self.places:
            return self.reference
        package, _, module = self.reference.__module__.rpartition(".")
        found = importlib.import_module(f"{package}.{place}.{module}")
        body: Callable[..., Any] = getattr(found, self.reference.__name__)
        return body


def op(*places: str) -> Callable[[Callable[..., Any]], Op]:
    """Declare a reference body and the places that have a faster one."""
    return lambda reference: Op(reference, places)
