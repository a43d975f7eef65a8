"""Ops: one reference in the array API, with faster kernels registered for some places.

An op lives in ``<package>/_ops/<module>.py``. Its reference is specification,
fallback and oracle at once. The kernel for a place is the function of the same
name in ``<package>/_ops/<place>/<module>.py``; it is imported when first called, so
that importing the package loads neither numba nor cupy.
"""

import functools
import importlib
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sketching._lib.arrays import Array, place_of

# held while a kernel is imported, so that no fork copies a half-imported module: the
# child would block on the import lock of a thread that it does not have
_importing = threading.RLock()
os.register_at_fork(
    before=_importing.acquire,
    after_in_parent=_importing.release,
    after_in_child=_importing.release,
)


class Op:
    """A function of arrays with a reference, and kernels for some places."""

    def __init__(self, reference: Callable[..., Any], places: tuple[str, ...]) -> None:
        self.reference = reference
        self.places = places
        self._modules: dict[str, ModuleType] = {}
        functools.update_wrapper(self, reference)

    def __call__(self, *arrays: Array, **options: Any) -> Any:
        """Run the kernel for the place where the arrays are."""
        return self.kernel(place_of(*arrays))(*arrays, **options)

    def kernel(self, place: str | None) -> Callable[..., Any]:
        """Return the kernel for ``place``, the reference where there is none."""
        if place is None or place not in self.places:
            return self.reference
        if place not in self._modules:
            package, _, module = self.reference.__module__.rpartition(".")
            with _importing:
                found = importlib.import_module(f"{package}.{place}.{module}")
            self._modules[place] = found
        kernel: Callable[..., Any] = getattr(
            self._modules[place], self.reference.__name__
        )
        return kernel


def op(*places: str) -> Callable[[Callable[..., Any]], Op]:
    """Declare a reference and the places that have a kernel."""
    return lambda reference: Op(reference, places)
