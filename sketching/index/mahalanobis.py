"""MahalanobisIndex: points, a metric that changes, and distances from any query."""

from pathlib import Path
from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.certificate import Approximation, Certificate
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_integer, check_number
from sketching.index.answers import Answers
from sketching.index.arguments import check_count, check_parts, slots_of_pairs
from sketching.index.engine import IndexEngine
from sketching.index.files import PathLike, write_index
from sketching.index.neighbors import Neighbors
from sketching.index.queries import Queries
from sketching.index.state import Mode
from sketching.metric.mahalanobis import MahalanobisMetric, as_points, as_update


class MahalanobisIndex:
    """Points under a metric; both may change, and queries may be adversarial.

    Updates of the metric are queued and reach the points by matrix products when an
    answer needs them; the answers are those of an index built anew.

    Parameters
    ----------
    metric : MahalanobisMetric
        The metric; the index keeps a copy.
    mode : Exact, Filter or Adaptive, optional
        How distances are answered. By default, on the first insertion, the mode that
        reads least memory for a query, among those whose eps holds for adversarial
        queries; ``str(index.choice)`` says which and why.
    eps : float, optional
        Relative error of distances that are estimated.
    delta : float, optional
        Probability that an answer, of all points, breaks the promise.
    rng : int, numpy.random.Generator or None, optional
        Source of the sketches and of what each query samples. Whoever knows it can
        attack the sketches.

    See Also
    --------
    load : Read an index from a file.

    Notes
    -----
    Threads may share an index. Reads run in parallel, and answer from the index as it
    was when the call began. Changes exclude each other. An exception inside a change,
    an interrupt too, leaves the index as it was before or as it is after.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisIndex, MahalanobisMetric
    >>> index = MahalanobisIndex(MahalanobisMetric(np.eye(2)))
    >>> index.insert(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    array([0, 1, 2])
    >>> index.query(np.array([[0.0, 0.0]])).value
    array([[ 0.,  5., 10.]])
    >>> distances, numbers = index.kneighbors(np.array([[3.0, 3.0]]), 2)
    >>> numbers
    array([[1, 0]])
    >>> index.radius_neighbors(np.array([[3.0, 3.0]]), 2)[1][0]
    array([1])
    >>> _ = index.update_metric(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    >>> index.query_pairs([0], [1])
    array([7.21110255])
    """

    def __init__(
        self,
        metric: MahalanobisMetric,
        *,
        mode: Mode | None = None,
        eps: float = 0.1,
        delta: float = 0.01,
        rng: RandomSource = None,
    ) -> None:
        check_parts(metric, mode, eps, delta)
        promise = float(eps), float(delta)
        self._engine = IndexEngine(metric.copy(), mode, promise, as_generator(rng))

    @property
    def metric(self) -> MahalanobisMetric:
        """A copy of the metric, with every update."""
        return self._engine.metric.copy()

    @property
    def factor(self) -> Array:
        """The factor U of the metric, ``(k, d)``, as a read-only view."""
        return self._engine.metric.factor

    @property
    def mode(self) -> Mode | None:
        """How distances are answered; None before the first insertion picks one."""
        return self._engine.state.mode

    @property
    def eps(self) -> float:
        """Relative error of estimated distances."""
        return self._engine.eps

    @property
    def delta(self) -> float:
        """Probability that an answer breaks the promise."""
        return self._engine.delta

    @property
    def choice(self) -> Any:
        """Numbers read by each mode, where the index chose one itself, else None."""
        return self._engine.state.choice

    @property
    def numbers(self) -> Array:
        """The numbers of the points, in the order of the columns of ``query``."""
        answers = self._engine.answers(fresh=False)
        points = answers.state.points
        return np.empty(0, np.int64) if points is None else points.numbers.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of points, sketches and metric."""
        return self._engine.state.nbytes

    def __len__(self) -> int:
        points = self._engine.state.points
        return 0 if points is None else points.size

    def __repr__(self) -> str:
        return f"MahalanobisIndex(<{len(self)} points>, {self.metric}, {self.mode})"

    def insert(self, X: Array) -> Array:
        """Insert points.

        Parameters
        ----------
        X : array, shape (n, d)
            One point a row. The first points set the precision of the index.

        Returns
        -------
        array of int, shape (n,)
            The numbers of the points, by which they are named from now on.
        """
        x = as_points("X", X, self._engine.metric.shape[1])
        return self._engine.insert(x) if len(x) else np.empty(0, np.int64)

    def points(self, numbers: Array | None = None) -> Array:
        """Return points: as inserted, or rounded with ``half_width``.

        Parameters
        ----------
        numbers : array of int, shape (n,), optional
            Which points; all by default.

        Returns
        -------
        array, shape (n, d)
            A copy, in the precision of the first points.
        """
        answers = self._engine.answers(fresh=False)
        points, every = answers.state.filled, numbers is None
        slots = np.arange(points.size) if every else points.slots("numbers", numbers)
        return points.kept(slots)

    def delete(self, numbers: Array) -> "MahalanobisIndex":
        """Remove points; the last columns of ``query`` take the place of theirs.

        Parameters
        ----------
        numbers : array of int, shape (n,)
            Which points, each once.

        Returns
        -------
        MahalanobisIndex
            This index.
        """
        self._engine.remove(numbers)
        return self

    def update_points(self, numbers: Array, X: Array) -> "MahalanobisIndex":
        """Move points to new places.

        Parameters
        ----------
        numbers : array of int, shape (n,)
            Which points, each once.
        X : array, shape (n, d)
            Where to.

        Returns
        -------
        MahalanobisIndex
            This index.
        """
        self._engine.move(numbers, as_points("X", X, self._engine.metric.shape[1]))
        return self

    def update_metric(self, a: Array | int, b: Array) -> "MahalanobisIndex":
        r"""Change the factor of the metric by :math:`U \mathrel{+}= a b^\top`.

        Parameters
        ----------
        a, b : array
            As for :meth:`MahalanobisMetric.update`: one update, a batch, or a row.

        Returns
        -------
        MahalanobisIndex
            This index.
        """
        self._engine.update(*as_update(a, b, self._engine.metric.shape))
        return self

    def query(self, Q: Array) -> Approximation:
        """Answer the distances of queries to all points.

        Parameters
        ----------
        Q : array, shape (q, d)
            One query a row. The queries of one call must not depend on each other's
            answers, those of later calls may.

        Returns
        -------
        Approximation
            ``value``, ``(q, n)``, with a column for each of ``numbers``;
            ``certificate``, whose ``error`` is relative to each distance, and ``plan``,
            the mode.
        """
        answers, queries = self._asked("Q", Q)
        value, certificate = answers.distances(queries)
        return Approximation(value, certificate, answers.state.mode, None)

    def query_pairs(self, i: Array, j: Array) -> Array:
        """Answer the distances between pairs of points.

        Parameters
        ----------
        i, j : array of int, shape (n,)
            Numbers of points.

        Returns
        -------
        array, shape (n,)
            Exact distances; estimates where the mode is ``Adaptive``.
        """
        before = self._engine.answers(fresh=False)
        slots_of_pairs(before.state.filled, i, j)
        answers = self._engine.answers()
        # other threads may have removed some points
        return answers.pairs(*slots_of_pairs(answers.state.filled, i, j))

    def kneighbors(self, Q: Array, k: int) -> Neighbors:
        """Find the nearest points of queries.

        Parameters
        ----------
        Q : array, shape (q, d)
            One query a row.
        k : int
            How many.

        Returns
        -------
        Neighbors
            The pair of distances and numbers, both ``(q, k)``, nearest first. Its
            attributes are ``certificate``, which for ``Exact`` and ``Filter`` promises
            the right neighbours, and ``examined``, the exact distances of each query.
        """
        k = check_integer("k", k, least=1)
        check_count(k, self._engine.filled.size)
        answers, queries = self._asked("Q", Q)
        points = answers.state.filled
        # other threads may have removed some
        check_count(k, points.size)
        values, slots, examined, certificate = answers.nearest(queries, k)
        return Neighbors(values, points.numbers[slots], certificate, examined)

    def radius_neighbors(self, Q: Array, radius: float) -> Neighbors:
        """Find all points within a distance of queries.

        Parameters
        ----------
        Q : array, shape (q, d)
            One query a row.
        radius : float
            The distance, itself included.

        Returns
        -------
        Neighbors
            As of ``kneighbors``, but an array of ``q`` arrays each.
        """
        radius = check_number("radius", radius, least=0)
        answers, queries = self._asked("Q", Q)
        values, numbers, examined, certificate = answers.within(queries, radius)
        return Neighbors(values, numbers, certificate, examined)

    def sample(self, q: Array, size: int, *, power: int = 1) -> Array:
        """Draw points with probability exactly proportional to their distance.

        Estimates propose points, exact distances accept or reject them.

        Parameters
        ----------
        q : array, shape (d,)
            The query.
        size : int
            How many points to draw, with replacement.
        power : {1, 2}, optional
            2 draws in proportion to squared distances, as k-means++ does.

        Returns
        -------
        array of int, shape (size,)
            Numbers of points.
        """
        check_integer("size", size, least=1)
        if power not in (1, 2):
            raise ValueError(f"power: expected 1 or 2, got {power!r}")
        answers, queries = self._asked("q", np.asarray(q)[None])
        slots = answers.sample(queries, size, power)
        numbers: Array = answers.state.filled.numbers[slots]
        return numbers

    def guarantee(self) -> Certificate:
        """Return the certificate that an answer of ``query`` has now.

        Returns
        -------
        Certificate
            ``error`` is relative to each distance; for ``Adaptive`` it is eps only
            where the sketches are enough for queries that depend on earlier answers,
            else the error of the worst direction, and ``source`` says so.
        """
        return self._engine.answers(fresh=False).guarantee()

    def redraw(self, rng: RandomSource = None) -> "MahalanobisIndex":
        """Centre the points anew and draw new sketches.

        Parameters
        ----------
        rng : int, numpy.random.Generator or None, optional
            Source of the sketches.

        Returns
        -------
        MahalanobisIndex
            This index; what an adversary learned does not apply any more.
        """
        self._engine.redraw(as_generator(rng))
        return self

    def merge(self, other: "MahalanobisIndex") -> "MahalanobisIndex":
        """Insert the points of another index under the same metric.

        Parameters
        ----------
        other : MahalanobisIndex
            It stays as it is.

        Returns
        -------
        MahalanobisIndex
            This index; the new numbers follow its own, in the order of the other's.
        """
        if not isinstance(other, MahalanobisIndex):
            raise TypeError(f"other: expected a MahalanobisIndex, got {other!r}")
        theirs = other._engine.answers(fresh=False).state
        if not np.array_equal(theirs.metric.factor, self.factor):
            raise ValueError("other: expected an index under the same metric")
        if theirs.points is not None and theirs.points.size:
            self.insert(theirs.points.kept(np.arange(theirs.points.size)))
        return self

    def save(self, path: PathLike) -> None:
        """Write the index to an ``.npz`` file, whole or not at all.

        Parameters
        ----------
        path : str or path
            Where to; an old file is replaced when the new one is complete.
        """
        write_index(Path(path), self._engine.snapshot())

    def _asked(self, name: str, x: Any) -> tuple[Answers, Queries]:
        """Check queries, and take the state that answers them."""
        rows = as_points(name, x, self._engine.metric.shape[1])
        if not len(rows):
            raise ValueError(f"{name}: expected at least one query, got none")
        answers = self._engine.answers()
        return answers, answers.queries(name, rows)
