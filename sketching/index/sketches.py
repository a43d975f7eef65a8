r"""Many independent sketches of every point, of which each query samples some.

An answer reveals little about sketches that the next query may not use. The distance of
one sketch is :math:`|S_j U (q - x_i)|`, that of the ensemble the median of the sampled
ones (Cherapanamjeri and Nelson, arXiv 2010.11252; Qin, Reddy and Song, 2309.01030).

Sketches are read far more often than written, and their errors exceed rounding anyway:
they are stored as 16-bit integers.
"""

from dataclasses import dataclass, replace

import numpy as np

from sketching._lib.arrays import Array
from sketching._ops.ensemble import median, median_distances
from sketching.index.columns import Column, Columns
from sketching.index.int16_rows import halved, widened
from sketching.index.points import Points
from sketching.index.queries import Queries, lengths_of_differences
from sketching.metric.rounding import Rounding

_EPS = float(np.finfo(np.float32).eps)
# points that are updated at a time
_BLOCK = 4096
# share of a point's norm that rounding of its sketches may have before they are redone
_STALE = 2e-3
# the axis of points of each column
_AXES = {"codes": 1, "of_codes": 2, "off": 0}


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Sketches ``Z_j = X U^T S_j^T`` and the maps of queries, ``T_j = S_j U``."""

    # (sketches, rows, k), normal numbers of variance one over rows
    matrices: Array
    maps: Array
    # codes; of_codes (steps of the codes, and squared norms); squared rounding errors
    # of sketches, point by point
    table: Columns
    # bounds on the errors of sketches by updates
    code_error: float = 0.0

    @staticmethod
    def draw(
        sketches: int, rows: int, factor: Array, rng: np.random.Generator
    ) -> "Ensemble":
        """Draw the sketches of a metric."""
        shape = (sketches, rows, len(factor))
        matrices = rng.standard_normal(shape, dtype=np.float32)
        matrices /= np.float32(np.sqrt(rows))
        maps = (matrices @ factor).astype(np.float32)
        sketch = Ensemble(matrices, maps, Columns({}))
        return sketch.with_table(_columns(sketch.blank(0)))

    def blank(self, count: int) -> dict[str, Array]:
        """Memory for the sketches of so many points."""
        sketches, rows, _ = self.matrices.shape
        return {
            "codes": np.empty((sketches, count, rows), np.int16),
            "of_codes": np.empty((2, sketches, count), np.float32),
            "off": np.zeros(count, np.float32),
        }

    @property
    def _codes(self) -> Array:
        return self.table["codes"]

    @property
    def _of_codes(self) -> Array:
        return self.table["of_codes"]

    @property
    def _off(self) -> Array:
        return self.table["off"]

    @property
    def size(self) -> int:
        """The number of points."""
        return self.table.size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.matrices.nbytes) + int(self.maps.nbytes) + self.table.nbytes

    @property
    def fits(self) -> tuple[int, int]:
        """Number of points and of the rows of the factor."""
        return self.size, self.matrices.shape[2]

    def arrays(self) -> dict[str, Array]:
        """Arrays that are saved to a file."""
        return {
            "matrices": self.matrices,
            "maps": self.maps,
            **self.table.arrays(),
            "slip": np.array(self.code_error),
        }

    @staticmethod
    def of_arrays(arrays: dict[str, Array]) -> "Ensemble":
        """Build from the arrays of a file."""
        table = _columns({name: arrays[name] for name in _AXES})
        code_error = float(arrays["slip"])
        return Ensemble(arrays["matrices"], arrays["maps"], table, code_error)

    def with_table(self, table: Columns) -> "Ensemble":
        """With other columns."""
        return replace(self, table=table)

    def encode(self, out: dict[str, Array], part: slice, images: Array) -> None:
        """Write the sketches of some mapped points into room for them."""
        images = images.astype(np.float32)
        for j, matrix in enumerate(self.matrices):
            _write(out, j, part, images @ matrix.T)
        out["off"][part] = self._rounded(out, part)

    def _rounded(self, out: dict[str, Array], part: slice) -> Array:
        """Squared rounding error of writing a sketch: half a step in a row."""
        half = out["of_codes"][0][:, part].max(axis=0) / 2
        # rounding errors of successive writes are modelled as independent
        squares: Array = self.matrices.shape[1] * half**2
        return squares

    def absorbed(
        self, left: Array, right: Array, w: Array, points: Points
    ) -> "Ensemble":
        """Apply updates ``U += a b^T``, given the products with ``b``."""
        w, thin = w.astype(np.float32), left.astype(np.float32)
        out, maps = self.blank(self.size), np.empty_like(self.maps)
        for j, matrix in enumerate(self.matrices):
            change = thin @ matrix.T
            for start in range(0, self.size, _BLOCK):
                part = slice(start, min(start + _BLOCK, self.size))
                _write(out, j, part, self._sketches(j, part) + w[part] @ change)
            maps[j] = self.maps[j] + change.T @ right.astype(np.float32)
        out["off"] += self._off + self._rounded(out, slice(0, self.size))
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        point_norm = float(points.stats[2].max(initial=0))
        code_error = self.code_error + _EPS * point_norm * float(lengths.sum())
        return Ensemble(self.matrices, maps, _columns(out), code_error)

    def _sketches(self, j: Array | int, slots: Array | slice) -> Array:
        """Sketches of some points, in single precision."""
        return widened(self._codes[j, slots], self._of_codes[0][j, slots])

    def stale(self, points: Points) -> Array:
        """Points whose rounding errors of updates show in the norm."""
        return np.flatnonzero(self._off > _STALE**2 * points.stats[0])

    def is_stale(self, points: Points) -> bool:
        """Whether rounding errors of updates show in a typical distance."""
        level = np.sqrt(np.median(points.stats[0]))
        return bool(self.code_error > 1e-3 * level)

    def refreshed(self, factor: Array) -> "Ensemble":
        """Compute the maps anew; the codes are encoded by the caller."""
        maps = (self.matrices @ factor).astype(np.float32)
        return replace(self, maps=maps, code_error=0.0)

    def estimates(self, queries: Queries, sampled: Array, eps: float) -> Array:
        """Median distance of the sampled sketches, ``(q, n)``."""
        rows = queries.rows.astype(np.float32)
        coded = np.stack([rows @ self.maps[j].T for j in sampled])
        values = median_distances(
            self._codes,
            self._of_codes,
            sampled,
            coded,
            self._floor(slice(0, self.size), eps),
            rounding=self._rounding / eps,
        )
        # where rounding of the sketches is not small, distances are exact
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
        uncertainty = self._rounding * (squares[:, i] + squares[:, j]).max(axis=0)
        floor = self._floor(i, eps) + self._floor(j, eps)
        slots = np.flatnonzero(values**2 <= np.maximum(uncertainty / eps, floor))
        if slots.size:
            others = points.kept(j[slots]).astype(np.float64)
            values[slots] = lengths_of_differences(factor, points, i[slots], others)
        return values

    def _floor(self, slots: Array | slice, eps: float) -> Array:
        """Squared distances below which rounding of the sketches shows in eps."""
        return (8 / eps) ** 2 * (self.code_error**2 + self._off[slots])

    @property
    def _rounding(self) -> float:
        """Error of a squared distance, relative to the norms in it."""
        # queries are mapped by sums of d products, points by sums of k
        _, rows, d = self.maps.shape
        return 4 * Rounding.of(np.float32, max(rows, d)).unit


def _columns(arrays: dict[str, Array]) -> Columns:
    return Columns({name: Column(x, _AXES[name]) for name, x in arrays.items()})


def _write(out: dict[str, Array], j: int, part: slice, sketches: Array) -> None:
    """Round the sketches of some points by one matrix."""
    codes, steps = halved(sketches)
    out["codes"][j, part] = codes
    kept = widened(codes, steps)
    out["of_codes"][0, j, part] = steps
    out["of_codes"][1, j, part] = np.einsum("nm,nm->n", kept, kept)
