"""Clusters of keys prepared for one head, and a tail of recent keys.

Many queries are answered in blocks, a few by a tree over the same clusters.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.certify import certified
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.costs.policy import POLICY
from fastattn.methods.exact import Exact
from fastattn.methods.multipole.clusters import Clusters
from fastattn.prepared.clusters.tree import RowField, Tree
from fastattn.prepared.held_out import pack_held_out, unpack_held_out
from fastattn.prepared.kv_buffer import KVBuffer, bytes_of
from fastattn.prepared.states import Packed
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import merge_partials
from fastattn.problem.plan import ConfiguredMethod, HeadAnswer, Plan
from fastattn.problem.rows import sample_rows
from fastattn.problem.transforms import Transform, balance
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    device_of,
    mover,
    to_host,
)
from sketching._lib.certificate import Certificate, RefusalError


@dataclass(frozen=True, slots=True, eq=False)
class MultipoleHead:
    """All keys in balanced coordinates: clustered keys first, then recent ones.

    Parameters
    ----------
    plan : Plan
        With the threshold of ``Multipole``.
    scale : float
        The factor of the logits.
    transform : Transform
        Coordinates of queries and keys.
    buffer : KVBuffer
        Keys in these coordinates with their values, in the dtype of computation.
    start, group : integer arrays, shapes (C + 1,), (C,)
        As in ``Clusters``, of the keys that are clustered.
    sample : array, shape (k, d)
        Queries that ``certificate`` is about.
    rows : RowField or None
        For batches too small for blocks.
    """

    plan: Plan
    scale: float
    transform: Transform
    buffer: KVBuffer
    start: Array
    group: Array
    sample: Array
    rows: RowField | None

    @staticmethod
    def of(
        plan: Plan, head: Head, sample: Array, tol: float, rng: np.random.Generator
    ) -> "MultipoleHead":
        """Start without keys, in the balanced coordinates of a head."""
        query, key = sample_rows(head, rng)
        transform = balance(query, key, head.scale, queries=False)
        xp, none = head.xp, np.zeros(0, dtype=np.int64)
        like = (xp.astype(x[:0, :], head.dtype) for x in (head.key, head.value))
        buffer = KVBuffer.none(*like)
        zero = np.zeros(1, dtype=np.int64)
        to_query = mover(head.query, head.dtype)(transform.query_map)
        # spawn: the state of rng for later draws does not change
        rows = RowField.of(head, to_query, tol, rng.spawn(1)[0])
        return MultipoleHead(
            plan, head.scale, transform, buffer, zero, none, sample, rows
        )

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.buffer.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        t = self.transform
        own = (t.key_center, t.key_map, t.query_map, t.scales, self.start, self.group)
        small = sum(int(x.nbytes) for x in own)
        small += 0 if self.rows is None else self.rows.nbytes
        return self.buffer.nbytes + bytes_of(self.sample) + small

    def empty(self) -> "MultipoleHead":
        """Return the structure without keys."""
        rows = None if self.rows is None else self.rows.empty()
        cuts = {"start": self.start[:1], "group": self.group[:0]}
        return replace(self, buffer=self.buffer.empty(), rows=rows, **cuts)

    def insert(
        self,
        key: Array,
        value: Array,
        *,
        fold: bool = False,  # noqa: ARG002
    ) -> "MultipoleHead":
        """Add keys to the tail; cluster all keys once the tail is a share of them."""
        xp, dtype = array_namespace(key), self.buffer.keys.dtype
        move = mover(key, dtype)
        key = xp.astype(key, dtype) - move(self.transform.key_center)
        key = xp.matmul(key, move(self.transform.key_map))
        return self._with(key, xp.astype(value, dtype, copy=False))

    def merge(self, other: "MultipoleHead") -> "MultipoleHead":
        """Add the keys of another structure of the same plan."""
        return self._with(other.buffer.key, other.buffer.value)

    def _with(self, key: Array, value: Array) -> "MultipoleHead":
        policy = POLICY.prepared
        buffer, rows = self.buffer.append(key, value), self.rows
        metric = self.transform.scales
        tail = buffer.count - int(self.start[-1])
        if tail <= max(policy.recent_keys, policy.recent_share * buffer.count):
            if rows is not None:
                rows, buffer = rows.inserted(buffer, key.shape[0], metric)
            return replace(self, buffer=buffer, rows=rows)
        # the threshold was chosen for this number of clusters
        count = min(self.plan.method.clusters, buffer.count // 2)
        found = _cluster(buffer, metric, count)
        buffer = KVBuffer(found.key, found.value, buffer.count)
        if rows is not None:
            rows, buffer = rows.clustered(buffer, found.start, metric)
        cuts = {"start": found.start, "group": found.group}
        return replace(self, buffer=buffer, rows=rows, **cuts)

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries in blocks or row by row; where these miss ``tol``, exactly."""
        xp, dtype = array_namespace(query), self.buffer.keys.dtype
        move = mover(query, dtype)
        wide = xp.astype(query, dtype, copy=False)
        turned = xp.matmul(wide, move(self.transform.query_map))
        shift = xp.matmul(wide, move(self.scale * self.transform.key_center))
        head = Head(turned, self.buffer.key, self.buffer.value, 1.0)
        found = None
        if query.shape[0] >= POLICY.prepared.batch and len(self.group):
            found = self._by_clusters(head, tol, rng)
        elif self.rows is not None:
            found = self._by_rows(query, turned)
        if found is None:
            found = Exact().solve(head, tol, guarantee, rng, "few queries")
        value = xp.astype(found.value, query.dtype, copy=False)
        return replace(found, value=value, log_normalizer=found.log_normalizer + shift)

    def _by_clusters(
        self, head: Head, tol: float, rng: np.random.Generator
    ) -> HeadAnswer | None:
        """Answer in blocks; None if that misses ``tol``."""
        configured = ConfiguredMethod(self.plan, self._run, np.inf)
        try:
            found = certified(head, configured, tol, rng)
        except RefusalError:
            return None
        return found if found.error <= tol else None

    def _by_rows(self, query: Array, turned: Array) -> HeadAnswer | None:
        """Answer row by row; None if that is slower or misses ``tol``."""
        assert self.rows is not None
        found = self.rows.answer(turned, self.buffer)
        if found is None:
            return None
        value, logarithm, sampled = found
        # the answer is rounded to the dtype of the query, unlike held-out outputs
        error = sampled.upper + float(array_namespace(query).finfo(query.dtype).eps) / 2
        return HeadAnswer(
            value, logarithm, error, FAILURE, "relative-frobenius", sampled.source,
            self.plan,
        )  # fmt: skip

    def _run(self, head: Head) -> tuple[Array, ...]:
        """Answer queries in balanced coordinates: clusters, and the tail exactly."""
        n, end = head.sizes[0], int(self.start[-1])
        clusters = _clusters_of(
            self.buffer, self.start, self.group, self.transform.scales
        )
        size = max(POLICY.multipole.fewest, int(POLICY.multipole.queries * np.sqrt(n)))
        blocks = clusters.arrange(head.query, size)
        value, logarithm, *rest = clusters.query(
            head.query, self.plan.method.threshold, blocks
        )
        tail = replace(head, key=head.key[end:, :], value=head.value[end:, :])
        return *merge_partials((value, logarithm), tail.attend()), *rest

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """The certificate of the answers to the sample of queries."""
        sample = self.sample
        if self.rows is not None and self.rows.serves(1, self.buffer):
            # a batch may be exact because it is large; certify a single query instead
            sample = sample[:1, :]
        return self.answer(sample, tol, guarantee, rng).certificate

    def pack(self) -> Packed:
        """Arrays and plain values."""
        t = self.transform
        arrays = {f"transform_{name}": getattr(t, name) for name in _TRANSFORM}
        kept = {
            "key": self.buffer.key,
            "value": self.buffer.value,
            "sample": self.sample,
        }
        arrays |= {name: to_host(x) for name, x in kept.items()}
        arrays |= {"start": self.start, "group": self.group}
        more, values = ({}, {}) if self.rows is None else _pack_rows(self.rows)
        return arrays | more, {"scale": self.scale, **values}


_TRANSFORM = ("query_center", "key_center", "query_map", "key_map", "tilt", "scales")
# names in files, and of the attributes of the tree
_TREE = {
    "first": "first",
    "start": "start",
    "middle": "value_center",
    "clusters": "clusters",
    "leaves": "leaves",
}
_CHOICE = ("threshold", "limit", "work", "checked")


def unpack_multipole(
    plan: Plan, arrays: dict[str, Array], values: dict[str, Any], like: Array
) -> MultipoleHead:
    """Undo ``MultipoleHead.pack``."""
    transform = Transform(**{name: arrays[f"transform_{name}"] for name in _TRANSFORM})
    wide = mover(like, compute_dtype(array_namespace(like), like.dtype))
    key, value = wide(arrays["key"]), wide(arrays["value"])
    return MultipoleHead(
        plan,
        float(values["scale"]),
        transform,
        KVBuffer(key, value, key.shape[0]),
        arrays["start"],
        arrays["group"],
        mover(like, like.dtype)(arrays["sample"]),
        _unpack_rows(arrays, values, wide) if "probe_query" in arrays else None,
    )


def _pack_rows(rows: RowField) -> Packed:
    arrays, values = pack_held_out(rows.held_out)
    arrays["row_queries"] = to_host(rows.queries)
    if rows.tree is not None:
        arrays |= {f"row_{x}": to_host(getattr(rows.tree, y)) for x, y in _TREE.items()}
    return arrays, values | {f"row_{x}": getattr(rows, x) for x in _CHOICE}


def _unpack_rows(
    arrays: dict[str, Array], values: dict[str, Any], wide: Any
) -> RowField:
    tree = None
    if "row_start" in arrays:
        first, start, *sums = (arrays[f"row_{x}"] for x in _TREE)
        tree = Tree(first, start, *map(wide, sums))
    held_out, queries = (
        unpack_held_out(arrays, values, wide),
        wide(arrays["row_queries"]),
    )
    choice: dict[str, Any] = {x: float(values[f"row_{x}"]) for x in _CHOICE}
    return RowField(held_out, queries, tree, **choice).with_error_estimate()


def _cluster(buffer: KVBuffer, metric: Array, count: int) -> Clusters:
    """Cluster keys that are in balanced coordinates already."""
    policy = POLICY.multipole
    d = buffer.keys.shape[1]
    zero, one = np.zeros(d), np.eye(d)
    plain = Transform(zero, zero, one, one, zero, metric)
    groups = min(policy.groups, max(1, count // policy.group_clusters))
    return Clusters.of(
        buffer.key, buffer.value, plain, 1.0, clusters=max(count, 1), groups=groups
    )


def _clusters_of(
    buffer: KVBuffer, start: Array, group: Array, metric: Array
) -> Clusters:
    """The clusters of the buffer, for queries in balanced coordinates."""
    xp, dtype = array_namespace(buffer.keys), buffer.keys.dtype
    end, d = int(start[-1]), buffer.keys.shape[1]
    device = device_of(buffer.keys)
    return Clusters(
        buffer.keys[:end, :],
        buffer.values[:end, :],
        start,
        group,
        xp.eye(d, dtype=dtype, device=device),
        xp.zeros((d,), dtype=dtype, device=device),
        mover(buffer.keys, dtype)(metric),
    )
