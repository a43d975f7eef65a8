"""A low-rank softmax prepared on keys and values: inner products with a basis.

The structure holds one number for each function of the basis and each value column,
whatever the number of keys, so that keys can be streamed in and two structures over
one basis can be merged. Only far keys, at most a few in a hundred of the kind that the
basis was made from, are kept as they are.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._ops.lowrank import key_sums, query_means
from fastattn.methods.lowrank.basis import Basis, Hermite
from fastattn.methods.lowrank.landmarks import Pivots, one_lloyd_step, relative_weights
from fastattn.methods.lowrank.whitening import Frame, Sample
from fastattn.problem.head import host_rows
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    mover,
    to_host,
)
from sketching._lib.certificate import RefusalError

# keys that landmarks are drawn from: more would crowd at the extremes
PIVOT_KEYS = 2304
# of logits: their exponentials would leave the range of float32
_LARGEST_VARIANCE = 25.0
# of the mean weight of a key, in float64
_LARGEST_LOG = 500.0


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Inner products of keys and values with a basis; everything is on the host.

    Parameters
    ----------
    basis : Basis
        Functions of a query.
    middle : array, shape (p,)
        What is subtracted from the values before they are summed.
    count : int
        Number of keys so far, without the far ones.
    sums : array, shape (r + c, p + 1)
        Sum over keys of function times weight times ``[value - middle, 1]``, float64.
    bounds : array, shape (2, p)
        The least and the largest of ``value - middle``.
    far_key, far_value : array, shapes (a, d), (a, p)
        Far keys less the centre, and their values less ``middle``.
    weights : array, shape (r + c, p + 1)
        The sums projected onto the basis.
    coarse : bool
        Whether sums over keys, and derivatives, may be made of products of eight bits.
    """

    basis: Basis
    middle: Array
    count: int
    sums: Array
    bounds: Array
    far_key: Array
    far_value: Array
    weights: Array
    coarse: bool = False

    @staticmethod
    def plan(
        sample: Sample, *, rank: int, landmarks: int, rng: np.random.Generator
    ) -> "LowRank":
        """Make an empty structure whose basis is fitted to a sample.

        Fewer landmarks come out where the keys have no more to tell.
        """
        full = Frame.of(sample)
        hermite = Hermite.of(full.spread, rank)
        frame = Basis.fitting(full, hermite, landmarks=landmarks > 0)
        if landmarks == 0:
            return LowRank.over(frame, hermite, None, sample)
        few = min(PIVOT_KEYS, len(sample.key) // 4)
        few = sample.key[: max(few, 5 * landmarks // 2)]
        pivots = Pivots(*frame.coordinates(few), hermite, rng)
        pivots.fill(landmarks)
        return LowRank.over(frame, hermite, pivots.landmarks, sample)

    @staticmethod
    def over(
        frame: Frame, hermite: Hermite, pivots: Array | None, sample: Sample
    ) -> "LowRank":
        """Make an empty structure from what a planner has found.

        ``pivots`` are coordinates of keys, which the landmarks start from.

        Raises
        ------
        RefusalError
            If the logits vary so much that no basis is worth a try.
        """
        variance = float(frame.spread.sum())
        if not (variance <= _LARGEST_VARIANCE and abs(frame.offset) <= _LARGEST_LOG):
            raise RefusalError(
                f"the logits have a variance of {variance:.3g}, too much for a low rank"
            )
        marks = np.zeros((0, len(frame.spread)), dtype=np.float32)
        if pivots is not None:
            y, log_weight = frame.coordinates(sample.key)
            marks = one_lloyd_step(y, relative_weights(log_weight), pivots)
        basis = Basis(frame, hermite, marks)
        d, p = sample.key.shape[1], sample.value.shape[1]
        empty = np.zeros((len(hermite) + len(marks), p + 1))
        return LowRank(
            basis,
            sample.value.mean(axis=0, dtype=np.float64),
            0,
            empty,
            _no_bounds(p),
            np.zeros((0, d)),
            np.zeros((0, p)),
            empty,
        )

    @property
    def rank(self) -> int:
        """Number of polynomials."""
        return len(self.basis.hermite)

    @property
    def landmarks(self) -> int:
        """Number of landmarks."""
        return len(self.basis.landmarks)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        mine = (self.middle, self.sums, self.bounds, self.weights)
        far = (self.far_key, self.far_value)
        return self.basis.nbytes + sum(int(x.nbytes) for x in mine + far)

    def first(self, count: int) -> "LowRank":
        """Return the same keys over the first functions of the basis only."""
        basis, sums = self.basis.first(count), self.sums[:count]
        return replace(self, basis=basis, sums=sums, weights=basis.project(sums))

    def emptied(self) -> "LowRank":
        """Return the structure without its keys."""
        p = len(self.middle)
        nothing = np.zeros_like(self.sums)
        return replace(
            self,
            count=0,
            sums=nothing,
            bounds=_no_bounds(p),
            far_key=self.far_key[:0],
            far_value=self.far_value[:0],
            weights=nothing,
        )

    def insert(self, key: Array, value: Array) -> "LowRank":
        """Add keys and their values; returns the new structure."""
        return self.filled(key, value)[0] if key.shape[0] else self

    def filled(self, key: Array, value: Array) -> tuple["LowRank", Array]:
        """Add keys, at least one, as ``insert`` does; also says which are far."""
        part, far = self.part(key, value)
        return self.merge(part), far

    def part(self, key: Array, value: Array) -> tuple["LowRank", Array]:
        """Sum over keys, at least one, without projecting; also says which are far."""
        frame = self.basis.frame
        move = mover(key, _dtype_of(key))
        sums, bounds, far = key_sums(
            key,
            value,
            move(frame.center),
            move(frame.to_key),
            move(self.basis.landmarks),
            move(self.middle),
            offset=frame.offset,
            longest=frame.longest,
            coarse=self.coarse,
            **self.basis.hermite.recipe,
        )
        rows = np.flatnonzero(to_host(far))
        part = replace(
            self,
            count=key.shape[0] - len(rows),
            sums=to_host(sums),
            bounds=to_host(bounds).astype(np.float64),
            far_key=host_rows(key, rows) - frame.center,
            far_value=host_rows(value, rows) - self.middle,
        )
        return part, far

    def merge(self, other: "LowRank") -> "LowRank":
        """Add the keys of another structure; returns the new structure.

        Raises
        ------
        ValueError
            If the bases differ, which happens where ``plan`` was called twice.
        """
        same = np.array_equal(self.middle, other.middle)
        if not (same and self.basis.equals(other.basis)):
            raise ValueError(
                "the structures have different bases: start both from one plan"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            sums = self.sums + other.sums
            weights = self.basis.project(sums)
        if not np.isfinite(weights).all():
            raise RefusalError("sums over keys overflow: the inputs are too extreme")
        return self.joined(other, sums, weights)

    def joined(self, other: "LowRank", sums: Array, weights: Array) -> "LowRank":
        """Add the keys of another structure, whose sums are added already."""
        return replace(
            self,
            count=self.count + other.count,
            sums=sums,
            bounds=np.stack(
                [
                    np.minimum(self.bounds[0], other.bounds[0]),
                    np.maximum(self.bounds[1], other.bounds[1]),
                ]
            ),
            far_key=np.concatenate([self.far_key, other.far_key]),
            far_value=np.concatenate([self.far_value, other.far_value]),
            weights=weights,
        )

    def query(self, query: Array, *, slack: float = 0.0) -> tuple[Array, Array, Array]:
        """Answer queries.

        Sums of weights may be ``exp(slack)`` times smaller than convexity promises
        of keys like those that the basis was made from.

        Returns
        -------
        value : array, shape (n, p)
            Within the range of the values in every column.
        log_normalizer : array, shape (n,)
            Of the true logits: centring is undone. NaN where the row is not good.
        good : boolean array, shape (n,)
            The other rows are to be computed exactly: queries far from those that
            the basis was made for, or sums of weights that are too small to be true.
        """
        xp, frame = array_namespace(query), self.basis.frame
        move = mover(query, _dtype_of(query))
        # in units of what convexity promises at least: count exp(offset)
        unit = math.exp(slack) / max(self.count, 1)
        bounds = np.where(np.isfinite(self.bounds), self.bounds, 0.0)
        far = np.column_stack([self.far_value, np.ones(len(self.far_value))])
        value, logarithm = query_means(
            query,
            move(frame.to_query),
            move(np.append(frame.origin[:-1], math.log(unit))),
            move(self.basis.landmarks),
            move(frame.spread / frame.limit),
            move(self.weights * unit * math.exp(-frame.offset)),
            move(frame.scale * self.far_key),
            move(unit * far),
            move(bounds),
            move(self.middle),
            **self.basis.hermite.recipe,
        )
        return value, logarithm, xp.logical_not(xp.isnan(logarithm))


def _no_bounds(p: int) -> Array:
    return np.outer([math.inf, -math.inf], np.ones(p))


def _dtype_of(x: Array) -> Any:
    return compute_dtype(array_namespace(x), x.dtype)
