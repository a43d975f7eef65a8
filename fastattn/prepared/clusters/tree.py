r"""A tree of clusters and leaves, for few queries over many keys (decoding).

The weights of a block of queries in ``Multipole`` cost a pass over all keys, which is
too much for a single query. Here moments of clusters, and of their leaves of some 16
keys, are summed once. For a query :math:`q`, a cluster :math:`C` of :math:`|C|` keys
with mean :math:`\mu`, mean value :math:`\bar v` and logit variance :math:`z` (of
:math:`q \cdot k` within the cluster) is approximated as if its logits were normal,

.. math:: \sum_{j \in C} e^{q \cdot k_j} v_j \approx |C|\, e^{q \cdot \mu + z / 2}\,
    \bar v,

if its estimated error is below ``threshold``; else its leaves are tried in the same
way, and else the keys of the leaf are attended to exactly (``multipole_rows``). The
threshold is chosen on some of the queries given to ``prepare`` and checked on others;
held-out queries give the certificate. For treecodes see Barnes and Hut, Nature 324,
446-449 (1986).
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fastattn._ops.clusters import partition
from fastattn._ops.multipole_rows import multipole_rows, summarise
from fastattn.certificates.certify import recompute_rows
from fastattn.certificates.ratio_estimate import Margin, RatioEstimate
from fastattn.certificates.sampled import SampledError
from fastattn.costs.policy import POLICY
from fastattn.costs.power_law import PowerLaw
from fastattn.costs.rates import rates
from fastattn.costs.work import exact_work
from fastattn.prepared.held_out import MARGINS, HeldOutQueries, QuerySplit
from fastattn.prepared.kv_buffer import KVBuffer, bytes_of
from fastattn.problem.head import Head, gather_rows
from fastattn.problem.partial_softmax import merge_partials
from sketching._lib.arrays import Array, array_namespace, device_of, to_host

# the largest error among the checked queries is added this many times
_UNSEEN = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Keys in clusters, clusters in leaves, and the moments of both.

    Parameters
    ----------
    first, start : integer arrays, shapes (C + 1,), (B + 1,)
        Cluster ``c`` has the leaves ``first[c]`` to ``first[c + 1] - 1``, leaf ``b``
        the keys ``start[b]`` to ``start[b + 1] - 1``; on the host.
    value_center : array, shape (p,)
        Mean of the values when the tree was made.
    clusters, leaves : array, shapes (C, 3 d + p + 3), (B, 3 d + p + 3)
        Moments of clusters and of leaves, as ``summarise`` returns them.
    """

    first: Array
    start: Array
    value_center: Array
    clusters: Array
    leaves: Array

    @staticmethod
    def of(
        key: Array,
        value: Array,
        scaled: Array,
        cuts: Array | None = None,
        value_center: Array | None = None,
    ) -> tuple[Array, "Tree"]:
        """Partition keys, or their clusters ``cuts``; returns the new order first."""
        policy = POLICY.tree
        xp, m = array_namespace(key), key.shape[0]
        order = xp.arange(m, device=device_of(key))
        if cuts is None:
            order, cuts = partition(
                scaled,
                parts=-(-m // policy.cluster),
                least=policy.leaf,
                most=2 * policy.cluster,
            )
            scaled = xp.take(scaled, order, axis=0)
        parts, start, first = [], [0], [0]
        for lo, hi in pairwise(cuts):
            own, ends = partition(
                scaled[lo:hi, :],
                parts=-(-(hi - lo) // policy.leaf),
                least=1,
                most=2 * policy.leaf,
            )
            parts.append(order[lo:hi][own])
            start.extend(lo + ends[1:])
            first.append(len(start) - 1)
        order = xp.concat(parts)
        key, value = (xp.take(x, order, axis=0) for x in (key, value))
        value_center = xp.mean(value, axis=0) if value_center is None else value_center
        whole, fine = np.asarray(cuts), np.asarray(start)
        sums = [summarise(key, value, value_center, start=x) for x in (whole, fine)]
        return order, Tree(np.asarray(first), fine, value_center, *sums)

    @property
    def count(self) -> int:
        """Number of keys."""
        return int(self.start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        sums = self.value_center, self.clusters, self.leaves
        return sum(map(bytes_of, sums)) + int(self.first.nbytes + self.start.nbytes)

    def merge(self, other: "Tree") -> "Tree":
        """Append the clusters and leaves of another tree."""
        xp = array_namespace(self.clusters)
        return Tree(
            np.concatenate([self.first, self.first[-1] + other.first[1:]]),
            np.concatenate([self.start, self.start[-1] + other.start[1:]]),
            self.value_center,
            xp.concat([self.clusters, other.clusters]),
            xp.concat([self.leaves, other.leaves]),
        )

    def evaluate(
        self, query: Array, buffer: KVBuffer, threshold: float
    ) -> tuple[Array, Array, Array, Array]:
        """Run ``multipole_rows`` over the keys of the tree."""
        found: tuple[Array, Array, Array, Array] = multipole_rows(
            query,
            buffer.keys[: self.count, :],
            buffer.values[: self.count, :],
            self.clusters,
            self.leaves,
            first=self.first,
            start=self.start,
            threshold=threshold,
        )
        return found


@dataclass(frozen=True, slots=True, eq=False)
class RowField:
    """A tree over the keys, with a threshold that meets a tolerance.

    Queries and keys are in balanced coordinates. There is no tree where it is slower
    than exact attention, or misses the tolerance.

    Parameters
    ----------
    held_out : HeldOutQueries
        What the certificate rests on.
    queries : array, shape (k, d)
        Queries to choose the threshold, then queries to check it.
    tree : Tree or None
        Over the first keys; the rest is attended to exactly.
    threshold : float
        Of ``multipole_rows``.
    limit : float
        Rows with a larger estimated error are computed exactly.
    work : float
        Multiply-adds of a row.
    checked : float
        The error of the checked queries, with its margin.
    sampled : SampledError or None
        The certified error, computed once for all queries.
    """

    held_out: HeldOutQueries
    queries: Array
    tree: Tree | None = None
    threshold: float = 0.0
    limit: float = 0.0
    work: float = 0.0
    checked: float = 0.0
    sampled: SampledError | None = None

    @staticmethod
    def of(
        head: Head, to_query: Array, tol: float, rng: np.random.Generator
    ) -> "RowField | None":
        """Hold out queries; None if there are too few to choose and to certify."""
        policy = POLICY.tree
        if head.sizes[0] < 2 * POLICY.prepared.fewest_queries:
            return None
        split, xp, p = QuerySplit.of(head, rng), head.xp, head.sizes[3]
        some = rng.permutation(split.rest.shape[0])[: policy.trial + policy.check]
        rest = gather_rows(split.rest, some)
        held_out, rest = (
            xp.matmul(xp.astype(x, to_query.dtype, copy=False), to_query)
            for x in (split.held_out, rest)
        )
        split = replace(split, held_out=held_out)
        return RowField(HeldOutQueries.of(split, p, 1.0, tol, MARGINS[0]), rest)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        own = self.held_out.nbytes + bytes_of(self.queries)
        return own if self.tree is None else own + self.tree.nbytes

    def empty(self) -> "RowField":
        """Return the same without keys and without a tree."""
        held_out = replace(self.held_out.empty(), margin=MARGINS[0])
        return RowField(held_out, self.queries)

    def clustered(
        self, buffer: KVBuffer, cuts: Array, metric: Array
    ) -> tuple["RowField", KVBuffer]:
        """Make a tree over clustered keys, which stay within their clusters."""
        none = self.empty()
        if buffer.count < POLICY.tree.fewest_keys:
            return none, buffer
        order, tree = Tree.of(
            buffer.key, buffer.value, _scaled(buffer.key, metric), cuts
        )
        buffer = _ordered(buffer, order)
        held_out = none.held_out.with_summed(buffer.key, buffer.value)
        found = RowField(held_out, self.queries, tree)
        truth, _ = Head(self.queries, buffer.key, buffer.value, 1.0).attend()
        tol = aim = self.held_out.tol
        for margin in MARGINS:
            found = found._tried(buffer, to_host(truth), POLICY.tree.aim * aim)
            if not found.is_faster(1, buffer):
                break
            found = found._checked(buffer, to_host(truth), margin)
            found = replace(
                found, held_out=replace(held_out, margin=margin)
            )._predict_held_out(buffer)
            assert found.sampled is not None
            if found.sampled.upper <= tol:
                return found, buffer
            aim *= POLICY.prepared.retarget * tol / found.sampled.upper
        return none, buffer

    def inserted(
        self, buffer: KVBuffer, count: int, metric: Array
    ) -> tuple["RowField", KVBuffer]:
        """Add ``count`` keys at the end to the tail; move a long tail into the tree."""
        policy = POLICY.tree
        if self.tree is None:
            return self, buffer
        last = buffer.count - count
        key, value = buffer.key[last:, :], buffer.value[last:, :]
        held_out, end = self.held_out.with_buffered(key, value), self.tree.count
        if buffer.count - end <= max(policy.tail, policy.tail_share * buffer.count):
            return replace(self, held_out=held_out).with_error_estimate(), buffer
        xp, key = array_namespace(buffer.keys), buffer.key[end:, :]
        order, tree = Tree.of(
            key,
            buffer.value[end:, :],
            _scaled(key, metric),
            value_center=self.tree.value_center,
        )
        # not in place: earlier structures share the buffer
        before = xp.arange(end, device=device_of(key))
        buffer = _ordered(buffer, xp.concat([before, end + order]))
        grown = replace(self, tree=self.tree.merge(tree), held_out=held_out.fold())
        return grown._predict_held_out(buffer), buffer

    def is_faster(self, n: int, buffer: KVBuffer) -> bool:
        """Whether ``n`` rows are predicted to be faster than exact attention."""
        m, p = buffer.value.shape
        exact = exact_work(n + POLICY.tree.reading_rows, m, buffer.keys.shape[1], p)
        return n * POLICY.tree.rate * self.work <= POLICY.time_share * exact

    def serves(self, n: int, buffer: KVBuffer) -> bool:
        """Whether ``n`` rows are answered by the tree: within ``tol`` and faster."""
        if self.tree is None or self.sampled is None:
            return False
        return self.sampled.upper <= self.held_out.tol and self.is_faster(n, buffer)

    def answer(
        self, query: Array, buffer: KVBuffer
    ) -> tuple[Array, Array, SampledError] | None:
        """Outputs, log-sum-exps and certified error; None if not ``serves``."""
        if not self.serves(query.shape[0], buffer):
            return None
        assert self.tree is not None
        assert self.sampled is not None
        end, found = self.tree.count, self._summed(query, buffer)
        if end < buffer.count:
            tail = Head(query, buffer.key[end:, :], buffer.value[end:, :], 1.0)
            found = merge_partials(found, tail.attend())
        xp = array_namespace(query)
        # logits that overflow need a wider precision
        if not all(bool(xp.all(xp.isfinite(x))) for x in found):
            return None
        return *found, self.sampled

    def with_error_estimate(self) -> "RowField":
        """Set the certified error by held-out queries; at least ``checked``."""
        found = self.held_out.error()
        text = (
            f"{found.source}; {self.queries.shape[0] - POLICY.tree.trial} other queries"
        )
        text = f"{text} showed {self.checked:.2e} when the keys were clustered"
        upper = max(found.upper, self.checked)
        return replace(self, sampled=replace(found, upper=upper, source=text))

    def _summed(self, query: Array, buffer: KVBuffer) -> tuple[Array, Array]:
        """Answers over the keys of the tree; rows above ``limit`` are recomputed."""
        assert self.tree is not None
        end = self.tree.count
        value, logarithm, row_error, _ = self.tree.evaluate(
            query, buffer, self.threshold
        )
        # NaN exceeds every limit
        rows = np.flatnonzero(~(to_host(row_error) <= self.limit))
        if len(rows):
            head = Head(query, buffer.key[:end, :], buffer.value[:end, :], 1.0)
            value, logarithm = recompute_rows(head, value, logarithm, rows)
        return value, logarithm

    def _predict_held_out(self, buffer: KVBuffer) -> "RowField":
        """Update the outputs of the tree for the held-out queries."""
        value, logarithm = self._summed(self.held_out.query, buffer)
        every = np.ones(value.shape[0], bool)
        return replace(
            self, held_out=self.held_out.update_predictions(value, logarithm, every)
        ).with_error_estimate()

    def _tried(self, buffer: KVBuffer, truth: Array, aim: float) -> "RowField":
        """Choose the threshold whose error is ``aim``."""
        policy = POLICY.tree
        assert self.tree is not None
        query, truth = self.queries[: policy.trial, :], truth[: policy.trial]
        unit = float(np.sqrt(np.mean(to_host(self.tree.clusters)[:, -3] ** 2))) or 1.0
        size, threshold = float(np.linalg.norm(truth)), policy.typical
        for _ in range(policy.tries):
            value, _, row_error, counts = self.tree.evaluate(
                query, buffer, unit * threshold
            )
            error = float(np.linalg.norm(to_host(value) - truth)) / (size or 1.0)
            tried = threshold
            law = PowerLaw(tried, max(error, 1e-9), policy.slope)
            threshold = min(max(law.solve(aim), policy.smallest), policy.largest)
            if aim / policy.close <= error <= aim or threshold == tried:
                break
        leaves, near = counts.mean(axis=0)
        d, p, softmax = buffer.keys.shape[1], truth.shape[1], rates().softmax
        work = (len(self.tree.first) - 1 + leaves) * (3 * d + p + softmax)
        work += near * (d + p + softmax)
        limit = policy.outlying * float(to_host(row_error).max())
        return replace(self, threshold=unit * tried, limit=limit, work=float(work))

    def _checked(self, buffer: KVBuffer, truth: Array, margin: float) -> "RowField":
        """Check the threshold on queries other than those that it was chosen on.

        Few rows may have most of the error: held-out queries alone may miss them.
        """
        policy = POLICY.tree
        truth = truth[policy.trial :].astype(np.float64)
        value, _ = self._summed(self.queries[policy.trial :, :], buffer)
        squares = np.sum((to_host(value) - truth) ** 2, axis=1)
        sizes = np.sum(truth**2, axis=1)
        # the population, queries to come, is infinite: no finite-population factor
        found = RatioEstimate(squares, math.inf, sizes=sizes)
        checked = (
            math.sqrt(found.upper_ratio(Margin(margin, _UNSEEN)))
            if squares.any()
            else 0.0
        )
        return replace(self, checked=checked)


def _scaled(key: Array, metric: Array) -> Array:
    xp = array_namespace(key)
    return key * xp.asarray(np.sqrt(metric), dtype=key.dtype, device=device_of(key))


def _ordered(buffer: KVBuffer, order: Array) -> KVBuffer:
    xp = array_namespace(buffer.keys)
    key, value = (xp.take(x, order, axis=0) for x in (buffer.key, buffer.value))
    return KVBuffer(key, value, buffer.count)
