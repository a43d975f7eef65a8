"""Pilot runs: errors of low ranks over a sample of the keys, on held-out queries.

A pilot run fills a low-rank structure with a few thousand keys and compares its outputs
for held-out queries with exact attention over the same keys. Held-out queries of high
logit variance are left out in the proportion in which outlier rows will be recomputed
exactly, since they can hold most of the error.
"""

import math
from dataclasses import replace

import numpy as np

from fastattn.certificates.ratio_estimate import FIRST, SECOND, importance_probabilities
from fastattn.certificates.sampled import ROWS, second_rows
from fastattn.costs.policy import POLICY
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.problem.head import Head
from fastattn.problem.row_statistics import series_squares
from sketching._lib.arrays import Array, device_of, to_host
from sketching._lib.certificate import RefusalError


class Pilots:
    """The pilot runs of one head, and the target error that follows from them.

    Parameters
    ----------
    head, sample, whitening : Head, PlanningSample, Whitening
        One head, a sample of it, and the coordinates fitted to the sample.
    tol : float
        Relative Frobenius error that the certificate may show.
    """

    def __init__(
        self, head: Head, sample: PlanningSample, whitening: Whitening, tol: float
    ) -> None:
        policy = POLICY.sample
        self.head, self.sample, self.tol = head, sample, tol
        spread = _spread(sample.held, whitening)
        outliers = _outliers(spread, head.sizes[0])
        self.held = np.delete(sample.held, outliers, axis=0)
        squares = series_squares(np.delete(spread, outliers))
        self.probabilities = importance_probabilities(squares, ROWS)
        self.keys = (
            policy.pilot_keys // 2
            if head.sizes[1] <= policy.few_keys
            else policy.pilot_keys
        )
        self.aim = self.last = policy.caution * tol
        self._truth: dict[int, tuple[Array, float]] = {}
        self._whole: float | None = None

    @property
    def enough(self) -> float:
        """An error that is small enough to end the search."""
        return 0.75 * self.aim + 0.25 * self.last

    def subsample(self, share: int) -> tuple[Array, Array]:
        """The keys and values of a pilot run of ``share`` times the basic size."""
        # the last keys of the sample: landmarks are chosen among the first
        some = slice(-share * self.keys, None)
        return self.sample.key[some], self.sample.value[some]

    def fill(self, empty: LowRank, share: int) -> LowRank | None:
        """Insert the keys of a pilot run; None where sums overflow."""
        try:
            return empty.insert(*self.subsample(share))
        except RefusalError:
            return None

    def estimate_error(self, filled: LowRank | None, share: int) -> float:
        """Relative error on held-out queries of a structure with a pilot run's keys."""
        if filled is None:
            return math.inf
        truth, size = self._answers(share)
        answer, _, reliable = filled.query(self.held[: len(truth)])
        if not reliable.any():
            return math.inf
        squares = np.sum((answer - truth)[reliable].astype(np.float64) ** 2, axis=1)
        if share > 1:
            self._set_aim(squares, reliable)
        return math.sqrt(float(squares.sum())) / size if size else 0.0

    def _answers(self, share: int) -> tuple[Array, float]:
        """Exact outputs over a pilot run's keys; their norm, corrected to all keys."""
        if share not in self._truth:
            query = self.held if share > 1 else self.held[: POLICY.sample.pilot_queries]
            truth, _ = Head(query, *self.subsample(share), self.sample.scale).attend()
            size = float(np.linalg.norm(truth.astype(np.float64)))
            size *= self._drift(truth) if share > 1 else 1.0
            self._truth[share] = truth, size
        return self._truth[share]

    def _drift(self, part: Array) -> float:
        """Correction of the norm of outputs over part of the keys to all keys.

        It is the ratio of the shares of the norm that vary between rows. Errors are
        proportional to this variation; the mean that all rows have in common has
        another norm over a few keys than over all keys.
        """
        if self._whole is None:
            head, few = self.head, self.held[: POLICY.sample.norm_rows]
            move = {"dtype": head.query.dtype, "device": device_of(head.query)}
            whole, _ = replace(head, query=head.xp.asarray(few, **move)).attend()
            self._whole = _varying(to_host(whole))
        varied = _varying(part[: POLICY.sample.norm_rows])
        return varied / self._whole if self._whole > 0 and varied > 0 else 1.0

    def _set_aim(self, squares: Array, reliable: Array) -> None:
        """Set the target errors: the tolerance less the margin of the certificate.

        ``aim`` is the target for a certificate after one sampling round, ``last`` the
        larger one that needs the second round.
        """
        policy = POLICY.sample
        mean = float(squares.mean())
        # divided by the mean first, since fourth powers may underflow
        relative = squares / mean if mean > 0 else np.ones(len(squares))
        weighted = relative**2 / (
            self.probabilities[reliable] * len(self.probabilities)
        )
        spread = math.sqrt(max(float(weighted.mean()) - 1, 0.0))
        # the estimate of a heavy tail from few rows is unreliable
        spread = min(spread, (spread + policy.heavy) / 2)
        both = ROWS + second_rows(self.head.sizes[0])
        one, two = (
            margin.expected(spread, 1.0, count)
            for margin, count in ((FIRST, ROWS), (SECOND, both))
        )
        self.aim, self.last = (
            share * self.tol / math.sqrt(1 + more)
            for share, more in zip(policy.bold, (one, min(one, two)), strict=True)
        )


def _spread(query: Array, whitening: Whitening) -> Array:
    """Logit variance of each query over the keys."""
    x = query.astype(np.float64) @ whitening.to_query[:, :-1] - whitening.origin[:-1]
    return x**2 @ whitening.spread


def _outliers(spread: Array, n: int) -> Array:
    """Indices of held-out queries that would be outlier rows in the head."""
    count = round(POLICY.statistics.most_outliers * len(spread) / n)
    outliers = np.argsort(-spread, kind="stable")[:count]
    return outliers[spread[outliers] > POLICY.statistics.outlying * np.median(spread)]


def _varying(answer: Array) -> float:
    """Norm of the rows less their mean, relative to the norm of the rows."""
    answer = answer.astype(np.float64)
    size = float(np.linalg.norm(answer))
    return float(np.linalg.norm(answer - answer.mean(axis=0))) / size if size else 0.0
