r"""Short codes of points that bound their distances with certainty.

Orthonormal rows P split a mapped point into its head :math:`P y` and a tail of which
only the length is stored. Then :math:`|P y - P z|^2 + (|t_y| \mp |t_z|)^2` bounds
:math:`|y - z|^2` from below and, with a plus, from above, for any query.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._ops.distances import brackets, lower_bounds
from sketching.index.columns import Column, Columns
from sketching.index.points import Points
from sketching.index.queries import Queries, smallest_k
from sketching.metric.rounding import Rounding

# rows that the directions of the head are found from
SAMPLE = 4096
# share of the points beyond which a scan of all costs less than selecting them
_MANY = 0.25
# share of undecided queries beyond which bounds are not used any more
_FUTILE = 0.5
# numbers of one block of bounds
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class ProjectionBounds:
    """Heads, and the lengths of tails, of every point."""

    basis: Array
    # codes; stats (squared norm of the code, bound on the error of squares, least and
    # largest tail); bounds on the error of codes by updates
    table: Columns

    @staticmethod
    def along(basis: Array, dtype: Any) -> "ProjectionBounds":
        """No points yet, with such directions of the head."""
        sketch = ProjectionBounds(basis, Columns({}))
        columns = sketch.blank(0, dtype)
        axes = {"stats": 1}
        table = {name: Column(x, axes.get(name, 0)) for name, x in columns.items()}
        return replace(sketch, table=Columns(table))

    def blank(self, count: int, dtype: Any = None) -> dict[str, Array]:
        """Memory for the codes of so many points."""
        dtype = self._codes.dtype if dtype is None else dtype
        return {
            "codes": np.empty((count, len(self.basis)), dtype),
            "stats": np.empty((4, count)),
            "slip": np.zeros(count),
        }

    @property
    def _codes(self) -> Array:
        return self.table["codes"]

    @property
    def size(self) -> int:
        """The number of points."""
        return self.table.size

    @property
    def rounding(self) -> float:
        """Rounding errors of products of codes, relative to their terms."""
        return Rounding.of(self._codes.dtype, len(self.basis)).unit

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.basis.nbytes) + self.table.nbytes

    @property
    def fits(self) -> tuple[int, int]:
        """Number of points and of the rows of the factor."""
        return self.size, self.basis.shape[1]

    def arrays(self) -> dict[str, Array]:
        """Arrays that are saved to a file."""
        return {"basis": self.basis, **self.table.arrays()}

    @staticmethod
    def of_arrays(arrays: dict[str, Array]) -> "ProjectionBounds":
        """Build from the arrays of a file."""
        columns = {
            "codes": Column(arrays["codes"]),
            "stats": Column(arrays["stats"], axis=1),
            "slip": Column(arrays["slip"]),
        }
        return ProjectionBounds(arrays["basis"], Columns(columns))

    def with_table(self, table: Columns) -> "ProjectionBounds":
        """With other columns."""
        return replace(self, table=table)

    def encode(self, out: dict[str, Array], part: slice, images: Array) -> None:
        """Write the codes of some mapped points into room for them."""
        heads = images @ self.basis.T
        out["codes"][part] = heads
        square = np.einsum("nk,nk->n", images, images)
        tail = square - np.einsum("np,np->n", heads, heads)
        off = 1e-15 * images.shape[1] * square
        codes = out["codes"][part]
        out["stats"][:, part] = self._measured(codes, out["slip"][part], tail, off)

    def absorbed(
        self, left: Array, right: Array, w: Array, points: Points
    ) -> "ProjectionBounds":
        """Apply updates ``U += a b^T``, given the products with ``b``."""
        heads = left @ self.basis.T
        codes = w @ heads.astype(w.dtype)
        codes += self._codes
        square = _squares(codes)
        lengths = np.linalg.norm(heads, axis=1) * np.linalg.norm(right, axis=1)
        off_products = points.rounding.unit * points.stats[2] * lengths.sum()
        eps = float(np.finfo(codes.dtype).eps)
        code_error = self.table["slip"] + off_products + eps * np.sqrt(square)
        h, off, _ = points.stats
        off = off + 2 * np.sqrt(square) * code_error + 2 * eps * h
        stats = self._measured(codes, code_error, h - square, off)
        table = self.table.replaced(codes=codes, slip=code_error, stats=stats)
        return replace(self, table=table)

    def refreshed(self, factor: Array) -> "ProjectionBounds":  # noqa: ARG002
        """Itself: the directions of the head serve any metric."""
        return self

    def _measured(
        self, codes: Array, code_error: Array, tail: Array, off: Array
    ) -> Array:
        """Return the norms of codes, and bounds of the tail by its square."""
        # 2 x s <= u x^2 + s^2 / u: the first part goes with the rounding of scans
        code_errors = code_error**2 * (1 + 1 / self.rounding)
        ends = [np.sqrt(np.maximum(x, 0)) for x in (tail - off, tail + off)]
        return np.stack([_squares(codes), code_errors, *ends])

    def _coded(self, queries: Queries) -> tuple[Array, Array]:
        """Heads of the queries; their squared norms and the lengths of their tails."""
        heads = queries.images @ self.basis.T
        codes = heads.astype(self._codes.dtype)
        tail = queries.squares - np.einsum("qp,qp->q", heads, heads)
        own = np.einsum("qp,qp->q", codes.astype(np.float64), codes)
        return codes, np.array([own, np.sqrt(np.maximum(tail, 0))])

    def distances(self, queries: Queries, eps: float) -> tuple[Array, float]:
        """Distances to all points and the bound on their relative error."""
        out, worst, counts = self._brackets(queries, eps)
        for j in map(int, np.flatnonzero(counts)):
            if counts[j] > _MANY * self.size:
                out[j] = queries[j : j + 1].distances()[0]
            else:
                slots = np.flatnonzero(np.isnan(out[j]))
                out[j, slots] = queries.some_distances(j, slots)
        return out, max(float(worst.max(initial=0)), queries.points.rounding.tolerance)

    def open_share(self, queries: Queries, eps: float) -> float:
        """Share of distances that bounds leave undecided."""
        _, _, counts = self._brackets(queries, eps)
        computed = np.where(counts > _MANY * self.size, self.size, counts)
        return float(computed.mean()) / self.size

    def _brackets(self, queries: Queries, eps: float) -> tuple[Array, Array, Array]:
        codes, of_queries = self._coded(queries)
        found: tuple[Array, Array, Array] = brackets(
            self._codes,
            codes,
            self.table["stats"],
            of_queries,
            rounding=4 * self.rounding,
            tolerance=eps,
        )
        return found

    def nearest(self, queries: Queries, k: int) -> tuple[Array, Array, Array]:
        """The ``k`` nearest points, their positions, and how many were examined."""
        q, n = len(queries), self.size
        values = np.empty((q, k), self._codes.dtype)
        slots, n_exact_distances = np.empty((q, k), np.int64), np.full(q, n)
        step, start = max(1, _BLOCK // n), 0
        is_open = np.ones(q, bool)
        while start < q:
            part = np.arange(start, min(start + step, q))
            row, at, counts = self._search(queries[start : start + step], k)
            is_decided = counts >= 0
            done = part[is_decided]
            values[done], chosen = smallest_k(row[is_decided], k)
            decided = np.flatnonzero(is_decided)
            slots[done] = at[decided[:, None], chosen]
            n_exact_distances[done], is_open[done] = counts[is_decided], False
            start += step
            if np.count_nonzero(is_open[part]) > _FUTILE * len(part):
                break
        # where bounds rule out little, all points in one product of matrices
        rest = np.flatnonzero(is_open)
        for some in (rest[i : i + step] for i in range(0, len(rest), step)):
            exact = queries.chosen(some).distances()
            values[some], slots[some] = smallest_k(exact, k)
        return values, slots, n_exact_distances

    def _search(self, queries: Queries, k: int) -> tuple[Array, Array, Array]:
        """Distances and positions of undecided points, their number; -1 if too many."""
        codes, of_queries = self._coded(queries)
        bounds = lower_bounds(
            self._codes,
            codes,
            self.table["stats"],
            of_queries,
            rounding=4 * self.rounding,
        )
        first = min(self.size, max(2 * k, 32))
        most = max(first, int(_MANY * self.size))
        slots, values, counts = queries.search(bounds, k=k, first=first, most=most)
        counts = np.where(counts > most, -1, counts)
        width = max(k, int(counts.max()))
        slots, values = slots[:, :width], values[:, :width]
        values[slots < 0] = np.inf
        for j in map(int, np.flatnonzero(np.isnan(values).any(axis=1))):
            uncertain = np.flatnonzero(np.isnan(values[j]))
            values[j, uncertain] = queries.by_difference(j, slots[j, uncertain])
        return values, slots, counts


def _squares(codes: Array) -> Array:
    wide = codes.astype(np.float64)
    squares: Array = np.einsum("np,np->n", wide, wide)
    return squares


def principal_basis(images: Array, size: int, rng: np.random.Generator) -> Array:
    """Orthonormal rows that hold most of the points' squared lengths, ``(size, k)``."""
    k = images.shape[1]
    if size >= k:
        return np.eye(k)
    # subspace iteration: a few products with a thin matrix in place of all directions
    spare = min(k, size + 16)
    basis = np.linalg.qr(rng.standard_normal((k, spare)))[0]
    for _ in range(3):
        basis = np.linalg.qr(images.T @ (images @ basis))[0]
    small = images @ basis
    _, vectors = np.linalg.eigh(small.T @ small)
    rows: Array = (basis @ vectors[:, ::-1][:, :size]).T
    return np.ascontiguousarray(rows)


def sampled(size: int, rng: np.random.Generator) -> Array:
    """Pick the points that the directions of the head are found from."""
    if size <= SAMPLE:
        return np.arange(size)
    return np.sort(rng.choice(size, SAMPLE, replace=False))
