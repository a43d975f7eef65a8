"""Clusters of keys and values, and blocks of similar queries.

In balanced coordinates queries and keys have the same mean square ``s_l`` in each
coordinate ``l``. The distance of two keys with coordinates scaled by ``sqrt(s_l)`` is
then the root mean square difference of their logits over the queries.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._ops.clusters import partition, regroup
from fastattn._ops.multipole import BlockStatistics, describe, multipole
from fastattn.costs.policy import POLICY
from fastattn.problem.head import gather_rows
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, compute_dtype, mover, to_host
from sketching._lib.certificate import RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Queries in balanced coordinates, cut into blocks of similar ones.

    Parameters
    ----------
    query : array, shape (n, d)
        Block ``r`` has the rows from ``cuts[r]`` up to ``cuts[r + 1]``.
    cuts : integer array, shape (R + 1,)
        Block boundaries, on the host.
    statistics : BlockStatistics
        Mean, mean squares of the coordinates about the mean, and sample rows of each
        block, of shapes (R, d), (R, d) and (R, s, d).
    order : integer array, shape (n,)
        Indices of the rows before they were sorted.
    """

    query: Array
    cuts: Array
    statistics: BlockStatistics
    order: Array

    def subsample(
        self, some: Array, sizes: Array, rng: np.random.Generator
    ) -> "Blocks":
        """Draw ``sizes`` rows of the blocks ``some``; keep the blocks' descriptions."""
        cuts = self.cuts
        rows = np.concatenate(
            [
                cuts[r]
                + np.sort(rng.choice(cuts[r + 1] - cuts[r], size, replace=False))
                for r, size in zip(some, sizes, strict=True)
            ]
        )
        statistics = BlockStatistics(*(gather_rows(x, some) for x in self.statistics))
        query, order = (gather_rows(x, rows) for x in (self.query, self.order))
        return Blocks(query, np.cumsum([0, *sizes]), statistics, order)


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Keys and values, sorted so that clusters are contiguous.

    Parameters
    ----------
    key, value : array, shapes (m, d) and (m, p)
        Keys in balanced coordinates, and their values.
    start : integer array, shape (C + 1,)
        Cluster ``c`` has the keys from ``start[c]`` up to ``start[c + 1]``; on the
        host.
    group : integer array, shape (C,)
        Group of each cluster, not decreasing; the clusters of a group share their
        first moments; on the host.
    to_query, offset : array, shapes (d, d) and (d,)
        A query times the matrix is in balanced coordinates; a query times ``offset`` is
        its logit with the mean key.
    metric : array, shape (d,)
        Mean square of each coordinate.
    order : integer array, shape (m,), optional
        Indices of the keys before they were sorted.
    low_precision : str
        Precision of the matmuls of near keys, "int8" or "bfloat16"; empty for full
        precision.
    """

    key: Array
    value: Array
    start: Array
    group: Array
    to_query: Array
    offset: Array
    metric: Array
    order: Array | None = None
    low_precision: str = ""

    @staticmethod
    def of(
        key: Array,
        value: Array,
        transform: Transform,
        scale: float,
        *,
        clusters: int,
        groups: int,
    ) -> "Clusters":
        """Cluster the keys by recursive halving and one round of k-means."""
        xp = array_namespace(key)
        dtype = compute_dtype(xp, key.dtype)
        move = mover(key, dtype)
        key = xp.astype(key, dtype, copy=False) - move(transform.key_center)
        key = xp.matmul(key, move(transform.key_map))
        metric = move(transform.scales)
        scaled = key * xp.sqrt(metric)
        order, start = partition(scaled, parts=clusters, least=2, most=key.shape[0])
        order, start = regroup(scaled, order, start=start)
        order, start, group = _by_group(scaled, order, start, groups)
        return Clusters(
            xp.take(key, order, axis=0),
            xp.astype(xp.take(value, order, axis=0), dtype, copy=False),
            start,
            group,
            move(transform.query_map),
            move(scale * transform.key_center),
            metric,
            order,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.key, self.value, self.to_query, self.offset, self.metric)
        size = sum(int(math.prod(x.shape)) for x in arrays)
        bits = array_namespace(self.key).finfo(self.key.dtype).bits
        numbers = [x for x in (self.start, self.group, self.order) if x is not None]
        return size * int(bits) // 8 + sum(int(x.nbytes) for x in numbers)

    def arrange(self, query: Array, size: int) -> Blocks:
        """Sort queries into blocks of about ``size`` similar ones.

        Raises
        ------
        RefusalError
            If sums of weights may overflow or underflow.
        """
        xp, n = array_namespace(query), query.shape[0]
        query = xp.matmul(xp.astype(query, self.key.dtype, copy=False), self.to_query)
        _check_in_range(query, self.key)
        scaled = query * xp.sqrt(self.metric)
        order, cuts = partition(
            scaled,
            parts=-(-n // size),
            least=max(1, min(size // 4, n // 2)),
            most=2 * size,
        )
        for _ in range(POLICY.multipole.rounds):
            order, cuts = regroup(scaled, order, start=cuts)
        query = xp.take(query, order, axis=0)
        statistics = describe(query, cuts=cuts, rows=POLICY.multipole.sampled_rows)
        return Blocks(query, cuts, BlockStatistics(*statistics), order)

    def cluster_logit_variance(self, blocks: Blocks) -> float:
        """Mean square of ``(q - block mean) . (k - cluster mean)`` over all pairs.

        Above one the expansion about the centers is poor, and a few rows may hold most
        of the error.
        """
        xp = array_namespace(self.key)
        _, local, _ = describe(self.key, cuts=self.start, rows=1)
        logits = to_host(
            xp.matmul(blocks.statistics.square, xp.matrix_transpose(local))
        )
        share = np.diff(blocks.cuts) / blocks.cuts[-1]
        return float(share @ logits @ np.diff(self.start)) / int(self.start[-1])

    def answer(
        self, blocks: Blocks, threshold: float
    ) -> tuple[Array, Array, Array, Any]:
        """Call the op ``multipole`` for sorted queries."""
        answer: tuple[Array, Array, Array, Any] = multipole(
            blocks.query,
            blocks.statistics,
            self.key,
            self.value,
            self.metric,
            cuts=blocks.cuts,
            start=self.start,
            group=self.group,
            threshold=threshold,
            low_precision=self.low_precision,
        )
        return answer

    def query(
        self, query: Array, threshold: float, blocks: Blocks
    ) -> tuple[Array, Array, Array, Array]:
        """Compute the output of queries.

        Returns
        -------
        value : array, shape (n, p)
        log_normalizer : array, shape (n,)
            Log-sum-exps of the logits, centring undone.
        reliable : boolean array, shape (n,)
            False for rows that must be recomputed exactly: sums that are not finite, or
            estimated errors far above the others.
        error_profile : array, shape (n,)
            Estimated squared errors of the rows up to a common factor.
        """
        xp = array_namespace(query)
        value, logarithm, error, counts = self.answer(blocks, threshold)
        near = float(np.average(counts[:, 0], weights=np.diff(blocks.cuts)))
        limit = largest_row_error(error, near / self.key.shape[0])
        reliable = xp.logical_and(xp.isfinite(logarithm), error <= limit)
        back = xp.argsort(blocks.order)
        value, logarithm, reliable, error = (
            xp.take(x, back, axis=0) for x in (value, logarithm, reliable, error)
        )
        query = xp.astype(query, self.key.dtype, copy=False)
        return value, logarithm + xp.matmul(query, self.offset), reliable, error


def sampled_logit_variance(
    query: Array, key: Array, transform: Transform, blocks: int, clusters: int
) -> float:
    """Estimate ``cluster_logit_variance`` from a few queries and keys, in NumPy."""
    metric, squares = np.sqrt(transform.scales).astype(np.float32), []
    key = (key - transform.key_center) @ transform.key_map
    for rows, parts in ((query @ transform.query_map, blocks), (key, clusters)):
        x = rows.astype(np.float32)
        order, cuts = partition(x * metric, parts=parts, least=2, most=len(x))
        _, square, _ = describe(x[order], cuts=cuts, rows=1)
        # the degrees of freedom of so many means: few rows are close to their own mean
        squares.append(np.diff(cuts) @ square / max(1, len(x) - len(square)))
    return float(squares[0] @ squares[1])


def largest_row_error(error: Array, near: float) -> float:
    """Return the estimated squared error above which rows are unreliable.

    The smaller the share ``near`` of near keys, the cheaper are the other rows next to
    an exact one, and the larger must be the error of a row that is recomputed.
    """
    policy = POLICY.multipole
    xp, n = array_namespace(error), error.shape[0]
    # if an estimate is not finite there is no mean to compare with
    mean = float(xp.mean(error))
    most = float(xp.sort(error)[n - 1 - int(policy.most_outliers * n)])
    large = policy.outlying / (near + policy.outlying_more) * mean
    return max(most, large) if math.isfinite(mean) else most


def _by_group(
    x: Array, order: Array, start: Array, groups: int
) -> tuple[Array, Array, Array]:
    """Group the clusters, and sort them so that groups are contiguous."""
    xp = array_namespace(x)
    centre, _, _ = describe(xp.take(x, order, axis=0), cuts=start, rows=1)
    by, cuts = partition(centre, parts=groups, least=1, most=len(start))
    parts = [order[start[c] : start[c + 1]] for c in to_host(by)]
    start = np.cumsum([0, *(part.shape[0] for part in parts)])
    return xp.concat(parts), start, np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))


def _check_in_range(query: Array, key: Array) -> None:
    """Raise ``RefusalError`` if squares of logits may overflow."""
    xp = array_namespace(query, key)
    longest = [float(xp.max(xp.sum(x**2, axis=1))) ** 0.5 for x in (query, key)]
    limit = float(xp.finfo(key.dtype).max) ** 0.3
    if not math.prod(longest) <= limit:
        raise RefusalError(
            f"logits may be as large as {math.prod(longest):.1e}, too large for "
            f"clusters in {key.dtype}: scale query or key down, or use Exact()"
        )
