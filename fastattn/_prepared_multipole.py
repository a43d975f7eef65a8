"""Clusters of keys prepared for one head, and a tail of recent keys."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._clusters import Clusters
from fastattn._kept import Kept, bytes_of
from fastattn._probes import join
from fastattn._problem import Head, HeadAnswer, Plan
from fastattn._recipes import Attempt, certified, sample_rows
from fastattn._sums import Packed
from fastattn.exact import Exact
from fastattn.transforms import Transform, balance
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
# queries of a batch that blocks pay for: fewer are answered exactly, because the rows
# that certify an answer cost as much
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
    """

    plan: Plan
    scale: float
    transform: Transform
    kept: Kept
    start: Array
    group: Array
    sample: Array

    @staticmethod
    def of(
        plan: Plan, head: Head, sample: Array, rng: np.random.Generator
    ) -> "MultipoleHead":
        """Start without keys, in coordinates that suit the head."""
        query, key = sample_rows(head, rng)
        transform = balance(query, key, head.scale, queries=False)
        xp, none = head.xp, np.zeros(0, dtype=np.int64)
        rows = (xp.astype(x[:0, :], head.dtype) for x in (head.key, head.value))
        kept = Kept.none(*rows)
        zero = np.zeros(1, dtype=np.int64)
        return MultipoleHead(plan, head.scale, transform, kept, zero, none, sample)

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
        return self.kept.nbytes + bytes_of(self.sample) + small

    def empty(self) -> "MultipoleHead":
        """Forget the keys."""
        kept = self.kept.empty()
        return replace(self, kept=kept, start=self.start[:1], group=self.group[:0])

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
        kept = self.kept.append(key, value)
        tail = kept.count - int(self.start[-1])
        if tail <= max(_LEAST, _SHARE * kept.count):
            return replace(self, kept=kept)
        # the threshold was chosen for so many clusters
        count = min(self.plan.method.clusters, kept.count // 2)
        found = _cluster(kept, self.transform.scales, count)
        kept = Kept(found.key, found.value, kept.count)
        return replace(self, kept=kept, start=found.start, group=found.group)

    def answer(
        self, query: Array, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer queries; where clusters do not keep ``tol``, exactly."""
        xp, dtype = array_namespace(query), self.kept.keys.dtype
        move = mover(query, dtype)
        wide = xp.astype(query, dtype, copy=False)
        turned = xp.matmul(wide, move(self.transform.query_map))
        shift = xp.matmul(wide, move(self.scale * self.transform.key_center))
        head = Head(turned, self.kept.key, self.kept.value, 1.0)
        found = None
        if query.shape[0] >= _BATCH and len(self.group):
            found = self._by_clusters(head, tol, rng)
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
        """What is promised of the sample of queries, which are answered exactly."""
        found = self.answer(self.sample, tol, guarantee, rng)
        return Certificate(found.error, found.failure, found.norm, found.source)

    def pack(self) -> Packed:
        """Arrays and plain values."""
        t = self.transform
        arrays = {f"transform_{name}": getattr(t, name) for name in _TRANSFORM}
        kept = {"key": self.kept.key, "value": self.kept.value, "sample": self.sample}
        arrays |= {name: to_host(x) for name, x in kept.items()}
        return {**arrays, "start": self.start, "group": self.group}, {
            "scale": self.scale
        }


_TRANSFORM = ("query_center", "key_center", "query_map", "key_map", "tilt", "scales")


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
    )


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
