"""Errors of small structures, which tell how many functions a head needs.

A structure over a few keys answers queries that were held out. The share of them that
the answer will have computed exactly, because their logits spread most, is left out
here, too: it can hold most of the error.
"""

import math
from dataclasses import replace

import numpy as np

from fastattn.certificates.ratio_estimate import FIRST, SECOND, importance_probabilities
from fastattn.certificates.sampled import ROWS, second_rows
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.problem.head import Head
from fastattn.problem.row_statistics import MOST_OUTLIERS, OUTLYING, series_squares
from sketching._lib.arrays import Array, device_of, to_host
from sketching._lib.certificate import RefusalError

# what is aimed at, as a share of the tolerance: before anything is known, and of what
# a certificate leaves
_CAUTION = 0.66
_BOLD = 0.9, 0.95
# relative deviation of the squared errors beyond which half is believed
_HEAVY = 2.5
# queries and keys of a first pilot; others have all queries that are held out, and so
# many times the keys
_QUERIES = 128
_KEYS = 2048
# heads with no more keys get half of everything, since planning must stay cheap
_FEW_KEYS = 16384
# rows over all keys that show how large answers are
_DRIFT_ROWS = 32


class Pilots:
    """The pilots of one head, and the error to aim at by what they show.

    Parameters
    ----------
    head, sample, whitening : Head, PlanningSample, Whitening
        One head, a sample of it, and the coordinates fitted to that.
    tol : float
        Relative Frobenius error that is allowed.
    """

    def __init__(
        self, head: Head, sample: PlanningSample, whitening: Whitening, tol: float
    ) -> None:
        self.head, self.sample, self.tol = head, sample, tol
        spread = _spread(sample.held, whitening)
        outliers = _outliers(spread, head.sizes[0])
        self.held = np.delete(sample.held, outliers, axis=0)
        squares = series_squares(np.delete(spread, outliers))
        self.probabilities = importance_probabilities(squares, ROWS)
        self.keys = _KEYS // 2 if head.sizes[1] <= _FEW_KEYS else _KEYS
        self.aim = self.last = _CAUTION * tol
        self._truth: dict[int, tuple[Array, float]] = {}
        self._whole: float | None = None

    @property
    def enough(self) -> float:
        """An error that is not worth another pilot."""
        return 0.75 * self.aim + 0.25 * self.last

    def subsample(self, share: int) -> tuple[Array, Array]:
        """So many parts of the keys of a pilot, and their values."""
        # the last keys: landmarks come from the first
        some = slice(-share * self.keys, None)
        return self.sample.key[some], self.sample.value[some]

    def fill(self, empty: LowRank, share: int) -> LowRank | None:
        """Insert the keys of a pilot; None where that fails."""
        try:
            return empty.insert(*self.subsample(share))
        except RefusalError:
            return None

    def estimate_error(self, filled: LowRank | None, share: int) -> float:
        """Error of a structure that holds the keys of a pilot."""
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
        """True answers over the keys of a pilot, and their size over all keys."""
        if share not in self._truth:
            query = self.held if share > 1 else self.held[:_QUERIES]
            truth, _ = Head(query, *self.subsample(share), self.sample.scale).attend()
            size = float(np.linalg.norm(truth.astype(np.float64)))
            size *= self._drift(truth) if share > 1 else 1.0
            self._truth[share] = truth, size
        return self._truth[share]

    def _drift(self, part: Array) -> float:
        """How much larger answers over all keys are, next to what varies in them.

        The errors follow what varies. Where the rows share one mean, its size over few
        keys says little about its size over all.
        """
        if self._whole is None:
            head, few = self.head, self.held[:_DRIFT_ROWS]
            move = {"dtype": head.query.dtype, "device": device_of(head.query)}
            whole, _ = replace(head, query=head.xp.asarray(few, **move)).attend()
            self._whole = _varying(to_host(whole))
        varied = _varying(part[:_DRIFT_ROWS])
        return varied / self._whole if self._whole > 0 and varied > 0 else 1.0

    def _set_aim(self, squares: Array, reliable: Array) -> None:
        """Leave what a certificate adds for its sampling, after one look and after two.

        ``aim`` is what a first sample of rows should be content with; ``last`` asks for
        a second one, which costs more.
        """
        mean = float(squares.mean())
        # relative first: squares of squares may underflow
        relative = squares / mean if mean > 0 else np.ones(len(squares))
        weighted = relative**2 / (
            self.probabilities[reliable] * len(self.probabilities)
        )
        spread = math.sqrt(max(float(weighted.mean()) - 1, 0.0))
        # a few rows can feign a heavy tail
        spread = min(spread, (spread + _HEAVY) / 2)
        both = ROWS + second_rows(self.head.sizes[0])
        one, two = (
            margin.expected(spread, 1.0, count)
            for margin, count in ((FIRST, ROWS), (SECOND, both))
        )
        self.aim, self.last = (
            share * self.tol / math.sqrt(1 + more)
            for share, more in zip(_BOLD, (one, min(one, two)), strict=True)
        )


def _spread(query: Array, whitening: Whitening) -> Array:
    """How much the logits of each query vary over the keys."""
    x = query.astype(np.float64) @ whitening.to_query[:, :-1] - whitening.origin[:-1]
    return x**2 @ whitening.spread


def _outliers(spread: Array, n: int) -> Array:
    """The share of the queries that is computed exactly whatever the method."""
    count = round(MOST_OUTLIERS * len(spread) / n)
    outliers = np.argsort(-spread, kind="stable")[:count]
    return outliers[spread[outliers] > OUTLYING * np.median(spread)]


def _varying(answer: Array) -> float:
    """The share of rows that their mean does not explain."""
    answer = answer.astype(np.float64)
    size = float(np.linalg.norm(answer))
    return float(np.linalg.norm(answer - answer.mean(axis=0))) / size if size else 0.0
