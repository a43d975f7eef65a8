"""Answers of an index from one state of it, independent of later changes."""

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate, RefusalError
from sketching.index.modes import Adaptive, Exact
from sketching.index.queries import Queries, lengths_of_differences
from sketching.index.rejection_sampling import sample_exact
from sketching.index.state import State, check_length

# numbers of one block of distances
_BLOCK = 1 << 22


class Answers:
    """A state that is being read: its rows are not written meanwhile."""

    __slots__ = ("__weakref__", "state")

    def __init__(self, state: State) -> None:
        self.state = state

    def queries(self, name: str, x: Array) -> Queries:
        """Centre queries."""
        state = self.state
        points = state.filled
        queries = Queries(points, state.metric._factor, x)
        check_length(name, points, queries.rows, state.scale)
        return queries

    def distances(self, queries: Queries) -> tuple[Array, Certificate]:
        """Distances to all points."""
        self._count(len(queries))
        state = self.state
        found: tuple[Array, Certificate] = state.running.distances(
            state.request(queries)
        )
        return found

    def nearest(
        self, queries: Queries, k: int
    ) -> tuple[Array, Array, Array, Certificate]:
        """Distances and positions of the nearest points, and how many were examined."""
        self._count(len(queries))
        state = self.state
        found: tuple[Array, Array, Array, Certificate] = state.running.nearest(
            state.request(queries), k
        )
        return found

    def within(
        self, queries: Queries, radius: float
    ) -> tuple[Array, Array, Array, Certificate]:
        """Points within a radius, nearest first, and how many were examined."""
        state, q = self.state, len(queries)
        points, numbers_of = state.filled, state.filled.numbers
        values, numbers = np.empty(q, dtype=object), np.empty(q, dtype=object)
        n_exact_distances = np.full(q, points.size)
        is_exact = isinstance(state.mode, Exact)
        step = max(1, _BLOCK // points.size)
        for start in range(0, q, step):
            some = queries[start : start + step]
            rows, certificate = self.distances(some)
            # estimates only rule points out
            error = 0.0 if is_exact else float(certificate.error)
            for j, row in enumerate(rows):
                near = np.flatnonzero(row <= radius * (1 + error))
                found = row[near] if is_exact else some.some_distances(j, near)
                n_exact_distances[start + j] = len(row) if is_exact else len(near)
                near, found = near[found <= radius], found[found <= radius]
                order = np.argsort(found, kind="stable")
                values[start + j] = found[order]
                numbers[start + j] = numbers_of[near[order]]
        mode = state.running if isinstance(state.mode, Adaptive) else Exact()
        return (
            values,
            numbers,
            n_exact_distances,
            mode.guarantee(state.request(queries)),
        )

    def pairs(self, left: Array, right: Array) -> Array:
        """Distances between points."""
        state = self.state
        points, factor = state.filled, state.metric._factor
        if not isinstance(state.mode, Adaptive):
            others = points.kept(right).astype(np.float64)
            return lengths_of_differences(factor, points, left, others)
        self._count(1)
        sampled = state.mode.sample(state.request())
        eps, _ = state.promise
        pairs: Array = state.sketch.pairs(points, factor, left, right, sampled, eps)
        return pairs

    def sample(self, queries: Queries, size: int, power: int) -> Array:
        """Places in proportion to distance."""
        estimates, certificate = self.distances(queries)
        error, (eps, _) = float(certificate.error), self.state.promise
        if error > eps:
            estimates, error = queries.distances(), 0.0
        return sample_exact(
            estimates[0],
            error,
            lambda slots: queries.some_distances(0, slots),
            size,
            power,
            self.state.samples,
        )

    def guarantee(self) -> Certificate:
        """The certificate of an answer."""
        return self.state.running.guarantee(self.state.request())

    def _count(self, asked: int) -> None:
        """Raise if more queries are answered than the sketches are guaranteed for."""
        mode = self.state.mode
        most = mode.queries if isinstance(mode, Adaptive) else None

        def count(answered: int) -> tuple[int, None]:
            if most is not None and answered + asked > most:
                raise RefusalError(
                    f"{mode}: {answered} of {most} queries were answered, "
                    f"{asked} more were requested: call redraw() for new sketches"
                )
            return answered + asked, None

        self.state.answered.change(count)
