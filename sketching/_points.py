"""The points of an index: centred rows, their norms in the metric, their numbers.

Squared norms :math:`h_i = |U x_i|^2` are all that the exact distances need beside the
points. Updates of the metric change them by two products with every point, those that
learners emit by one; how far rounding may have moved them is kept beside them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sketching._half_width import halved, widened
from sketching._lib.arrays import Array
from sketching._ops.updates import changed_norms

# rows that are mapped by the factor at a time
_BLOCK = 1024
# drift of a squared norm, in roundings of a fresh one, at which it is computed anew
_STALE = 64


# rounding errors are modelled as independent with mean zero: a sum of products is then
# off by more than so many deviations with at most this probability (Higham and Mary,
# A new approach to probabilistic rounding error analysis, 2019, theorem 3.1)
_DEVIATIONS = 8.0
UNLIKELY = 2 * math.exp(-(_DEVIATIONS**2) / 2)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far sums of products are off, and which distances that leaves right."""

    unit: float
    tolerance: float

    @staticmethod
    def of(dtype: Any, d: int) -> "Rounding":
        """For products of ``d`` terms."""
        eps = float(np.finfo(dtype).eps)
        unit = eps / 2 * _DEVIATIONS * (1 + math.sqrt(d))
        return Rounding(unit, 4 * math.sqrt(eps / 2))


class Points:
    """Rows that are numbered, changed and removed; the live ones are the first."""

    def __init__(self, center: Array, dtype: Any, *, half_width: bool = False) -> None:
        self.size = 0
        self.dtype = np.dtype(np.float32 if half_width else dtype)
        self.center = center.astype(self.dtype)
        self.rounding = Rounding.of(self.dtype, len(center))
        self._rows = np.empty((0, len(center)), np.int16 if half_width else self.dtype)
        # what rows of integers are multiplied by
        self._steps = np.empty(0, np.float32) if half_width else None
        # squared norm in the metric, how far it may be off, Euclidean length
        self._stats = np.empty((3, 0))
        self._numbers = np.empty(0, np.int64)
        # how many of the updates that wait a row has already seen
        self._since = np.empty(0, np.int64)
        self._slot_of = np.empty(0, np.int64)
        self._given = 0

    @property
    def rows(self) -> Array:
        """The centred points, ``(n, d)``, to be multiplied by steps if there are."""
        return self._rows[: self.size]

    @property
    def steps(self) -> Array | None:
        """What each row is to be multiplied by, where points are in half the width."""
        return None if self._steps is None else self._steps[: self.size]

    def some(self, slots: Array | slice) -> Array:
        """Centred points, in the precision of answers."""
        if self._steps is None:
            return self._rows[slots]
        return widened(self._rows[slots], self._steps[slots])

    @property
    def stats(self) -> Array:
        """Squared norms, how far they may be off, and Euclidean lengths, ``(3, n)``."""
        return self._stats[:, : self.size]

    @property
    def numbers(self) -> Array:
        """The number of each point, ``(n,)``."""
        return self._numbers[: self.size]

    @property
    def given(self) -> int:
        """How many numbers were given so far."""
        return self._given

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self._rows, self._stats, self._numbers, self._since, self._slot_of)
        return sum(x.nbytes for x in arrays) + (
            0 if self._steps is None else self._steps.nbytes
        )

    def centred(self, x: Array) -> Array:
        """Bring points to the centre, rounded as the rows are."""
        # in float64 the difference of two float32 numbers is exact, or nearly
        moved = x.astype(np.float64) - self.center
        with np.errstate(over="ignore"):
            return moved.astype(self.dtype)

    def refuse_overflow(self, name: str, scale: float, longest: float) -> None:
        """Raise unless squares of such rows are finite under a factor of that norm."""
        dtype = self.dtype
        if (
            not max(longest, 1) * max(scale, 1)
            <= float(np.finfo(dtype).max) ** 0.5 / 16
        ):
            raise ValueError(
                f"{name}: squared distances may overflow {dtype}: the longest row is "
                f"{longest:.3g} from the centre, the norm of the factor {scale:.3g}"
            )

    def restored(self, slots: Array | None = None) -> Array:
        """Points as they were given, up to rounding."""
        slots = np.arange(self.size) if slots is None else slots
        moved = self.some(slots).astype(np.float64) + self.center
        return moved.astype(self.dtype)

    def recentre(self) -> None:
        """Move the centre to the mean; norms follow by :meth:`mapped`."""
        parts = blocks(np.arange(self.size))
        total = sum(self.some(part).sum(axis=0, dtype=np.float64) for part in parts)
        center = (self.center + total / self.size).astype(self.dtype)
        shift = self.center.astype(np.float64) - center
        for part in parts:
            self._put(part, self.some(part) + shift)
        self.center = center

    def _put(self, slots: Array, x: Array) -> None:
        """Put centred rows in place, rounded as they are kept."""
        if self._steps is None:
            self._rows[slots] = x
        else:
            self._rows[slots], self._steps[slots] = halved(x)

    def append(self, x: Array, pending: int) -> Array:
        """Add centred rows; return their numbers."""
        start, end = self.size, self.size + len(x)
        for name, axis in (("_rows", 0), ("_stats", 1), ("_numbers", 0), ("_since", 0)):
            setattr(self, name, grown(getattr(self, name), end, axis))
        if self._steps is not None:
            self._steps = grown(self._steps, end, 0)
        self.size = end
        numbers = np.arange(self._given, self._given + len(x))
        self._given += len(x)
        self._slot_of = grown(self._slot_of, self._given, 0)
        self._slot_of[numbers] = np.arange(start, end)
        self._numbers[start:end] = numbers
        self.write(np.arange(start, end), x, pending)
        return numbers

    def write(self, slots: Array, x: Array, pending: int) -> None:
        """Put centred rows in place; their norms follow by :meth:`mapped`."""
        self._put(slots, x)
        self._since[slots] = pending

    def remove(self, slots: Array) -> tuple[Array, Array]:
        """Remove rows; return from where to where the last ones moved."""
        end = self.size - len(slots)
        self._slot_of[self._numbers[slots]] = -1
        is_gone = np.zeros(self.size, bool)
        is_gone[slots] = True
        holes = np.flatnonzero(is_gone[:end])
        movers = end + np.flatnonzero(~is_gone[end:])
        for x in (self._rows, self._numbers, self._since):
            x[holes] = x[movers]
        if self._steps is not None:
            self._steps[holes] = self._steps[movers]
        self._stats[:, holes] = self._stats[:, movers]
        self._slot_of[self._numbers[holes]] = holes
        self.size = end
        return movers, holes

    def slots(self, name: str, numbers: Any, *, distinct: bool = False) -> Array:
        """Find where points are; raise unless they are there, distinct ones once."""
        found = np.atleast_1d(np.asarray(numbers))
        if found.dtype.kind not in "iu" and found.size:
            raise TypeError(f"{name}: expected integers, got dtype {found.dtype}")
        if found.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got {found.shape}")
        found = found.astype(np.int64)
        is_known = (found >= 0) & (found < self.given)
        slots = np.full(found.shape, -1)
        slots[is_known] = self._slot_of[found[is_known]]
        if (slots < 0).any():
            raise ValueError(f"{name}: there is no point {int(found[slots < 0][0])}")
        if distinct and len(np.unique(slots)) < len(slots):
            raise ValueError(f"{name}: expected each point once")
        return slots

    def mapped(self, slots: Array, factor: Array) -> Array:
        """Map rows by the factor, in float64."""
        rows = self.some(slots).astype(np.float64)
        image: Array = rows @ factor.T
        self._stats[2, slots] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        self._stats[0, slots] = np.einsum("nk,nk->n", image, image)
        self._stats[1, slots] = 0
        return image

    def absorb(
        self, left: Array, right: Array, images: Array, *, keep: bool
    ) -> Array | None:
        r"""Update the norms for ``U += sum a_t b_t^T``.

        ``images`` are :math:`U_t^\top a_t` of the factor before each update. The answer
        are the products with ``b_t``, ``(n, r)``, if they are to be kept.
        """
        known, m = self._described(left, right, images)
        order = known[4].astype(np.int64)
        vectors = np.concatenate([right[order], images[order[:m]]])
        stats = self.stats
        after, kept = changed_norms(
            self.rows,
            vectors.astype(self.dtype),
            stats,
            self._since[: self.size],
            known,
            rounding=self.rounding.unit,
            steps=self.steps,
            keep=keep,
        )
        # a body that wrote in place is spared a copy of every number onto itself
        if after is not stats:
            stats[:] = after
        self.forget_updates()
        return kept[:, np.argsort(order)] if keep else None

    def _described(self, left: Array, right: Array, images: Array) -> tuple[Array, int]:
        """What an op wants to know of updates, and how many are the first of them.

        The others are those whose image is a multiple of ``b_t``, as of updates that
        learners emit: one product serves for both.
        """
        of_left, of_right, of_images = (
            np.einsum("rd,rd->r", x, x) for x in (left, right, images)
        )
        ratios = np.einsum("rd,rd->r", images, right)
        ratios /= np.maximum(of_right, np.finfo(np.float64).tiny)
        apart = images - ratios[:, None] * right
        # vectors are rounded to the dtype of the points anyway
        off = np.finfo(self.dtype).eps / 2
        is_multiple = np.einsum("rd,rd->r", apart, apart) <= off**2 * of_images
        order = np.argsort(is_multiple, kind="stable")
        lengths = np.sqrt(of_right), np.sqrt(of_images)
        known = np.stack([of_left, ratios, *lengths, np.arange(len(left))])
        return known[:, order], len(left) - int(is_multiple.sum())

    def stale(self) -> Array:
        """Where rounding of updates may have added up."""
        h, off, _ = self.stats
        share = _STALE * self.rounding.unit
        # as a rule there is nothing to look for
        if np.max(off, initial=0) <= share * np.min(h, initial=np.inf):
            return np.arange(0)
        return np.flatnonzero(off > share * h)

    def forget_updates(self) -> None:
        """No row waits for an update."""
        self._since[: self.size] = 0

    def arrays(self) -> dict[str, Array]:
        """What a file keeps; an update must not be waiting."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {
            **steps,
            "rows": self.rows,
            "stats": self.stats,
            "numbers": self.numbers,
            "center": self.center,
            "slot_of": self._slot_of[: self._given],
        }

    @staticmethod
    def of_arrays(arrays: dict[str, Array]) -> "Points":
        """Build the points from what a file kept."""
        rows = arrays["rows"]
        is_half = "steps" in arrays
        points = Points(arrays["center"], rows.dtype, half_width=is_half)
        points.size, points._steps = len(rows), arrays.get("steps")
        points._rows, points._stats = rows, arrays["stats"]
        points._numbers, points._slot_of = arrays["numbers"], arrays["slot_of"]
        points._given = len(points._slot_of)
        points._since = np.zeros(len(rows), np.int64)
        return points


def blocks(slots: Array) -> list[Array]:
    """Cut slots into pieces that are worked on at a time."""
    return [slots[i : i + _BLOCK] for i in range(0, len(slots), _BLOCK)]


def grown(x: Array, size: int, axis: int) -> Array:
    """Return the array with room for ``size`` along an axis, at least doubled."""
    if x.shape[axis] >= size:
        return x
    shape = list(x.shape)
    shape[axis] = max(size, 2 * x.shape[axis])
    larger = np.zeros(shape, x.dtype)
    larger[tuple(slice(n) for n in x.shape)] = x
    return larger
