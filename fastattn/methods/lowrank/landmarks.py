"""Landmarks for a low-rank softmax, by randomly pivoted Cholesky factorization.

After ``r`` polynomials with features ``Phi``, the residual of the positive definite
kernel of two keys is ``R(k, k') = a(k) a(k') (exp(y . y') - Phi(y) . Phi(y'))``. Its
randomly pivoted Cholesky factorization on a sample of keys (Chen, Epperly, Tropp and
Webber, arXiv 2207.06503), in batches of pivots, selects keys whose kernel columns span
``R``; a step of weighted k-means (Lloyd) over more keys then moves these landmarks.
"""

import math
from itertools import pairwise

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.methods.lowrank.basis import Hermite
from sketching._lib.arrays import Array

# pivots with a relative residual below this are numerically dependent
_FLOOR = 1e-5
# largest exponent of a kernel stored in float32
_LARGEST = 80.0
# log of the least weight relative to the largest: smaller weights are raised to it
_LEAST_LOG = -15.0
_BLOCK = 1024


class PivotedCholesky:
    """Randomly pivoted Cholesky factorization of the residual kernel, in batches.

    Parameters
    ----------
    y, log_weight : array, shapes (k, t), (k,)
        Coordinates of keys, and ``log a(k)`` up to a constant.
    hermite : Hermite
        The polynomials whose part of the kernel is subtracted.
    rng : Generator
        Draws the pivots, with probabilities proportional to the root of the residual
        diagonal.
    parts : int, optional
        Number of parts of the keys that are factorized separately, each with its share
        of the pivots: the work falls by this factor.
    """

    def __init__(
        self,
        y: Array,
        log_weight: Array,
        hermite: Hermite,
        rng: np.random.Generator,
        parts: int = 1,
    ) -> None:
        y = y.astype(np.float32, copy=False)
        weight = relative_weights(log_weight)
        cuts = [len(y) * i // parts for i in range(parts + 1)]
        self._parts = [
            _Factorization(y[lo:hi], weight[lo:hi], hermite, rng)
            for lo, hi in pairwise(cuts)
        ]
        self.landmarks = y[:0]

    def __len__(self) -> int:
        return len(self.landmarks)

    @property
    def residual_trace_ratio(self) -> float:
        """Root of residual trace over trace, on the keys that are not pivots."""
        left, others = np.sum([part.traces for part in self._parts], axis=0)
        return math.sqrt(left / others) if others > 0 else 0.0

    @property
    def most(self) -> int:
        """Number of keys that may become pivots."""
        return sum(part.open for part in self._parts)

    def add_batch(self, count: int) -> bool:
        """Add a batch of pivots, up to ``count`` in total; return if there were any."""
        before = len(self)
        wanted = min(POLICY.low_rank.batch, count - before)
        for i, part in enumerate(self._parts):
            share = wanted * (i + 1) // len(self._parts)
            share -= wanted * i // len(self._parts)
            fresh = part.add_batch(share, count)
            self.landmarks = np.concatenate([self.landmarks, fresh])
        return len(self) > before

    def add_until(self, count: int) -> bool:
        """Add pivots up to ``count`` in total; return if there were any."""
        before = len(self)
        while self.add_batch(count):
            pass
        return len(self) > before


class _Factorization:
    """The factorization of one part of the keys, with weights ``a(k)``."""

    def __init__(
        self, y: Array, weight: Array, hermite: Hermite, rng: np.random.Generator
    ) -> None:
        self.y, self._weight = y, weight
        self._rng = rng
        self._features = hermite.features(self.y) * self._weight[:, None]
        square = np.sum(self.y.astype(np.float64) ** 2, axis=1)
        whole = np.exp(np.minimum(square, _LARGEST)) * self._weight.astype(float) ** 2
        taken = np.sum(self._features.astype(np.float64) ** 2, axis=1)
        self._left = np.maximum(whole - taken, 0.0)
        self._floor = _FLOOR * whole
        self._left[self._left < self._floor] = 0
        self._root = np.sqrt(np.maximum(whole, np.finfo(np.float64).tiny))
        self.open = len(y) - len(y) // POLICY.low_rank.held
        self._whole = whole
        self._rows = np.empty((0, len(y)), dtype=np.float32)
        self._picks = np.empty(0, dtype=np.int64)

    @property
    def traces(self) -> tuple[float, float]:
        """Residual trace, and trace of the kernel, over keys that are not pivots."""
        others = float(self._whole.sum() - self._whole[self._picks].sum())
        return float(self._left.sum()), others

    def add_batch(self, size: int, room: int) -> Array:
        """Add up to ``size`` pivots; memory is reserved for ``room`` in total."""
        # probabilities proportional to the residual itself, as in the paper, crowd the
        # pivots of a batch at extreme keys
        chance = np.sqrt(self._left[: self.open])
        size = min(size, int(np.count_nonzero(chance)))
        if size <= 0:
            return self.y[:0]
        chance /= chance.sum()
        picks = self._rng.choice(self.open, size, replace=False, p=chance)
        rows = self._residual(picks)
        inverse, kept = _independent(rows[:, picks], self._root[picks])
        self._left[picks] = 0
        new = inverse @ rows[kept]
        self._left -= np.einsum("ij,ij->j", new, new)
        self._left[self._left < self._floor] = 0
        start = len(self._picks)
        if start + len(kept) > len(self._rows):
            self._reserve(max(room, start + len(kept)))
        self._rows[start : start + len(kept)] = new
        self._picks = np.append(self._picks, picks[kept])
        return self.y[picks[kept]]

    def _residual(self, picks: Array) -> Array:
        """Rows of the kernel less the parts of polynomials and earlier pivots."""
        rows = self.y[picks] @ self.y.T
        np.minimum(rows, np.float32(_LARGEST), out=rows)
        np.exp(rows, out=rows)
        rows *= self._weight
        rows *= self._weight[picks, None]
        rows -= self._features[picks] @ self._features.T
        if len(self._picks):
            have = self._rows[: len(self._picks)]
            rows -= have[:, picks].T @ have
        return rows

    def _reserve(self, count: int) -> None:
        """Reserve memory for the rows of ``count`` pivots."""
        rows = np.empty((count, len(self.y)), dtype=np.float32)
        rows[: len(self._picks)] = self._rows[: len(self._picks)]
        self._rows = rows


def relative_weights(log_weight: Array) -> Array:
    """Weights relative to the largest, at least ``exp(_LEAST_LOG)``."""
    shifted = log_weight - log_weight.max(initial=-np.inf)
    return np.exp(np.maximum(shifted, _LEAST_LOG)).astype(np.float32)


def one_lloyd_step(y: Array, weight: Array, landmarks: Array) -> Array:
    """Move each landmark to the weighted mean of its nearest keys (one Lloyd step)."""
    count = len(landmarks)
    if count == 0:
        return landmarks
    y = y.astype(np.float32, copy=False)
    half = 0.5 * np.einsum("ij,ij->i", landmarks, landmarks)
    nearest = np.empty(len(y), dtype=np.int64)
    for start in range(0, len(y), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(y)))
        score = y[block] @ landmarks.T
        score -= half
        np.argmax(score, axis=1, out=nearest[block])
    mass = np.bincount(nearest, weight, count)
    order = np.argsort(nearest, kind="stable")
    first = np.searchsorted(nearest[order], np.flatnonzero(mass > 0))
    moved = landmarks.copy()
    weighted = (y * weight[:, None])[order]
    sums = np.add.reduceat(weighted, first, axis=0, dtype=np.float64)
    moved[mass > 0] = sums / mass[mass > 0, None]
    return moved


def _independent(gram: Array, root: Array) -> tuple[Array, Array]:
    """Inverse Cholesky factor of the independent pivots of a batch, and their indices.

    A pivot is dropped if its residual is below ``_FLOOR`` times ``root`` squared, its
    diagonal entry of the kernel.
    """
    from scipy.linalg.lapack import dpstrf, dtrtri

    # scaled to a unit diagonal, so that one tolerance applies to all pivots
    scaled = gram.astype(np.float64) / root / root[:, None]
    factor, order, rank, _ = dpstrf(scaled, tol=_FLOOR, lower=1)
    kept = order[:rank] - 1
    inverse, _ = dtrtri(np.tril(factor[:rank, :rank]), lower=1)
    return (inverse / root[kept]).astype(np.float32), kept
