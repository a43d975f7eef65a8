"""Exact distances: the norm form over all points, small ones by difference."""

from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.lazy import lazy
from sketching._ops.distances import scan
from sketching._ops.search import search
from sketching.index.points import Points

# pairs whose differences are mapped at a time
_PAIRS = 1024
# numbers of the factor that are used twice while they are in the cache
_FACTOR = 1 << 16


class Queries:
    """Centred queries of one call, with the arrays of a scan computed at first use."""

    def __init__(self, points: Points, factor: Array, asked: Array) -> None:
        self.points, self.factor = points, factor
        # as given, and relative to the centre: neither is rounded as the points are
        self.asked = asked.astype(np.float64, copy=False)
        self.rows = points.centred(self.asked)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice) -> "Queries":
        return Queries(self.points, self.factor, self.asked[chosen])

    def chosen(self, numbers: Array) -> "Queries":
        """Some of the queries."""
        return Queries(self.points, self.factor, self.asked[numbers])

    @lazy
    def _mapped(self) -> tuple[Array, Array]:
        """``U q`` and ``U^T U q`` of each query, in one pass over the factor."""
        rows = self.rows
        k, d = self.factor.shape
        images, back = np.empty((len(rows), k)), np.zeros((len(rows), d))
        # the time of a batch goes into products, that of a single query into reading
        # memory
        step = max(16, _FACTOR // d) if len(rows) < 8 else k
        for start in range(0, k, step):
            part = self.factor[start : start + step]
            images[:, start : start + step] = rows @ part.T
            back += images[:, start : start + step] @ part
        return images, back

    @property
    def images(self) -> Array:
        """``U q`` of each query, in float64."""
        return self._mapped[0]

    @lazy
    def squares(self) -> Array:
        """Squared norms in the metric."""
        return np.einsum("qk,qk->q", self.images, self.images)

    @lazy
    def _directions(self) -> tuple[Array, Array]:
        """``U^T U q``, with which a scan multiplies the points; norms and lengths."""
        exact = self._mapped[1]
        lengths = np.sqrt(np.einsum("qd,qd->q", exact, exact))
        return exact.astype(self.points.dtype), np.array([self.squares, lengths])

    def distances(self) -> Array:
        """Distances to all points, ``(q, n)``, to the tolerance of rounding."""
        points = self.points
        directions, of_queries = self._directions
        out, counts = scan(
            points.rows,
            directions,
            points.stats,
            of_queries,
            rounding=points.rounding.unit,
            tolerance=points.rounding.tolerance,
            steps=points.steps,
        )
        for j in np.flatnonzero(counts):
            slots = np.flatnonzero(np.isnan(out[j]))
            out[j, slots] = self.by_difference(int(j), slots)
        return out

    def some_distances(self, j: int, slots: Array) -> Array:
        """Distances of one query to some points."""
        points = self.points
        directions, of_queries = self._directions
        out, counts = scan(
            points.take(slots),
            directions[j : j + 1],
            np.ascontiguousarray(points.stats[:, slots]),
            of_queries[:, j : j + 1],
            rounding=points.rounding.unit,
            tolerance=points.rounding.tolerance,
        )
        if counts[0]:
            uncertain = np.flatnonzero(np.isnan(out[0]))
            out[0, uncertain] = self.by_difference(j, slots[uncertain])
        return out[0]

    def search(
        self, bounds: Array, *, k: int, first: int, most: int
    ) -> tuple[Array, Array, Array]:
        """Examine the points that lower bounds do not rule out."""
        points = self.points
        directions, of_queries = self._directions
        found: tuple[Array, Array, Array] = search(
            points.rows,
            directions,
            bounds,
            points.stats,
            of_queries,
            k=k,
            first=first,
            most=most,
            rounding=points.rounding.unit,
            tolerance=points.rounding.tolerance,
        )
        return found

    def by_difference(self, j: int, slots: Array) -> Array:
        """Distances of one query to some points, from the definition in float64."""
        return lengths_of_differences(self.factor, self.points, slots, self.asked[j])


def lengths_of_differences(
    factor: Array, points: Points, slots: Array, other: Any
) -> Array:
    """Norm in the metric of some points less one other row, or as many.

    Both are as inserted: the difference of two near ones is exact.
    """
    out = np.empty(len(slots))
    for start in range(0, len(slots), _PAIRS):
        part = slice(start, start + _PAIRS)
        of_part = other if np.ndim(other) == 1 else other[part]
        apart = (points.kept(slots[part]).astype(np.float64) - of_part) @ factor.T
        out[part] = np.sqrt(np.einsum("nk,nk->n", apart, apart))
    return out


def smallest_k(distances: Array, k: int) -> tuple[Array, Array]:
    """The ``k`` least of each row in order, and their positions."""
    # indices spelled out: np.take_along_axis costs as much as many scans
    rows = np.arange(len(distances))[:, None]
    if k < distances.shape[1]:
        chosen = distances.argpartition(k - 1, axis=1)[:, :k]
    else:
        chosen = np.broadcast_to(np.arange(k), (len(distances), k))
    values = distances[rows, chosen]
    order = values.argsort(axis=1, kind="stable")
    return values[rows, order], chosen[rows, order]
