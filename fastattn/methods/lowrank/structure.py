"""Low-rank softmax attention: a key-value state of inner products with a basis.

The key-value state has shape ``(r + c, p + 1)`` with ``r`` polynomials and ``c``
landmarks, whatever the number of keys: keys can be streamed in, and states over one
basis can be merged. Only far keys, at most a few per cent of keys distributed like
those that the basis was fitted to, are stored themselves.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._ops.lowrank import key_sums, query_means
from fastattn.costs.policy import POLICY
from fastattn.methods.lowrank.basis import Basis, Hermite
from fastattn.methods.lowrank.landmarks import (
    PivotedCholesky,
    one_lloyd_step,
    relative_weights,
)
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.problem.head import host_rows
from sketching._lib.arrays import Array, array_namespace, compute_dtype, mover, to_host
from sketching._lib.certificate import RefusalError

# largest logit variance: beyond it exponentials leave the range of float32
_LARGEST_VARIANCE = 25.0
# largest log of the mean weight of a key, in float64
_LARGEST_LOG = 500.0


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A low-rank structure: basis, and state of the keys and values; on the host.

    Parameters
    ----------
    basis : Basis
        The basis functions.
    value_center : array, shape (p,)
        Subtracted from the values before they are summed.
    count : int
        Number of keys so far, without far keys.
    sums : array, shape (r + c, p + 1)
        Key-value state ``sum_j a(k_j) f(k_j) [v_j - value_center, 1]`` of the inner
        products ``f`` with the basis, in float64.
    bounds : array, shape (2, p)
        Minimum and maximum of ``value - value_center`` per column.
    far_key, far_value : array, shapes (a, d), (a, p)
        Far keys less the mean key, and their values less ``value_center``.
    weights : array, shape (r + c, p + 1)
        Coefficients of the basis functions: ``sums`` projected onto the basis.
    low_precision : bool
        Whether sums over keys, and gradients, may use bfloat16 matmuls.
    """

    basis: Basis
    value_center: Array
    count: int
    sums: Array
    bounds: Array
    far_key: Array
    far_value: Array
    weights: Array
    low_precision: bool = False

    @staticmethod
    def plan(
        sample: PlanningSample, *, rank: int, landmarks: int, rng: np.random.Generator
    ) -> "LowRank":
        """Return an empty structure whose basis is fitted to a sample.

        There may be fewer landmarks, if fewer keys are numerically independent.
        """
        full = Whitening.fit(sample)
        hermite = Hermite.of(full.spread, rank)
        whitening = Basis.fitting(full, hermite, landmarks=landmarks > 0)
        if landmarks == 0:
            return LowRank.over(whitening, hermite, None, sample)
        few = min(POLICY.low_rank.given_pivot_keys, len(sample.key) // 4)
        few = sample.key[: max(few, 5 * landmarks // 2)]
        pivots = PivotedCholesky(*whitening.coordinates(few), hermite, rng)
        pivots.add_until(landmarks)
        return LowRank.over(whitening, hermite, pivots.landmarks, sample)

    @staticmethod
    def over(
        whitening: Whitening,
        hermite: Hermite,
        pivots: Array | None,
        sample: PlanningSample,
    ) -> "LowRank":
        """Return an empty structure over given coordinates, polynomials and pivots.

        ``pivots``, coordinates of keys of shape (c, t), are the initial landmarks.

        Raises
        ------
        RefusalError
            If the logit variance is too large for a low rank.
        """
        variance = float(whitening.spread.sum())
        if not (
            variance <= _LARGEST_VARIANCE and abs(whitening.offset) <= _LARGEST_LOG
        ):
            raise RefusalError(
                f"the logit variance is {variance:.3g}, too much for a low rank"
            )
        marks = np.zeros((0, len(whitening.spread)), dtype=np.float32)
        if pivots is not None:
            y, log_weight = whitening.coordinates(sample.key)
            marks = one_lloyd_step(y, relative_weights(log_weight), pivots)
        basis = Basis.factorised(whitening, hermite, marks)
        d, p = sample.key.shape[1], sample.value.shape[1]
        empty = np.zeros((len(hermite) + len(marks), p + 1))
        return LowRank(
            basis,
            sample.value.mean(axis=0, dtype=np.float64),
            0,
            empty,
            no_bounds(p),
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
        mine = (self.value_center, self.sums, self.bounds, self.weights)
        far = (self.far_key, self.far_value)
        return self.basis.nbytes + sum(int(x.nbytes) for x in mine + far)

    def first(self, count: int) -> "LowRank":
        """Return the structure with the first ``count`` basis functions only."""
        basis, sums = self.basis.first(count), self.sums[:count]
        return replace(self, basis=basis, sums=sums, weights=basis.project(sums))

    def emptied(self) -> "LowRank":
        """Return the structure without its keys."""
        p = len(self.value_center)
        zeros = np.zeros_like(self.sums)
        return replace(
            self,
            count=0,
            sums=zeros,
            bounds=no_bounds(p),
            far_key=self.far_key[:0],
            far_value=self.far_value[:0],
            weights=zeros,
        )

    def insert(self, key: Array, value: Array) -> "LowRank":
        """Add keys and their values; return the new structure."""
        return self.filled(key, value)[0] if key.shape[0] else self

    def filled(self, key: Array, value: Array) -> tuple["LowRank", Array]:
        """Add at least one key; return the new structure, and which keys are far."""
        part, far = self.part(key, value)
        return self.merge(part), far

    def part(self, key: Array, value: Array) -> tuple["LowRank", Array]:
        """Return the state of at least one key, not projected, and which are far."""
        whitening = self.basis.whitening
        move = mover(key, _dtype_of(key))
        sums, bounds, far = key_sums(
            key,
            value,
            move(whitening.center),
            move(whitening.to_key),
            move(self.basis.landmarks),
            move(self.value_center),
            offset=whitening.offset,
            longest=whitening.longest,
            low_precision=self.low_precision,
            **self.basis.hermite.op_arguments,
        )
        rows = np.flatnonzero(to_host(far))
        part = replace(
            self,
            count=key.shape[0] - len(rows),
            sums=to_host(sums),
            bounds=to_host(bounds).astype(np.float64),
            far_key=host_rows(key, rows) - whitening.center,
            far_value=host_rows(value, rows) - self.value_center,
        )
        return part, far

    def merge(self, other: "LowRank") -> "LowRank":
        """Add the keys of another structure; return the new structure.

        Raises
        ------
        ValueError
            If the bases differ, as after two calls of ``plan``.
        """
        same = np.array_equal(self.value_center, other.value_center)
        if not (same and self.basis.equals(other.basis)):
            raise ValueError(
                "the structures have different bases: start both from one plan"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            sums = self.sums + other.sums
            weights = self.basis.project(sums)
        if not np.isfinite(weights).all():
            raise RefusalError("sums over keys overflow: the inputs are too extreme")
        return self.merged_with(other, sums, weights)

    def merged_with(self, other: "LowRank", sums: Array, weights: Array) -> "LowRank":
        """Return the merged structure, given its sums and weights."""
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
        """Compute the output of queries.

        Rows whose sum of weights is below ``exp(-slack)`` times the lower bound by
        Jensen's inequality (for keys like those of the sample) are unreliable.

        Returns
        -------
        value : array, shape (n, p)
            Within the range of the values in every column.
        log_normalizer : array, shape (n,)
            Log-sum-exps of the logits, centring undone; NaN in unreliable rows.
        reliable : boolean array, shape (n,)
            False for rows that must be recomputed exactly: queries far from those that
            the basis was fitted to, or impossibly small sums of weights.
        """
        xp, whitening = array_namespace(query), self.basis.whitening
        move = mover(query, _dtype_of(query))
        # in units of the lower bound by Jensen's inequality: count exp(offset)
        unit = math.exp(slack) / max(self.count, 1)
        bounds = np.where(np.isfinite(self.bounds), self.bounds, 0.0)
        far = np.column_stack([self.far_value, np.ones(len(self.far_value))])
        value, logarithm = query_means(
            query,
            self.basis.functions(move, math.log(unit)),
            move(self.weights * unit * math.exp(-whitening.offset)),
            move(whitening.scale * self.far_key),
            move(unit * far),
            move(bounds),
            move(self.value_center),
            **self.basis.hermite.op_arguments,
        )
        return value, logarithm, xp.logical_not(xp.isnan(logarithm))


def no_bounds(p: int) -> Array:
    """Minimum and maximum over no values: infinity, and minus infinity."""
    return np.outer([math.inf, -math.inf], np.ones(p))


def _dtype_of(x: Array) -> Any:
    return compute_dtype(array_namespace(x), x.dtype)
