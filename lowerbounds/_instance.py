"""Instances of vector problems, and their answers by enumeration of all tuples."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowerbounds._ops.inner_products import extremes
from sketching._lib.arrays import Array

# intersections that exist at once
_BLOCK = 1 << 15


class _Answer:
    """Whether there is a solution, computed at first access."""

    def __get__(self, instance: Any, owner: Any) -> bool:
        if instance is None:
            raise AttributeError("has_solution is known of an instance")
        if instance.__dict__["_answer"] is None:
            self.__set__(instance, least_product(instance.vectors) == 0)
        found: bool = instance.__dict__["_answer"]
        return found

    def __set__(self, instance: Any, answer: bool | None) -> None:
        instance.__dict__["_answer"] = answer


@dataclass(frozen=True, repr=False, eq=False)
class VectorInstance:
    r"""Sets of 0/1 vectors, one vector of each to be chosen, with the known answer.

    The generalised inner product of a tuple :math:`(x^{(1)}, \dots, x^{(k)})` is
    :math:`\sum_l x^{(1)}_l \cdots x^{(k)}_l`, the number of coordinates where all are
    1. For orthogonal vectors, ``yes = 0`` and ``no = 1``, a solution has a product of
    at most ``yes``, and without one all are at least ``no``; for a gap problem, ``yes >
    no``, a solution has at least ``yes``, and without one all are at most ``no``.

    Parameters
    ----------
    vectors : tuple of uint8 array, shape (n, d)
        The sets; their sizes may differ.
    planted : tuple of int or None
        The rows of the planted solution.
    has_solution : bool
        The answer. Unless given, it is computed at first access, in time proportional
        to the product of the sizes of the sets.
    yes, no : int
        Bounds on the product of a solution, and on those of all other tuples.

    Examples
    --------
    >>> import numpy as np
    >>> from lowerbounds import VectorInstance
    >>> sets = np.array([[1, 1, 0]]), np.array([[0, 1, 0], [0, 0, 1]])
    >>> instance = VectorInstance.from_vectors(*sets)
    >>> instance.has_solution, instance.parts, instance.d
    (True, 2, 3)
    """

    vectors: tuple[Array, ...]
    planted: tuple[int, ...] | None
    has_solution: _Answer = _Answer()
    yes: int = 0
    no: int = 1

    @classmethod
    def from_vectors(
        cls, *vectors: Array, planted: tuple[int, ...] | None = None
    ) -> "VectorInstance":
        """Make the orthogonal vectors problem of given sets.

        The answer is computed at first access, unless ``planted`` names a solution.
        """
        sets = tuple(
            as_bits(f"vectors[{s}]", x, vectors[0]) for s, x in enumerate(vectors)
        )
        if len(sets) < 2:
            raise ValueError(f"vectors: expected at least 2 sets, got {len(sets)}")
        if planted is None:
            return cls(sets, None, None)
        if product_of(sets, planted) != 0:
            raise ValueError(f"planted: the vectors {planted} are not orthogonal")
        return cls(sets, planted, True)

    def __repr__(self) -> str:
        # without the answer, which may take hours
        sizes = " x ".join(str(len(x)) for x in self.vectors)
        return (
            f"VectorInstance({sizes} vectors, d={self.d}, yes={self.yes}, no={self.no})"
        )

    @property
    def parts(self) -> int:
        """The number of sets, k."""
        return len(self.vectors)

    @property
    def d(self) -> int:
        """The number of coordinates."""
        return int(self.vectors[0].shape[1])

    @property
    def seeks_orthogonal(self) -> bool:
        """Whether a solution has a small inner product, not a large one."""
        return self.yes < self.no


def as_bits(name: str, given: Any, like: Any = None) -> Array:
    """Return ``given`` as a non-empty uint8 matrix of 0 and 1, as wide as ``like``."""
    x = np.asarray(given)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: expected a non-empty matrix, got shape {x.shape}")
    good = x.max() <= 1 if x.dtype == np.uint8 else np.isin(x, (0, 1)).all()
    if not good:
        raise ValueError(f"{name}: expected entries 0 and 1 only")
    if like is not None and x.shape[1] != np.shape(like)[-1]:
        raise ValueError(
            f"{name}: expected {np.shape(like)[-1]} columns, as in vectors[0], got "
            f"{x.shape[1]}"
        )
    return x.astype(np.uint8)


def product_of(vectors: tuple[Array, ...], rows: tuple[int, ...]) -> int:
    """Compute the generalised inner product of one tuple."""
    chosen = [x[i] for x, i in zip(vectors, rows, strict=True)]
    return int(np.bitwise_and.reduce(chosen).sum())


def least_product(vectors: tuple[Array, ...]) -> int:
    """Find the least inner product over all tuples."""
    return _range_of(vectors)[0]


def largest_product(vectors: tuple[Array, ...]) -> int:
    """Find the largest inner product over all tuples."""
    return _range_of(vectors)[1]


def _range_of(vectors: tuple[Array, ...]) -> tuple[int, int]:
    packed = [_pack(x) for x in vectors]
    return _fold(packed[0], packed[1:])


def _fold(left: Array, rest: list[Array]) -> tuple[int, int]:
    """Least and largest product of intersections ``left`` with tuples of ``rest``."""
    if len(rest) == 1:
        found = extremes(left, rest[0])
        return int(found[0, 0]), int(found[1, 0])
    least, largest = math.inf, -1
    step = max(1, _BLOCK // len(rest[0]))
    for start in range(0, len(left), step):
        met = left[start : start + step, None, :] & rest[0]
        low, high = _fold(met.reshape(-1, left.shape[1]), rest[1:])
        least, largest = min(least, low), max(largest, high)
    return int(least), largest


def _pack(bits: Array) -> Array:
    """Pack entries to bits, and bits to whole words of 64."""
    packed = np.packbits(bits, axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
