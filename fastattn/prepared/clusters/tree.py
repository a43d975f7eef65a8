"""Few rows over clustered keys: what a tree of clusters and leaves says, and its worth.

Decoding asks one query at a time. What blocks of queries share, a weight for every key,
does not pay for one; moments of the clusters, summed once, do. Probes, queries with
their exact answers, say what the answers are worth.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fastattn._ops.clusters import partition
from fastattn._ops.multipole_rows import multipole_rows, summarise
from fastattn.certificates.certify import mend
from fastattn.certificates.ratio_estimate import Margin, RatioEstimate
from fastattn.certificates.sampled import SampledError
from fastattn.costs.rates import rates
from fastattn.costs.work import exact_work
from fastattn.prepared.held_out import FEWEST_QUERIES, MARGINS, Probes, Split
from fastattn.prepared.kv_buffer import Kept, bytes_of
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import join
from sketching._lib.arrays import Array, array_namespace, device_of, to_host

# keys of a leaf, and of a cluster of recent keys
_LEAF, _CLUSTER = 16, 128
# fewer keys are read faster than a tree is asked
FEWEST_KEYS = 8192
# recent keys go into the tree once they are so many and this share of all
_TAIL, _SHARE = 1024, 1 / 64
# rows must be predicted to take at most this share of exact attention's time
_WORTH = 0.8
# multiply-adds of a product that one of a row takes, and rows of exact attention that
# take as long as reading the keys
_RATE, _READ = 8.5, 4
# queries that a threshold is chosen on, and others that it is checked on
_TRIAL, _CHECK = 128, 512
# a threshold to start with, in units of how far the values of a cluster spread; the
# error is about this power of it
_TYPICAL, _SLOPE, _TRIES = 0.005, 0.6, 4
_SMALLEST, _LARGEST = 1e-7, 1.0
# the share of the tolerance that the trial aims at, and how near below is near enough
_AIM, _CLOSE = 0.7, 1.3
# of another look where the probes missed the tolerance
_LESS = 0.85
# rows whose error is guessed to be so many times the largest of a trial are exact
_OUTLYING = 4.0
# the largest of the queries that a threshold is checked on is added so many times
_UNSEEN = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Keys cut into clusters, and these into leaves, with what rows ask of both.

    Parameters
    ----------
    first, start : integer arrays, shapes (C + 1,), (B + 1,)
        Leaves of the clusters and keys of the leaves; on the host.
    middle : array, shape (p,)
        Mean of the values when the tree was planted.
    clusters, leaves : array, shapes (C, 3 d + p + 3), (B, 3 d + p + 3)
        What ``summarise`` says of them.
    """

    first: Array
    start: Array
    middle: Array
    clusters: Array
    leaves: Array

    @staticmethod
    def of(
        key: Array,
        value: Array,
        scaled: Array,
        cuts: Array | None = None,
        middle: Array | None = None,
    ) -> tuple[Array, "Tree"]:
        """Cut keys, or the clusters ``cuts`` of them; returns their new order too."""
        xp, m = array_namespace(key), key.shape[0]
        order = xp.arange(m, device=device_of(key))
        if cuts is None:
            order, cuts = partition(
                scaled, parts=-(-m // _CLUSTER), least=_LEAF, most=2 * _CLUSTER
            )
            scaled = xp.take(scaled, order, axis=0)
        parts, start, first = [], [0], [0]
        for lo, hi in pairwise(cuts):
            own, ends = partition(
                scaled[lo:hi, :], parts=-(-(hi - lo) // _LEAF), least=1, most=2 * _LEAF
            )
            parts.append(order[lo:hi][own])
            start.extend(lo + ends[1:])
            first.append(len(start) - 1)
        order = xp.concat(parts)
        key, value = (xp.take(x, order, axis=0) for x in (key, value))
        middle = xp.mean(value, axis=0) if middle is None else middle
        whole, fine = np.asarray(cuts), np.asarray(start)
        sums = [summarise(key, value, middle, start=x) for x in (whole, fine)]
        return order, Tree(np.asarray(first), fine, middle, *sums)

    @property
    def count(self) -> int:
        """Number of keys."""
        return int(self.start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        sums = self.middle, self.clusters, self.leaves
        return sum(map(bytes_of, sums)) + int(self.first.nbytes + self.start.nbytes)

    def join(self, other: "Tree") -> "Tree":
        """Put another tree's keys behind these."""
        xp = array_namespace(self.clusters)
        return Tree(
            np.concatenate([self.first, self.first[-1] + other.first[1:]]),
            np.concatenate([self.start, self.start[-1] + other.start[1:]]),
            self.middle,
            xp.concat([self.clusters, other.clusters]),
            xp.concat([self.leaves, other.leaves]),
        )

    def ask(
        self, query: Array, kept: Kept, threshold: float
    ) -> tuple[Array, Array, Array, Array]:
        """What ``multipole_rows`` says of the keys of the tree."""
        found: tuple[Array, Array, Array, Array] = multipole_rows(
            query,
            kept.keys[: self.count, :],
            kept.values[: self.count, :],
            self.clusters,
            self.leaves,
            first=self.first,
            start=self.start,
            threshold=threshold,
        )
        return found


@dataclass(frozen=True, slots=True, eq=False)
class RowField:
    """A tree over the keys, with the threshold that keeps a tolerance on probes.

    Queries and keys are in balanced coordinates. There is no tree where it does not
    pay, or misses the tolerance.

    Parameters
    ----------
    probes : Probes
        What the certificate rests on.
    queries : array, shape (k, d)
        What the threshold is chosen on, then what it is checked on.
    tree : Tree or None
        Over the first keys; the others are answered exactly.
    threshold : float
        Of ``multipole_rows``.
    limit : float
        Rows whose error is guessed to exceed it are computed exactly.
    work : float
        Multiply-adds of a row.
    checked : float
        The error that the check showed, with its margin.
    sampled : SampledError or None
        What is certified now: a query has no time to ask the probes.
    """

    probes: Probes
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
        """Hold out probes; None where queries are too few to choose and certify by."""
        if head.sizes[0] < 2 * FEWEST_QUERIES:
            return None
        split, xp, p = Split.of(head, rng), head.xp, head.sizes[3]
        some = rng.permutation(split.rest.shape[0])[: _TRIAL + _CHECK]
        rest = xp.take(split.rest, xp.asarray(some, device=device_of(to_query)), axis=0)
        probes, rest = (
            xp.matmul(xp.astype(x, to_query.dtype, copy=False), to_query)
            for x in (split.probes, rest)
        )
        split = replace(split, probes=probes)
        return RowField(Probes.of(split, p, 1.0, tol, MARGINS[0]), rest)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        own = self.probes.nbytes + bytes_of(self.queries)
        return own if self.tree is None else own + self.tree.nbytes

    def empty(self) -> "RowField":
        """Forget the keys."""
        probes = replace(self.probes.empty(), margin=MARGINS[0])
        return RowField(probes, self.queries)

    def clustered(
        self, kept: Kept, cuts: Array, metric: Array
    ) -> tuple["RowField", Kept]:
        """Plant a tree over clustered keys, which stay within their clusters."""
        none = self.empty()
        if kept.count < FEWEST_KEYS:
            return none, kept
        order, tree = Tree.of(kept.key, kept.value, _scaled(kept.key, metric), cuts)
        kept = _ordered(kept, order)
        probes = none.probes.with_summed(kept.key, kept.value)
        found = RowField(probes, self.queries, tree)
        truth, _ = Head(self.queries, kept.key, kept.value, 1.0).attend()
        tol = aim = self.probes.tol
        for margin in MARGINS:
            found = found._tried(kept, to_host(truth), _AIM * aim)
            if not found.pays(1, kept):
                break
            found = found._checked(kept, to_host(truth), margin)
            found = replace(found, probes=replace(probes, margin=margin))._told(kept)
            assert found.sampled is not None
            if found.sampled.upper <= tol:
                return found, kept
            aim *= _LESS * tol / found.sampled.upper
        return none, kept

    def inserted(
        self, kept: Kept, count: int, metric: Array
    ) -> tuple["RowField", Kept]:
        """Take note of ``count`` new keys at the end, or move all recent ones in."""
        if self.tree is None:
            return self, kept
        last = kept.count - count
        key, value = kept.key[last:, :], kept.value[last:, :]
        probes, end = self.probes.with_kept(key, value), self.tree.count
        if kept.count - end <= max(_TAIL, _SHARE * kept.count):
            return replace(self, probes=probes).judged(), kept
        xp, key = array_namespace(kept.keys), kept.key[end:, :]
        order, tree = Tree.of(
            key, kept.value[end:, :], _scaled(key, metric), middle=self.tree.middle
        )
        # not in place: who has the keys as they were must not find others
        before = xp.arange(end, device=device_of(key))
        kept = _ordered(kept, xp.concat([before, end + order]))
        grown = replace(self, tree=self.tree.join(tree), probes=probes.fold())
        return grown._told(kept), kept

    def pays(self, n: int, kept: Kept) -> bool:
        """Whether ``n`` rows are predicted to take less than exact attention."""
        m, p = kept.value.shape
        exact = exact_work(n + _READ, m, kept.keys.shape[1], p)
        return n * _RATE * self.work <= _WORTH * exact

    def serves(self, n: int, kept: Kept) -> bool:
        """Whether ``n`` rows are answered, within the tolerance and in less time."""
        if self.tree is None or self.sampled is None:
            return False
        return self.sampled.upper <= self.probes.tol and self.pays(n, kept)

    def answer(
        self, query: Array, kept: Kept
    ) -> tuple[Array, Array, SampledError] | None:
        """Answer rows, and say what that is worth; None where they are not served."""
        if not self.serves(query.shape[0], kept):
            return None
        assert self.tree is not None
        assert self.sampled is not None
        end, found = self.tree.count, self._summed(query, kept)
        if end < kept.count:
            tail = Head(query, kept.key[end:, :], kept.value[end:, :], 1.0)
            found = join(found, tail.attend())
        xp = array_namespace(query)
        # logits that overflow are for a wider precision
        if not all(bool(xp.all(xp.isfinite(x))) for x in found):
            return None
        return *found, self.sampled

    def judged(self) -> "RowField":
        """Ask the probes what answers are worth; never less than the check showed."""
        found = self.probes.error()
        text = f"{found.source}; {self.queries.shape[0] - _TRIAL} other queries"
        text = f"{text} showed {self.checked:.2e} when the keys were clustered"
        upper = max(found.upper, self.checked)
        return replace(self, sampled=replace(found, upper=upper, source=text))

    def _summed(self, query: Array, kept: Kept) -> tuple[Array, Array]:
        """Answers over the keys of the tree; rows in doubt are computed exactly."""
        assert self.tree is not None
        end = self.tree.count
        value, logarithm, doubt, _ = self.tree.ask(query, kept, self.threshold)
        # NaN is in doubt too
        rows = np.flatnonzero(~(to_host(doubt) <= self.limit))
        if len(rows):
            head = Head(query, kept.key[:end, :], kept.value[:end, :], 1.0)
            value, logarithm = mend(head, value, logarithm, rows)
        return value, logarithm

    def _told(self, kept: Kept) -> "RowField":
        """Ask the tree for its answers to the probes."""
        value, logarithm = self._summed(self.probes.query, kept)
        every = np.ones(value.shape[0], bool)
        return replace(self, probes=self.probes.told(value, logarithm, every)).judged()

    def _tried(self, kept: Kept, truth: Array, aim: float) -> "RowField":
        """Choose the threshold whose error is ``aim``."""
        assert self.tree is not None
        query, truth = self.queries[:_TRIAL, :], truth[:_TRIAL]
        unit = float(np.sqrt(np.mean(to_host(self.tree.clusters)[:, -3] ** 2))) or 1.0
        size, threshold = float(np.linalg.norm(truth)), _TYPICAL
        for _ in range(_TRIES):
            value, _, doubt, counts = self.tree.ask(query, kept, unit * threshold)
            error = float(np.linalg.norm(to_host(value) - truth)) / (size or 1.0)
            tried = threshold
            change = (aim / max(error, 1e-9)) ** (1 / _SLOPE)
            threshold = min(max(threshold * change, _SMALLEST), _LARGEST)
            if aim / _CLOSE <= error <= aim or threshold == tried:
                break
        leaves, near = counts.mean(axis=0)
        d, p, softmax = kept.keys.shape[1], truth.shape[1], rates().softmax
        work = (len(self.tree.first) - 1 + leaves) * (3 * d + p + softmax)
        work += near * (d + p + softmax)
        limit = _OUTLYING * float(to_host(doubt).max())
        return replace(self, threshold=unit * tried, limit=limit, work=float(work))

    def _checked(self, kept: Kept, truth: Array, margin: float) -> "RowField":
        """Check the threshold on queries that it was not chosen on.

        A few rows may hold most of the error: probes alone are too few to meet them.
        """
        truth = truth[_TRIAL:].astype(np.float64)
        value, _ = self._summed(self.queries[_TRIAL:, :], kept)
        squares = np.sum((to_host(value) - truth) ** 2, axis=1)
        sizes = np.sum(truth**2, axis=1)
        # queries to come are like these: none of them is one of these
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


def _ordered(kept: Kept, order: Array) -> Kept:
    xp = array_namespace(kept.keys)
    key, value = (xp.take(x, order, axis=0) for x in (kept.key, kept.value))
    return Kept(key, value, kept.count)
