"""The points of an index: centred rows, their norms in the metric, their numbers.

Exact distances need the points and their squared norms :math:`h_i = |U x_i|^2`. Updates
of the metric change the norms by two products with every point, those of the learners
by one; a bound on their rounding errors is stored with them.

Points are recovered exactly: those that a centred row does not determine are stored
themselves as well, and distances by difference use the points as they were inserted.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._ops.updates import changed_norms
from sketching.index.centre import centre_of, lossy
from sketching.index.columns import Column, Columns, Write
from sketching.index.int16_rows import int16_steps, widened
from sketching.metric.rounding import Rounding

# rows that are mapped by the factor at a time
_BLOCK = 1024
# rounding error of a squared norm, relative to a fresh one, at which it is recomputed
_STALE = 64
# share of points stored in addition to their rows, beyond which the centre is moved
_BESIDE = 0.125


@dataclass(frozen=True, slots=True)
class Placed:
    """Points to be inserted: rows, steps of integers, and the points themselves."""

    rows: Array
    steps: Array | None
    kept: Array
    # points that their rows do not determine exactly
    odd: Array

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, part: Array | slice) -> Array:
        """Rows in the precision of answers."""
        if self.steps is None:
            return self.rows[part]
        return widened(self.rows[part], self.steps[part])


@dataclass(frozen=True, slots=True)
class Points:
    """Numbered rows in columns of arrays, of which the first ``size`` count.

    A change returns other points, or appends behind these, which do not change.
    """

    center: Array
    dtype: Any
    rounding: Rounding
    # rows, steps of rows of integers, stats (squared norm in the metric, bound on its
    # error, Euclidean length), numbers, how many of the pending updates a row has
    # seen, and the position of its point among those that are stored, or -1
    table: Columns
    slot_of: Column
    beside: Column

    @staticmethod
    def around(x: Array, *, half_width: bool = False) -> "Points":
        """No points yet, of the precision of ``x`` and with its centre."""
        dtype = np.dtype(np.float32 if half_width else x.dtype)
        d = x.shape[1]
        columns = {
            "rows": Column(np.empty((0, d), np.int16 if half_width else dtype)),
            "stats": Column(np.empty((3, 0)), axis=1),
            "numbers": Column(np.empty(0, np.int64)),
            "since": Column(np.empty(0, np.int64)),
            "beside": Column(np.empty(0, np.int64)),
        }
        if half_width:
            columns["steps"] = Column(np.empty(0, np.float32))
        return Points(
            centre_of(x, dtype, always=half_width),
            dtype,
            Rounding.of(dtype, d),
            Columns(columns),
            Column(np.empty(0, np.int64)),
            Column(np.empty((0, d), dtype)),
        )

    @property
    def size(self) -> int:
        """The number of points."""
        return self.table.size

    @property
    def rows(self) -> Array:
        """The centred points, ``(n, d)``, to be multiplied by steps if there are."""
        return self.table["rows"]

    @property
    def steps(self) -> Array | None:
        """Factor of each row, where points are stored as 16-bit integers."""
        return self.table.get("steps")

    @property
    def stats(self) -> Array:
        """Squared norms, bounds on their errors, and Euclidean lengths, ``(3, n)``."""
        return self.table["stats"]

    @property
    def numbers(self) -> Array:
        """The number of each point, ``(n,)``."""
        return self.table["numbers"]

    @property
    def given(self) -> int:
        """How many numbers have been assigned to points."""
        return int(self.slot_of.size)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.table.nbytes + self.slot_of.nbytes + self.beside.nbytes

    def take(self, slots: Array | slice) -> Array:
        """Centred points, in the precision of answers."""
        steps = self.steps
        if steps is None:
            return self.rows[slots]
        return widened(self.rows[slots], steps[slots])

    def kept(self, slots: Array) -> Array:
        """Points as they were inserted, or as rounded to 16-bit integers."""
        if not np.count_nonzero(self.center):
            return self.take(slots)
        moved = self.take(slots).astype(np.float64) + self.center
        points: Array = moved.astype(self.dtype)
        if self.beside.size:
            places = self.table["beside"][slots]
            is_odd = places >= 0
            points[is_odd] = self.beside.array[places[is_odd]]
        return points

    def centred(self, x: Array) -> Array:
        """Bring points to the centre, in float64."""
        return x.astype(np.float64) - self.center

    def refuse_overflow(self, name: str, scale: float, longest: float) -> None:
        """Raise unless squares of such rows are finite under a factor of that norm."""
        dtype = self.dtype
        most = float(np.finfo(dtype).max) ** 0.5 / 16
        if not max(longest, 1) * max(scale, 1) <= most:
            raise ValueError(
                f"{name}: squared distances may overflow {dtype}: the longest row is "
                f"{longest:.3g} from the centre, the norm of the factor {scale:.3g}"
            )

    def placed(self, x: Array) -> Placed:
        """Round points as they are stored; nothing of the caller's memory is shared."""
        if self.steps is None:
            with np.errstate(over="ignore"):
                kept = x.astype(self.dtype)
            if not np.count_nonzero(self.center):
                return Placed(kept, None, kept, np.zeros(len(x), bool))
            # in float64 the difference of two float32 numbers is exact, or nearly
            rows = self.centred(kept).astype(self.dtype)
            odd = lossy(kept, rows, self.center).any(axis=1)
            return Placed(rows, None, kept, odd)
        away = self.centred(x)
        # steps are at least a float32's spacing, so that the points that are returned
        # are those that distances are measured to
        largest = np.abs(x).max(axis=1) + np.abs(self.center).max()
        rows, steps = int16_steps(away, largest)
        back = widened(rows, steps) + self.center.astype(np.float64)
        kept = back.astype(np.float32)
        return Placed(rows, steps, kept, np.zeros(len(x), bool))

    def extended(self, new: Placed, stats: Array, pending: int) -> "Points":
        """Add points, of known stats; their numbers are the next ones."""
        start, n = self.size, len(new)
        beside, places = self._beside(new)
        columns = {
            "rows": new.rows,
            "stats": stats,
            "numbers": np.arange(self.given, self.given + n),
            "since": np.full(n, pending),
            "beside": places,
        }
        if new.steps is not None:
            columns["steps"] = new.steps
        table = self.table.extended(**columns)
        slot_of = self.slot_of.extended(np.arange(start, start + n))
        return self._of(table, slot_of, beside)

    def written(
        self, slots: Array, new: Placed, stats: Array, pending: int
    ) -> tuple["Points", list[Write]]:
        """Put points in place of others."""
        beside, places = self._beside(new)
        columns = {"rows": new.rows, "stats": stats, "beside": places}
        if new.steps is not None:
            columns["steps"] = new.steps
        since = np.full(len(new), pending)
        writes = self.table.written(slots, since=since, **columns)
        return self._of(self.table, self.slot_of, beside), writes

    def _of(self, table: Columns, slot_of: Column, beside: Column) -> "Points":
        # a quarter of the time of `replace`, which shows for single points
        return Points(self.center, self.dtype, self.rounding, table, slot_of, beside)

    def _beside(self, new: Placed) -> tuple[Column, Array]:
        """Store the points that their rows do not determine exactly."""
        places = np.full(len(new), -1)
        count = np.count_nonzero(new.odd)
        if not count:
            return self.beside, places
        places[new.odd] = self.beside.size + np.arange(count)
        return self.beside.extended(new.kept[new.odd]), places

    def removed(
        self, slots: Array
    ) -> tuple["Points", list[Write], tuple[Array, Array, int]]:
        """Remove rows; the last ones move into the gaps; returns the moves as well."""
        end = self.size - len(slots)
        is_gone = np.zeros(self.size, bool)
        is_gone[slots] = True
        holes = np.flatnonzero(is_gone[:end])
        movers = end + np.flatnonzero(~is_gone[end:])
        moves = movers, holes, end
        numbers = self.numbers
        names = [
            self.slot_of.written(numbers[slots], np.full(len(slots), -1)),
            self.slot_of.written(numbers[movers], holes),
        ]
        table, writes = self.table.closed(*moves)
        return self._of(table, self.slot_of, self.beside), names + writes, moves

    def private(self) -> "Points":
        """In memory of their own."""
        return replace(self, table=self.table.private(), slot_of=self.slot_of.private())

    def is_scattered(self) -> bool:
        """Whether so many points are stored in full that another centre is better."""
        return bool(self.beside.size > 8 + _BESIDE * self.size)

    def recentred(self) -> "Points":
        """Move the centre; norms follow by :meth:`measured`."""
        every = np.arange(self.size)
        points = self.kept(every)
        is_half = self.steps is not None
        empty = Points.around(points, half_width=is_half)
        new = empty.placed(points)
        if new.odd.mean() > _BESIDE:
            odd = lossy(points, new.rows, empty.center).any(axis=0)
            center = np.where(odd, 0, empty.center).astype(self.dtype)
            empty = replace(empty, center=center)
            new = empty.placed(points)
        full = empty.extended(new, np.zeros((3, self.size)), 0)
        table = full.table.replaced(numbers=self.numbers)
        return replace(full, table=table, slot_of=self.slot_of)

    def slots(self, name: str, numbers: Any, *, distinct: bool = False) -> Array:
        """Find points by number; raise unless all exist, once each if ``distinct``."""
        found = np.array(numbers, ndmin=1)
        if found.dtype.kind not in "iu" and found.size:
            raise TypeError(f"{name}: expected integers, got dtype {found.dtype}")
        if found.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got {found.shape}")
        found = found.astype(np.int64, copy=False)
        is_known = (found >= 0) & (found < self.given)
        slots = np.full(found.shape, -1)
        slots[is_known] = self.slot_of.array[found[is_known]]
        is_missing = slots < 0
        if is_missing.any():
            raise ValueError(f"{name}: there is no point {int(found[is_missing][0])}")
        if distinct and len(slots) > 1 and len(np.unique(slots)) < len(slots):
            raise ValueError(f"{name}: expected each point once")
        return slots

    def measured(self, kept: Array, rows: Array, factor: Array) -> tuple[Array, Array]:
        """Map points by the factor, in float64; return images and stats, ``(3, n)``."""
        # without a centre rows are the points, to the last bit; integers always are
        is_apart = self.steps is None and np.count_nonzero(self.center)
        exact = self.centred(kept) if is_apart else rows.astype(np.float64)
        image: Array = exact @ factor.T
        stats = np.zeros((3, len(rows)))
        stats[0] = np.einsum("nk,nk->n", image, image)
        stats[2] = np.sqrt(np.einsum("nd,nd->n", exact, exact))
        if is_apart:
            # the error of the row enters products as rounding of their terms does
            off = exact - rows
            stats[2] += np.sqrt(np.einsum("nd,nd->n", off, off)) / self.rounding.unit
        return image, stats

    def absorbed(
        self, left: Array, right: Array, images: Array, *, keep: bool
    ) -> tuple["Points", Array | None]:
        r"""Update the norms for ``U += sum a_t b_t^T``.

        ``images`` are :math:`U_t^\top a_t` of the factor before each update. The answer
        has the products with ``b_t``, ``(n, r)``, if they are needed.
        """
        known, m = self._described(left, right, images)
        order = known[4].astype(np.int64)
        vectors = np.concatenate([right[order], images[order[:m]]])
        after, kept = changed_norms(
            self.rows,
            vectors.astype(self.dtype),
            # a kernel writes in place
            self.stats.copy(),
            self.table["since"],
            known,
            rounding=self.rounding.unit,
            steps=self.steps,
            keep=keep,
        )
        points = self.with_stats(after)
        return points, kept[:, np.argsort(order)] if keep else None

    def with_stats(self, stats: Array) -> "Points":
        """With other stats; no updates are pending."""
        columns = {"stats": stats}
        if self.table["since"].any():
            columns["since"] = np.zeros(self.size, np.int64)
        table = self.table.replaced(**columns)
        return self._of(table, self.slot_of, self.beside)

    def _described(self, left: Array, right: Array, images: Array) -> tuple[Array, int]:
        """The arguments of an op for updates, and how many of them are general.

        The image of the other updates is a multiple of ``b_t``, as for those of the
        learners: one product serves for both.
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
        order = is_multiple.argsort(kind="stable")
        lengths = np.sqrt(of_right), np.sqrt(of_images)
        known = np.array([of_left, ratios, *lengths, np.arange(len(left))])
        return known[:, order], len(left) - int(is_multiple.sum())

    def stale(self) -> Array:
        """Where rounding of updates may have added up."""
        h, off, _ = self.stats
        share = _STALE * self.rounding.unit
        # as a rule there is none
        if off.max(initial=0) <= share * h.min(initial=np.inf):
            return np.arange(0)
        return np.flatnonzero(off > share * h)

    def arrays(self) -> dict[str, Array]:
        """Arrays that are saved to a file; no update may be pending."""
        found = self.table.arrays()
        del found["since"]
        if self.beside.size:
            found["given"] = self.beside.array
        else:
            del found["beside"]
        return {**found, "center": self.center, "slot_of": self.slot_of.array}

    @staticmethod
    def of_arrays(arrays: dict[str, Array]) -> "Points":
        """Build the points from the arrays of a file."""
        center, rows = arrays["center"], arrays["rows"]
        n, d = rows.shape
        names = ("rows", "stats", "numbers", "steps")
        columns = {
            name: Column(arrays[name], axis=int(name == "stats"))
            for name in names
            if name in arrays
        }
        columns["since"] = Column(np.zeros(n, np.int64))
        given = arrays.get("given", np.empty((0, d), center.dtype))
        places = arrays.get("beside", np.full(n, -1))
        if places.shape != (n,) or given.shape[1:] != (d,):
            raise ValueError("points stored with their rows have other shapes")
        if len(places) and not -1 <= places.min() <= places.max() < len(given):
            raise ValueError("rows refer to stored points that are missing")
        columns["beside"] = Column(places.astype(np.int64))
        return Points(
            center,
            center.dtype,
            Rounding.of(center.dtype, d),
            Columns(columns),
            Column(arrays["slot_of"]),
            Column(given),
        )


def blocks(slots: Array) -> list[Array]:
    """Cut slots into blocks that are processed at a time."""
    return [slots[i : i + _BLOCK] for i in range(0, len(slots), _BLOCK)]
