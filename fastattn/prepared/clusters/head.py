"""Clusters of keys prepared for one head, and a tail of recent keys.

Many queries are answered by blocks, a few by a tree over the same clusters.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.certify import certified
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.methods.exact import Exact
from fastattn.methods.multipole.clusters import Clusters
from fastattn.prepared.clusters.tree import RowField, Tree
from fastattn.prepared.held_out import pack_probes, unpack_probes
from fastattn.prepared.kv_buffer import Kept, bytes_of
from fastattn.prepared.states import Packed
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import join
from fastattn.problem.plan import Attempt, HeadAnswer, Plan
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

# recent keys are clustered, all keys anew, once they are so many and this share of all
_LEAST = 1024
_SHARE = 0.25
# queries of a batch that blocks pay for: of fewer, the rows that certify an answer cost
# as much
_BATCH = 1024
# queries of a block: a multiple of the root of their number
_QUERIES = 2.83
_FEWEST = 16
# clusters of a group, and most groups
_CLUSTERS = 16
_GROUPS = 16


@dataclass(frozen=True, slots=True, eq=False)
class MultipoleHead:
    """All keys in balanced coordinates: clusters first, then those that came since.

    Parameters
    ----------
    plan : Plan
        Has the threshold.
    scale : float
        The factor of the logits.
    transform : Transform
        Coordinates of queries and keys.
    kept : Kept
        Keys in these coordinates with their values, in the dtype of computation.
    start, group : integer arrays, shapes (C + 1,), (C,)
        As in ``Clusters``, of the keys that are clustered.
    sample : array, shape (k, d)
        Queries that ``certificate`` is about.
    rows : RowField or None
        For batches that blocks do not pay for.
    """

    plan: Plan
    scale: float
    transform: Transform
    kept: Kept
    start: Array
    group: Array
    sample: Array
    rows: RowField | None

    @staticmethod
    def of(
        plan: Plan, head: Head, sample: Array, tol: float, rng: np.random.Generator
    ) -> "MultipoleHead":
        """Start without keys, in coordinates that suit the head."""
        query, key = sample_rows(head, rng)
        transform = balance(query, key, head.scale, queries=False)
        xp, none = head.xp, np.zeros(0, dtype=np.int64)
        like = (xp.astype(x[:0, :], head.dtype) for x in (head.key, head.value))
        kept = Kept.none(*like)
        zero = np.zeros(1, dtype=np.int64)
        to_query = mover(head.query, head.dtype)(transform.query_map)
        # whoever draws from rng next finds it as it was
        rows = RowField.of(head, to_query, tol, rng.spawn(1)[0])
        return MultipoleHead(
            plan, head.scale, transform, kept, zero, none, sample, rows
        )

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.kept.count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        t = self.transform
        own = (t.key_center, t.key_map, t.query_map, t.scales, self.start, self.group)
        small = sum(int(x.nbytes) for x in own)
        small += 0 if self.rows is None else self.rows.nbytes
        return self.kept.nbytes + bytes_of(self.sample) + small

    def empty(self) -> "MultipoleHead":
        """Forget the keys."""
        rows = None if self.rows is None else self.rows.empty()
        cuts = {"start": self.start[:1], "group": self.group[:0]}
        return replace(self, kept=self.kept.empty(), rows=rows, **cuts)

    def insert(
        self,
        key: Array,
        value: Array,
        *,
        fold: bool = False,  # noqa: ARG002
    ) -> "MultipoleHead":
        """Add keys: recent ones stay apart until they are a share of all."""
        xp, dtype = array_namespace(key), self.kept.keys.dtype
        move = mover(key, dtype)
        key = xp.astype(key, dtype) - move(self.transform.key_center)
        key = xp.matmul(key, move(self.transform.key_map))
        return self._with(key, xp.astype(value, dtype, copy=False))

    def merge(self, other: "MultipoleHead") -> "MultipoleHead":
        """Add the keys of another structure of the same plan."""
        return self._with(other.kept.key, other.kept.value)

    def _with(self, key: Array, value: Array) -> "MultipoleHead":
        kept, rows = self.kept.append(key, value), self.rows
        metric = self.transform.scales
        tail = kept.count - int(self.start[-1])
        if tail <= max(_LEAST, _SHARE * kept.count):
            if rows is not None:
                rows, kept = rows.inserted(kept, key.shape[0], metric)
            return replace(self, kept=kept, rows=rows)
        # the threshold was chosen for so many clusters
        count = min(self.plan.method.clusters, kept.count // 2)
        found = _cluster(kept, metric, count)
        kept = Kept(found.key, found.value, kept.count)
        if rows is not None:
            rows, kept = rows.clustered(kept, found.start, metric)
        cuts = {"start": found.start, "group": found.group}
        return replace(self, kept=kept, rows=rows, **cuts)

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries by blocks or by rows; where these miss ``tol``, exactly."""
        xp, dtype = array_namespace(query), self.kept.keys.dtype
        move = mover(query, dtype)
        wide = xp.astype(query, dtype, copy=False)
        turned = xp.matmul(wide, move(self.transform.query_map))
        shift = xp.matmul(wide, move(self.scale * self.transform.key_center))
        head = Head(turned, self.kept.key, self.kept.value, 1.0)
        found = None
        if query.shape[0] >= _BATCH and len(self.group):
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
        """Answer by clusters, if that keeps ``tol``."""
        attempt = Attempt(self.plan, self._run, np.inf)
        try:
            found = certified(head, attempt, tol, rng)
        except RefusalError:
            return None
        return found if found.error <= tol else None

    def _by_rows(self, query: Array, turned: Array) -> HeadAnswer | None:
        """Answer row by row, if the probes say that this keeps ``tol``."""
        assert self.rows is not None
        found = self.rows.answer(turned, self.kept)
        if found is None:
            return None
        value, logarithm, sampled = found
        # the answer is rounded to the dtype of the query, that of the probes is not
        error = sampled.upper + float(array_namespace(query).finfo(query.dtype).eps) / 2
        return HeadAnswer(
            value, logarithm, error, FAILURE, "relative-frobenius", sampled.source,
            self.plan,
        )  # fmt: skip

    def _run(self, head: Head) -> tuple[Array, ...]:
        """Answer turned queries: by clusters, and exactly over the tail."""
        n, end = head.sizes[0], int(self.start[-1])
        clusters = _clusters_of(
            self.kept, self.start, self.group, self.transform.scales
        )
        size = max(_FEWEST, int(_QUERIES * np.sqrt(n)))
        blocks = clusters.arrange(head.query, size)
        value, logarithm, *rest = clusters.query(
            head.query, self.plan.method.threshold, blocks
        )
        tail = replace(head, key=head.key[end:, :], value=head.value[end:, :])
        return *join((value, logarithm), tail.attend()), *rest

    def certificate(
        self, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Certificate:
        """What is promised of the sample of queries, which are answered for it."""
        sample = self.sample
        if self.rows is not None and self.rows.serves(1, self.kept):
            # those that are exact because they are many promise more than one does
            sample = sample[:1, :]
        return self.answer(sample, tol, guarantee, rng).certificate

    def pack(self) -> Packed:
        """Arrays and plain values."""
        t = self.transform
        arrays = {f"transform_{name}": getattr(t, name) for name in _TRANSFORM}
        kept = {"key": self.kept.key, "value": self.kept.value, "sample": self.sample}
        arrays |= {name: to_host(x) for name, x in kept.items()}
        arrays |= {"start": self.start, "group": self.group}
        more, values = ({}, {}) if self.rows is None else _pack_rows(self.rows)
        return arrays | more, {"scale": self.scale, **values}


_TRANSFORM = ("query_center", "key_center", "query_map", "key_map", "tilt", "scales")
_TREE = ("first", "start", "middle", "clusters", "leaves")
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
        Kept(key, value, key.shape[0]),
        arrays["start"],
        arrays["group"],
        mover(like, like.dtype)(arrays["sample"]),
        _unpack_rows(arrays, values, wide) if "probe_query" in arrays else None,
    )


def _pack_rows(rows: RowField) -> Packed:
    arrays, values = pack_probes(rows.probes)
    arrays["row_queries"] = to_host(rows.queries)
    if rows.tree is not None:
        arrays |= {f"row_{x}": to_host(getattr(rows.tree, x)) for x in _TREE}
    return arrays, values | {f"row_{x}": getattr(rows, x) for x in _CHOICE}


def _unpack_rows(
    arrays: dict[str, Array], values: dict[str, Any], wide: Any
) -> RowField:
    tree = None
    if "row_start" in arrays:
        first, start, *sums = (arrays[f"row_{x}"] for x in _TREE)
        tree = Tree(first, start, *map(wide, sums))
    probes, queries = unpack_probes(arrays, values, wide), wide(arrays["row_queries"])
    choice: dict[str, Any] = {x: float(values[f"row_{x}"]) for x in _CHOICE}
    return RowField(probes, queries, tree, **choice).judged()


def _cluster(kept: Kept, metric: Array, count: int) -> Clusters:
    """Cluster keys that are in balanced coordinates already."""
    d = kept.keys.shape[1]
    zero, one = np.zeros(d), np.eye(d)
    plain = Transform(zero, zero, one, one, zero, metric)
    groups = min(_GROUPS, max(1, count // _CLUSTERS))
    return Clusters.of(
        kept.key, kept.value, plain, 1.0, clusters=max(count, 1), groups=groups
    )


def _clusters_of(kept: Kept, start: Array, group: Array, metric: Array) -> Clusters:
    """The clusters of turned keys, for turned queries."""
    xp, dtype = array_namespace(kept.keys), kept.keys.dtype
    end, d = int(start[-1]), kept.keys.shape[1]
    device = device_of(kept.keys)
    return Clusters(
        kept.keys[:end, :],
        kept.values[:end, :],
        start,
        group,
        xp.eye(d, dtype=dtype, device=device),
        xp.zeros((d,), dtype=dtype, device=device),
        mover(kept.keys, dtype)(metric),
    )
