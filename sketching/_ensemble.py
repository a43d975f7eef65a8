r"""Many independent sketches of every point, of which each query asks a fresh sample.

An answer tells little of sketches that the next query may not meet. The distance of
one sketch is :math:`|S_j U (q - x_i)|`, that of the ensemble the median of the sampled
ones (Cherapanamjeri and Nelson, arXiv 2010.11252; Qin, Reddy and Song, 2309.01030).

Sketches are read far more often than written, and off by more than rounding anyway:
they are kept in half the width.
"""

import numpy as np

from sketching._exact_scan import Queries, lengths_of_differences
from sketching._half_width import halved, widened
from sketching._lib.arrays import Array
from sketching._ops.ensemble import median, median_distances
from sketching._points import Points, Rounding, grown

_EPS = float(np.finfo(np.float32).eps)
# points that are updated at a time
_BLOCK = 4096
# share of a point's norm that rounding of its sketches may reach before they are redone
_STALE = 2e-3


class Ensemble:
    """Sketches ``Z_j = X U^T S_j^T`` and the maps of queries, ``T_j = S_j U``."""

    def __init__(self, matrices: Array, factor: Array) -> None:
        # (sketches, rows, k), normal numbers of variance one over rows
        self.matrices = matrices
        self.maps = (matrices @ factor).astype(np.float32)
        count, rows, _ = matrices.shape
        self._codes = np.empty((count, 0, rows), np.int16)
        # steps of the codes, and squared norms
        self._of_codes = np.empty((2, count, 0), np.float32)
        # how far updates may have moved sketches from where they belong; how far
        # rounding to steps may have, squared, point by point
        self._slip = 0.0
        self._off = np.empty(0, np.float32)
        self.size = 0

    @staticmethod
    def draw(
        sketches: int, rows: int, factor: Array, rng: np.random.Generator
    ) -> "Ensemble":
        """Draw the sketches of a metric."""
        shape = (sketches, rows, len(factor))
        matrices = rng.standard_normal(shape, dtype=np.float32)
        return Ensemble(matrices / np.float32(np.sqrt(rows)), factor)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.matrices, self.maps, self._codes, self._of_codes, self._off)
        return sum(int(x.nbytes) for x in arrays)

    @property
    def fits(self) -> tuple[int, int]:
        """Number of points and of the rows of the factor."""
        return self.size, self.matrices.shape[2]

    def arrays(self) -> dict[str, Array]:
        """What a file keeps."""
        return {
            "matrices": self.matrices,
            "maps": self.maps,
            "codes": self._codes[:, : self.size],
            "of_codes": self._of_codes[:, :, : self.size],
            "slip": np.array(self._slip),
            "off": self._off[: self.size],
        }

    @staticmethod
    def of_arrays(arrays: dict[str, Array]) -> "Ensemble":
        """Build from what a file kept."""
        sketch = object.__new__(Ensemble)
        sketch.matrices, sketch.maps = arrays["matrices"], arrays["maps"]
        sketch._codes, sketch._of_codes = arrays["codes"], arrays["of_codes"]
        sketch.size = arrays["codes"].shape[1]
        sketch._slip, sketch._off = float(arrays["slip"]), arrays["off"]
        return sketch

    def resize(self, size: int) -> None:
        """Make room for so many points."""
        self._codes = grown(self._codes, size, 1)
        self._of_codes = grown(self._of_codes, size, 2)
        self._off = grown(self._off, size, 0)
        self.size = size

    def encode(self, slots: Array, images: Array) -> None:
        """Sketch mapped points."""
        images = images.astype(np.float32)
        self._off[slots] = 0
        for j, matrix in enumerate(self.matrices):
            self._write(j, slots, images @ matrix.T)
        self._count_rounding(slots)

    def _write(self, j: int, slots: Array | slice, sketches: Array) -> None:
        codes, steps = halved(sketches)
        self._codes[j, slots] = codes
        kept = widened(codes, steps)
        self._of_codes[0, j, slots] = steps
        self._of_codes[1, j, slots] = np.einsum("nm,nm->n", kept, kept)

    def _count_rounding(self, slots: Array | slice) -> None:
        """Add what writing may have moved a sketch by: half a step in every row."""
        half = self._of_codes[0][:, slots].max(axis=0) / 2
        # roundings of one writing after the other are modelled as independent
        self._off[slots] += self.matrices.shape[1] * half**2

    def move(self, movers: Array, holes: Array, size: int) -> None:
        """Follow the points that took the place of removed ones."""
        self._codes[:, holes] = self._codes[:, movers]
        self._of_codes[:, :, holes] = self._of_codes[:, :, movers]
        self._off[holes] = self._off[movers]
        self.size = size

    def absorb(self, left: Array, right: Array, w: Array, points: Points) -> None:
        """Follow updates ``U += a b^T``, given the products with ``b``."""
        w, thin = w.astype(np.float32), left.astype(np.float32)
        for j, matrix in enumerate(self.matrices):
            change = thin @ matrix.T
            for start in range(0, self.size, _BLOCK):
                part = slice(start, min(start + _BLOCK, self.size))
                self._write(j, part, self._sketches(j, part) + w[part] @ change)
            self.maps[j] += change.T @ right.astype(np.float32)
        self._count_rounding(slice(0, self.size))
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        reach = float(points.stats[2].max(initial=0))
        self._slip += _EPS * reach * float(lengths.sum())

    def _sketches(self, j: Array | int, slots: Array | slice) -> Array:
        """Sketches of some points, in single precision."""
        return widened(self._codes[j, slots], self._of_codes[0][j, slots])

    def stale(self, points: Points) -> Array:
        """Where rounding of updates has become a part of the norm."""
        return np.flatnonzero(self._off[: self.size] > _STALE**2 * points.stats[0])

    def is_stale(self, points: Points) -> bool:
        """Whether rounding of updates has become a part of a typical distance."""
        level = np.sqrt(np.median(points.stats[0]))
        return bool(self._slip > 1e-3 * level)

    def refresh(self, factor: Array) -> None:
        """Compute the maps anew; the codes are encoded by the caller."""
        self.maps = (self.matrices @ factor).astype(np.float32)
        self._slip = 0.0

    def estimates(self, queries: Queries, sampled: Array, eps: float) -> Array:
        """Median distance of the sampled sketches, ``(q, n)``."""
        rows = queries.rows.astype(np.float32)
        coded = np.stack([rows @ self.maps[j].T for j in sampled])
        values = median_distances(
            self._codes[:, : self.size],
            self._of_codes[:, :, : self.size],
            sampled,
            coded,
            self._floor(slice(0, self.size), eps),
            rounding=self._rounding / eps,
        )
        # where rounding of the sketches is not small, the definition answers
        for q in np.flatnonzero(np.isnan(values).any(axis=1)):
            slots = np.flatnonzero(np.isnan(values[q]))
            values[q, slots] = queries.by_difference(int(q), slots)
        return values

    def pairs(
        self,
        points: Points,
        factor: Array,
        i: Array,
        j: Array,
        sampled: Array,
        eps: float,
    ) -> Array:
        """Median distance of pairs of points, by the sampled sketches."""
        one, other = (self._sketches(sampled[:, None], slots) for slots in (i, j))
        values = median(np.linalg.norm(one - other, axis=2))
        squares = self._of_codes[1][sampled]
        doubt = self._rounding * (squares[:, i] + squares[:, j]).max(axis=0)
        floor = self._floor(i, eps) + self._floor(j, eps)
        slots = np.flatnonzero(values**2 <= np.maximum(doubt / eps, floor))
        if slots.size:
            others = points.some(j[slots]).astype(np.float64)
            values[slots] = lengths_of_differences(factor, points, i[slots], others)
        return values

    def _floor(self, slots: Array | slice, eps: float) -> Array:
        """Squared distances of which rounding of the sketches may be a part of eps."""
        return (8 / eps) ** 2 * (self._slip**2 + self._off[slots])

    @property
    def _rounding(self) -> float:
        """How far a squared distance may be off, relative to the norms in it."""
        # queries are mapped by sums of d products, points by sums of k
        _, rows, d = self.maps.shape
        return 4 * Rounding.of(np.float32, max(rows, d)).unit
