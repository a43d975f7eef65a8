"""The protocol of a prepared structure of one head."""

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
        """Return the structure without keys."""
        ...

    def insert(self, key: Array, value: Array, *, fold: bool = False) -> Self:
        """Add keys; with ``fold`` all keys go into the state, none into the tail."""
        ...

    def merge(self, other: Self) -> Self:
        """Add the keys of another structure of the same plan."""
        ...

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries within ``tol``; raise ``RefusalError`` if that is missed."""
        ...

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """The certificate of an answer over the keys inserted so far."""
        ...

    def pack(self) -> Packed:
        """Arrays and plain values."""
        ...
