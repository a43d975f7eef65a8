"""Exact, Filter, Adaptive: how an index answers, and with which certificate.

A mode is a frozen configuration; it makes the sketch that the index stores with the
points, and answers queries from it.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate, RefusalError
from sketching._lib.validation import check_flag, check_integer
from sketching.index.adaptive_law import (
    median_failure,
    misled,
    needed,
    worst_error,
    worst_failure,
)
from sketching.index.bounds import ProjectionBounds, principal_basis
from sketching.index.queries import smallest_k
from sketching.index.request import Request, half_of_memory
from sketching.index.sketches import Ensemble
from sketching.metric.rounding import UNLIKELY

# eps in deviations of a sketch: far enough from the tenth that may be misled
_FAR = 3.3
# share of sketches that a direction may mislead without an effect on the median
_MISLED = 0.1
# the Kullback-Leibler divergence of a half from a tenth
_DIVERGENCE = 0.5 * math.log(5) + 0.5 * math.log(5 / 9)
# numbers of one block of exact distances
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Exact:
    """Distances from all points, in one pass over them for each query.

    Batches are products of matrices; distances so small that rounding would show are
    computed again from the difference, in double precision.

    Parameters
    ----------
    half_width : bool, optional
        Store points in 16 bits a number: half the memory of single precision, and a
        query reads half. A point is rounded once, on insertion: the error of a
        coordinate is at most 1/65534 of the largest of its point, both measured from
        the centre. Distances are as exact as ever for the rounded points, which
        ``MahalanobisIndex.points`` returns; answers are in single precision.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import Exact, MahalanobisIndex, MahalanobisMetric
    >>> index = MahalanobisIndex(MahalanobisMetric(np.eye(2)), mode=Exact())
    >>> index.insert(np.array([[0.0, 0.0], [3.0, 4.0]]))
    array([0, 1])
    >>> index.query(np.array([[0.0, 0.0]])).value
    array([[0., 5.]])
    """

    half_width: bool = False

    def __post_init__(self) -> None:
        check_flag("half_width", self.half_width)

    def draw(self, _request: Request, _images: Array) -> None:
        """Draw nothing: the points are enough."""

    def distances(self, request: Request) -> tuple[Array, Certificate]:
        """Answer from all points."""
        return request.queries.distances(), self.guarantee(request)

    def nearest(
        self, request: Request, k: int
    ) -> tuple[Array, Array, Array, Certificate]:
        """Pick the least of all distances."""
        queries, n = request.queries, request.points.size
        step = max(1, _BLOCK // n)
        parts = [
            smallest_k(queries[start : start + step].distances(), k)
            for start in range(0, len(queries), step)
        ]
        values, slots = (np.concatenate(x) for x in zip(*parts, strict=True))
        n_exact_distances = np.full(len(queries), n)
        return values, slots, n_exact_distances, self.guarantee(request)

    def guarantee(self, request: Request) -> Certificate:
        """Promise the tolerance of rounding."""
        source = (
            "exact, but for rounding errors, modelled as independent; failure "
            "is that of one distance, small ones are computed from differences"
        )
        if request.points.steps is not None:
            source += (
                "; of the rounded points: the error of a coordinate is at most "
                "1/65534 of the largest of its point, both from the centre"
            )
        return Certificate(
            error=request.points.rounding.tolerance,
            failure=UNLIKELY,
            norm="relative",
            source=source,
        )


@dataclass(frozen=True, slots=True)
class Filter:
    """Short codes that bound every distance; undecided ones are computed exactly.

    A code is the head of the mapped point, along the principal directions of the first
    points, and the length of its tail. It gives a lower and an upper bound that hold
    for every query, adversarial or not. Distances that bounds leave undecided are
    computed exactly, so that neighbours are always right; where the spectrum does not
    decay, that is the scan of ``Exact``.

    Parameters
    ----------
    size : int, optional
        Numbers of the head of a point.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import Filter, MahalanobisIndex, MahalanobisMetric
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((5000, 200)) / np.arange(1, 201)
    >>> index = MahalanobisIndex(MahalanobisMetric(np.eye(200)), mode=Filter(size=16))
    >>> numbers = index.insert(x)
    >>> found = index.kneighbors(x[:1], 5)
    >>> int(found.examined[0]) < 500, found.certificate.failure < 1e-12
    (True, True)
    """

    size: int = 128

    def __post_init__(self) -> None:
        check_integer("size", self.size, least=1)

    def draw(self, request: Request, images: Array) -> ProjectionBounds:
        """Find the directions of the head from some mapped points."""
        basis = principal_basis(images, self.size, request.rng)
        return ProjectionBounds.along(basis, request.points.dtype)

    def distances(self, request: Request) -> tuple[Array, Certificate]:
        """Answer from the codes where they are within eps, else exactly."""
        values, error = request.sketch.distances(request.queries, request.eps)
        return values, replace(self.guarantee(request), error=error)

    def nearest(
        self, request: Request, k: int
    ) -> tuple[Array, Array, Array, Certificate]:
        """Examine points in the order of their lower bounds."""
        return *request.sketch.nearest(request.queries, k), Exact().guarantee(request)

    def guarantee(self, request: Request) -> Certificate:
        """Guarantee eps for any queries."""
        return Certificate(
            error=max(request.eps, request.points.rounding.tolerance),
            failure=UNLIKELY,
            norm="relative",
            source="bounds by an orthonormal head and the lengths of tails, but for "
            "rounding errors, modelled as independent; failure is that of one distance",
        )


@dataclass(frozen=True, slots=True)
class Adaptive:
    r"""Sketches enough that queries may depend on earlier answers.

    Of ``sketches`` independent sketches of ``rows`` numbers, each query draws
    ``sampled`` at random and takes the median. Sizes that are not given follow from eps
    and delta of the index: ``rows`` so that eps is 3.3 deviations of a sketch,
    ``sampled`` so that the median fails with probability delta over all points while a
    tenth of the sketches is misled, and ``sketches`` so that no direction misleads
    more: by the law of extreme eigenvalues, about :math:`8 (\sqrt k + 2)^2`, or the
    root of the number of ``queries``. Fewer sketches have a larger error, which
    ``MahalanobisIndex.guarantee`` returns.

    Parameters
    ----------
    rows, sketches, sampled : int, optional
        The sizes m, L and R; ``sampled`` is odd.
    queries : int, optional
        How many queries the index answers; then it refuses until ``redraw``.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import Adaptive, MahalanobisIndex, MahalanobisMetric
    >>> metric = MahalanobisMetric(np.eye(20))
    >>> index = MahalanobisIndex(metric, mode=Adaptive(), eps=0.3, rng=0)
    >>> numbers = index.insert(np.random.default_rng(0).standard_normal((50, 20)))
    >>> index.guarantee().error
    0.3
    >>> mode = Adaptive(rows=64, sketches=80, sampled=9)
    >>> index = MahalanobisIndex(metric, mode=mode, eps=0.3, rng=0)
    >>> numbers = index.insert(np.random.default_rng(0).standard_normal((50, 20)))
    >>> round(index.guarantee().error, 2)
    0.46

    References
    ----------
    Cherapanamjeri and Nelson, On Adaptive Distance Estimation, arXiv 2010.11252. Qin,
    Reddy and Song, Online Adaptive Mahalanobis Distance Estimation, arXiv 2309.01030.
    """

    rows: int | None = None
    sketches: int | None = None
    sampled: int | None = None
    queries: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "sketches", "sampled", "queries"):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value, least=1)
        if self.sampled is not None and self.sampled % 2 == 0:
            raise ValueError(f"sampled: expected an odd number, got {self.sampled}")

    def sizes(self, request: Request) -> tuple[int, int, int]:
        """Rows, sketches and sampled sketches for the points that there are."""
        eps, n, k = request.eps, request.points.size, len(request.factor)
        rows = self.rows or math.ceil((_FAR / eps) ** 2 / 2)
        sampled = self.sampled
        if sampled is None:
            sampled = math.ceil(math.log(2 * n / request.delta) / _DIVERGENCE) | 1
        if self.sketches is not None:
            return rows, self.sketches, sampled
        if self.queries is not None:
            return rows, max(sampled, math.ceil(math.sqrt(self.queries))), sampled
        sketches = needed(rows, k, eps, _MISLED)
        if sketches is None:
            # too few rows for eps: the least error of the worst direction
            sketches = math.ceil(k / (eps * eps * rows))
        return rows, max(sampled, sketches), sampled

    def bytes_for(self, request: Request) -> int:
        """Memory that the sketches take."""
        rows, sketches, _ = self.sizes(request)
        (n, d), k = request.points.rows.shape, len(request.factor)
        # of a point 16-bit integers, with step and norm; of the maps floats
        return int(sketches * (2 * n * (rows + 4) + 4 * rows * (d + k)))

    def draw(self, request: Request, _images: Array) -> Ensemble:
        """Draw the sketches."""
        rows, sketches, _ = self.sizes(request)
        need, n = self.bytes_for(request), request.points.size
        if need > half_of_memory():
            raise RefusalError(
                f"{self}: {sketches} sketches of {rows} rows take {need / 1e9:.3g} GB "
                f"for {n} points, more than half of the memory; give eps above "
                f"{request.eps:g}, a number of queries, or sizes"
            )
        return Ensemble.draw(sketches, rows, request.factor, request.rng)

    def distances(self, request: Request) -> tuple[Array, Certificate]:
        """Take the median of freshly sampled sketches."""
        queries = request.queries
        values = request.sketch.estimates(queries, self.sample(request), request.eps)
        values = values.astype(request.points.dtype, copy=False)
        return values, self.guarantee(request)

    def sample(self, request: Request) -> Array:
        """Draw the sketches of one call."""
        count = len(request.sketch.matrices)
        _, _, sampled = self.sizes(request)
        return request.rng.choice(count, sampled, replace=sampled > count)

    def nearest(
        self, request: Request, k: int
    ) -> tuple[Array, Array, Array, Certificate]:
        """Compute exactly what the estimates leave undecided."""
        queries = request.queries
        values, certificate = self.distances(request)
        error = min(float(certificate.error), 0.5)
        found = np.empty((len(queries), k), values.dtype)
        slots = np.empty((len(queries), k), np.int64)
        n_exact_distances = np.empty(len(queries), np.int64)
        for j, row in enumerate(values):
            limit = np.partition(row, k - 1)[k - 1] * (1 + error) / (1 - error)
            near = np.flatnonzero(row <= limit)
            if 4 * len(near) > len(row):
                near = np.arange(len(row))
                exact = queries[j : j + 1].distances()
            else:
                exact = queries.some_distances(j, near)[None]
            (found[j],), (chosen,) = smallest_k(exact, k)
            slots[j], n_exact_distances[j] = near[chosen], len(near)
        return found, slots, n_exact_distances, certificate

    def guarantee(self, request: Request) -> Certificate:
        """Guarantee eps if the sketches suffice, else the worst direction's error."""
        count, rows, k = request.sketch.matrices.shape
        n, eps = request.points.size, request.eps
        _, _, sampled = self.sizes(request)
        worst = n * worst_failure(count, rows, sampled, k, eps)
        bias = math.sqrt(k / (count * rows))
        few = n * median_failure(rows, sampled, max(eps - bias, 0))
        if worst <= request.delta:
            source = (
                "safe in every direction: one can mislead "
                f"{misled(count, rows, k, eps)} of {count} sketches, and a median of "
                f"{sampled} fails with a majority of them"
            )
            return Certificate(eps, worst, "relative", source)
        is_root = self.queries is not None and count**2 >= self.queries
        if is_root and few <= request.delta:
            source = (
                f"at most {self.queries} adaptive queries: L = {count} is its root, "
                f"and eps has room for the bias sqrt(k / (L m)) = {bias:.3g}"
            )
            return Certificate(eps, few, "relative", source)
        # the failure that the median has anyway needs no larger error to be covered
        failure = n * median_failure(rows, sampled, eps)
        failure = failure if request.delta < failure < 0.5 else request.delta
        error = worst_error(count, rows, sampled, k, failure / n)
        source = (
            f"eps = {eps:g} is not claimed for adaptive queries: one direction can "
            f"mislead {misled(count, rows, k, eps)} of {count} sketches, of which a "
            f"median of {sampled} is taken; its error is at most {error:.3g}"
        )
        return Certificate(error, failure, "relative", source)
