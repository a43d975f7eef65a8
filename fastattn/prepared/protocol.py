"""What a prepared structure of one head is asked."""

from typing import Protocol, Self

import numpy as np

from fastattn.prepared.states import Packed
from fastattn.problem.plan import HeadAnswer, Plan
from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate


class PreparedHead(Protocol):
    """A structure over the keys and values of one head; changes give new ones."""

    @property
    def plan(self) -> Plan:
        """What was chosen."""
        ...

    @property
    def count(self) -> int:
        """Number of keys."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        ...

    def empty(self) -> Self:
        """Forget the keys."""
        ...

    def insert(self, key: Array, value: Array, *, fold: bool = False) -> Self:
        """Add keys; ``fold`` asks for a structure without a tail."""
        ...

    def merge(self, other: Self) -> Self:
        """Add the keys of another structure of the same plan."""
        ...

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries within ``tol``; raise ``RefusalError`` if that cannot be."""
        ...

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """What would be promised now."""
        ...

    def pack(self) -> Packed:
        """Arrays and plain values."""
        ...
