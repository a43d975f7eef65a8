"""Low-rank structures over the prefixes of the keys, as cumulative sums of chunks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fastattn._ops.lowrank import LEAST
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.causal_chunks import Answer, by_prefixes, panels
from fastattn.problem.head import Head
from sketching._lib.arrays import Array, array_namespace, mover, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.threads import parallel_map

# log of the factor by which a prefix may have a smaller mean weight than all keys
_SLACK = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class LowRankPrefix:
    """A low-rank structure with the mean of the keys that it holds.

    Parameters
    ----------
    structure : LowRank
        Over the keys of the prefix.
    mean : array, shape (d,)
        Mean of all keys of the prefix times the scale.
    far : boolean array
        Which keys of the last chunk of the prefix are far.
    """

    structure: LowRank
    mean: Array
    far: Array

    @property
    def near_mean(self) -> Array:
        """Mean of the keys that are not far, times the scale."""
        structure, whitening = self.structure, self.structure.basis.whitening
        far = len(structure.far_key)
        total = (structure.count + far) * self.mean
        apart = structure.far_key.sum(axis=0) + far * whitening.center
        return (total - whitening.scale * apart) / max(structure.count, 1)

    def query(self, query: Array) -> Answer:
        """Compute outputs; rows are unreliable below the bound by the mean key."""
        value, logarithm, reliable = self.structure.query(query, slack=_SLACK)
        xp, dtype = array_namespace(query), logarithm.dtype
        move = mover(query, dtype)
        count = self.structure.count + len(self.structure.far_key)
        # Jensen: the mean weight is at least the weight of the mean key
        least = xp.matmul(xp.astype(query, dtype, copy=False), move(self.mean))
        least = least + math.log(LEAST * count)
        return value, logarithm, xp.logical_and(reliable, logarithm > least)


def lowrank_by_prefixes(head: Head, empty: LowRank) -> Answer:
    """Compute a causal head with the basis of an empty low-rank structure."""
    return by_prefixes(head, lambda counts: lowrank_prefixes(head, empty, counts))


def lowrank_prefixes(
    head: Head, empty: LowRank, counts: list[int]
) -> Iterator[list[LowRankPrefix]]:
    """Yield structures over the first ``counts`` keys, a few at a time."""

    def part(keys: slice) -> tuple[LowRank, Array, Array]:
        key, value = head.key[keys, :], head.value[keys, :]
        total = to_host(head.xp.sum(key, axis=0, dtype=head.xp.float64))
        return *empty.part(key, value), head.scale * total

    before, total = empty, np.zeros(head.sizes[2])
    for panel in panels(counts, empty.sums.nbytes):
        parts, far, sums = zip(*parallel_map(part, panel, head.query), strict=True)
        structures = _accumulated(before, list(parts))
        totals = total + np.cumsum(sums, axis=0)
        means = [x / keys.stop for x, keys in zip(totals, panel, strict=True)]
        yield [LowRankPrefix(*x) for x in zip(structures, means, far, strict=True)]
        before, total = structures[-1], totals[-1]


def _accumulated(before: LowRank, parts: list[LowRank]) -> list[LowRank]:
    """Cumulative sums of the parts, projected onto the basis in one solve."""
    with np.errstate(over="ignore", invalid="ignore"):
        sums = list(accumulate((part.sums for part in parts), initial=before.sums))[1:]
        weights = sums
        if before.landmarks:
            # one solve with many columns
            wide = before.basis.project(np.concatenate(sums, axis=1))
            weights = np.split(wide, len(parts), axis=1)
    # sums that are not finite stay so: checking the last is enough
    if not np.isfinite(weights[-1]).all():
        raise RefusalError("sums over keys overflow: the inputs are too extreme")
    structures = []
    for part, total, weight in zip(parts, sums, weights, strict=True):
        before = before.merged_with(part, total, weight)
        structures.append(before)
    return structures
