"""How many polynomials or landmarks a head needs: one pilot, then a trace.

A small structure over a few keys gives an error on queries that were held out. From
there the error follows what is left of the trace of the kernel of the keys, which a
pivoted Cholesky factorization, or the energies of the polynomials, give for any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastattn._basis import Basis, Hermite
from fastattn._frame import Frame, Sample
from fastattn._landmarks import Pivots
from fastattn._lowrank import PIVOT_KEYS, LowRank
from fastattn._problem import Head
from fastattn._sampling import MARGIN, ROWS
from sketching._lib.arrays import Array, device_of, to_host
from sketching._lib.certificate import RefusalError

# what is aimed at, as a share of the tolerance, before anything is known and at most
_CAUTION = 0.75
_BOLD = 0.93
# standard errors that a pilot may be off by
_DOUBT = 1.5
# logits of a larger variance, over the whole head, are not worth a pilot
_LARGEST_VARIANCE = 4.0
# nor are heads whose error comes from fewer of the queries than this share
_LEAST_SHARE = 0.1
# a pilot that misses the tolerance by this factor ends the search
_HOPELESS = 6.0
# so does this factor for the polynomials of a pilot, which are more to begin with
_FAR = 8.0
# pilots: landmarks of one, polynomials of the other, queries and keys; the pilot of
# what is about to be taken has all queries that are held out, and twice the keys
_LANDMARKS = 64
_RANK = 128
_PILOT_QUERIES = 128
_PILOT_KEYS = 2048
# rows over all keys that show how large answers are
_DRIFT_ROWS = 64
# a share of the trace that is no more than rounding
_NOTHING = 1e-7
# heads with no more keys get half of everything, since planning must stay cheap
_SMALL = 16384
# the error falls faster than the root of the trace on real heads, slower on flat ones
_BEND = 1.7
_LEAST_BEND = 0.4
# where a step went further than it had to: what is aimed at instead, as a share of the
# aim, and the share of the landmarks that must be left for another pilot to pay
_TIGHT = 0.95
_WORTHWHILE = 0.8
# the largest rank that is ever planned, one for so many logits
_LARGEST_RANK = 2304
_LOGITS = 1 << 16
# keys that energies of many polynomials are summed over
_ENERGY_KEYS = 512
# traces go on to fall up to this much faster, on a doubly logarithmic scale
_STEEPER = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """One choice of sizes with the error and the cost expected of it.

    Parameters
    ----------
    rank, landmarks : int
        Numbers of polynomials and of landmarks.
    error : float
        Relative Frobenius error; infinite where there was no pilot.
    cost : float
        In the units of the caller.
    reason : str
        Why it was refused; empty where it was not.
    empty : LowRank or None
        The structure without keys; None where it was refused before there was one.
    """

    rank: int
    landmarks: int
    error: float
    cost: float
    reason: str
    empty: LowRank | None

    @property
    def accepted(self) -> bool:
        """Whether it is predicted to meet the tolerance within the cost allowed."""
        return not self.reason


def predict(
    head: Head,
    sample: Sample,
    tol: float,
    rng: np.random.Generator,
    cost: Callable[[int, int], float],
    limit: float,
) -> list[Prediction]:
    """Find the least sizes that are predicted to meet a tolerance.

    Landmarks with a constant, and polynomials without landmarks, are looked at; the
    mixed sizes were rarely the cheapest.

    Parameters
    ----------
    head, sample : Head, Sample
        One head and a sample of it.
    tol : float
        Relative Frobenius error that is allowed.
    rng : Generator
        Draws landmarks.
    cost : callable
        Predicted cost from a rank and a number of landmarks, in any unit.
    limit : float
        Sizes that cost more are of no interest.

    Returns
    -------
    list of Prediction
        Those that were accepted, the cheapest first; else the one that came nearest.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        search = _Search(head, sample, tol, rng, cost, limit)
        first = search.start()
        if first is not None:
            return [first]
        found = [search.polynomials()]
        # landmarks are looked for where they may be cheaper by half
        search.limit = found[0].cost / 2 if found[0].accepted else limit
        found.append(search.landmarks())
    accepted = [x for x in found if x.accepted]
    if accepted:
        return sorted(accepted, key=lambda x: x.cost)
    return [min(found, key=lambda x: x.error)]


class _Search:
    """The pilots and traces of one head."""

    def __init__(
        self,
        head: Head,
        sample: Sample,
        tol: float,
        rng: np.random.Generator,
        cost: Callable[[int, int], float],
        limit: float,
    ) -> None:
        self.head, self.sample, self.tol, self.rng = head, sample, tol, rng
        self.cost, self.limit = cost, limit
        self.frame = Frame.of(sample)
        n, m, _, _ = head.sizes
        self.small = m <= _SMALL
        self.keys = _PILOT_KEYS // 2 if self.small else _PILOT_KEYS
        self.truth: dict[bool, tuple[Array, float]] = {}
        self.aim = _CAUTION * tol
        self.largest_rank = min(max(n * m // _LOGITS, _RANK), _LARGEST_RANK)

    def start(self) -> Prediction | None:
        """Run the pilot of a few landmarks, unless that is ruled out already."""
        reason = self._refusal()
        if reason:
            return Prediction(1, 0, math.inf, self.cost(1, 0), reason, None)
        self.constant = Hermite.of(self.frame.spread, 1)
        self.narrow = Basis.fitting(self.frame, self.constant, landmarks=True)
        keys = PIVOT_KEYS // 2 if self.small else PIVOT_KEYS
        y, log_weight = self.narrow.coordinates(self.sample.key[:keys])
        self.pivots = Pivots(y, log_weight, self.constant, self.rng)
        self.pivots.grow(_LANDMARKS)
        few = slice(-self.keys, None)
        some = replace(
            self.sample, key=self.sample.key[few], value=self.sample.value[few]
        )
        marks = self.pivots.landmarks
        self.empty = LowRank.over(self.narrow, self.constant, marks, some)
        self.error = self._pilot(self.empty)
        return None

    def landmarks(self) -> Prediction:
        """A constant and as many landmarks as it takes."""
        pivots, empty, error, bend = self.pivots, self.empty, self.error, _BEND
        most = self._most(lambda size: (1, size), 2 * pivots.most // 3)
        size, left = len(pivots), pivots.left
        if size > most and error <= _HOPELESS * self.tol:
            return self._end(empty, error, "other sizes cost less")
        while True:
            if not error <= _HOPELESS * self.tol:
                reason = f"{size} landmarks err by {error:.1e} in a pilot"
                return self._end(empty, error, reason)
            if error > self.aim:
                target = left * (self.aim / error) ** (1 / bend)
                if not _grow(pivots, target, most):
                    return self._end(empty, error, _too_many(f"{most} landmarks"))
            size = len(pivots)
            before = left, error
            empty, left = self._with_landmarks(size), pivots.left
            error = self._pilot(empty, thorough=True)
            if left < before[0]:
                # the next step follows what this one did for the error
                slope = math.log(before[1] / error) / math.log(before[0] / left)
                bend = min(max(slope, _LEAST_BEND), _BEND)
            if error <= self.aim:
                return self._fewer(empty, error, bend)

    def _fewer(self, empty: LowRank, error: float, bend: float) -> Prediction:
        """Take back the landmarks that the last step added beyond need."""
        left = self.pivots.left * (_TIGHT * self.aim / error) ** (1 / bend)
        size = self.pivots.size_for(left)
        if size < _WORTHWHILE * empty.landmarks:
            few = self._with_landmarks(size)
            now = self._pilot(few, thorough=True)
            if now <= self.aim:
                return self._end(few, now, "")
        return self._end(empty, error, "")

    def polynomials(self) -> Prediction:
        """As many polynomials as it takes, without landmarks."""
        most = self._most(lambda size: (size, 0), _RANK)
        hermite = Hermite.of(self.frame.spread, most)
        left = self._energies(hermite)
        # the pilot of the landmarks tells whether one of the polynomials may pay
        guess = self.error * float(left[-1]) / max(self.pivots.left, _NOTHING)
        if not guess <= _HOPELESS * self.tol:
            reason = f"{most} polynomials leave too much of the kernel"
            return Prediction(most, 0, math.inf, self.cost(most, 0), reason, None)
        empty = self._without_landmarks(hermite)
        error = self._pilot(empty)
        if not error <= _FAR * self.tol:
            reason = f"{most} polynomials err by {error:.1e} in a pilot"
            return self._end(empty, error, reason)
        if error > self.aim:
            most = self._most(lambda size: (size, 0), self.largest_rank)
            hermite = Hermite.of(self.frame.spread, most)
            left = self._energies(hermite)
        left = np.maximum(left, _NOTHING)
        unit = error / float(left[empty.rank - 1])
        for thorough in (True, False):
            enough = np.flatnonzero(unit * left <= self.aim)
            rank = int(enough[0]) + 1 if len(enough) else most
            empty = self._without_landmarks(hermite.prefix(rank))
            if thorough and len(enough):
                unit = self._pilot(empty, thorough=True) / float(left[rank - 1])
        reason = "" if len(enough) else _too_many(f"{most} polynomials")
        return self._end(empty, unit * float(left[rank - 1]), reason)

    def _refusal(self) -> str:
        """Say what rules out a low rank before anything is tried."""
        variance = float(self.frame.spread.sum())
        if not variance <= _LARGEST_VARIANCE:
            return f"the variance of the logits is {variance:.1f}"
        if not self.frame.share >= _LEAST_SHARE:
            return f"{self.frame.share:.1%} of the queries make the error"
        if len(self.sample.held) == 0:
            return "there are too few queries to plan for"
        if self.cost(1, 1) > self.limit:
            return "a single landmark costs more than exact attention"
        return ""

    def _with_landmarks(self, size: int) -> LowRank:
        marks = self.pivots.landmarks[:size]
        return LowRank.over(self.narrow, self.constant, marks, self.sample)

    def _without_landmarks(self, hermite: Hermite) -> LowRank:
        frame = Basis.fitting(self.frame, hermite, landmarks=False)
        return LowRank.over(frame, hermite, None, self.sample)

    def _pilot(self, empty: LowRank, *, thorough: bool = False) -> float:
        """Error of a structure over a few keys, on queries that were held out."""
        double = 2 if thorough else 1
        query = self.sample.held if thorough else self.sample.held[:_PILOT_QUERIES]
        # the last keys: landmarks come from the first
        some = slice(-double * self.keys, None)
        key, value = self.sample.key[some], self.sample.value[some]
        if thorough not in self.truth:
            truth, _ = Head(query, key, value, self.sample.scale).attend()
            size = float(np.linalg.norm(truth.astype(np.float64)))
            size *= self._drift(truth) if thorough else 1.0
            self.truth[thorough] = truth, size
        truth, size = self.truth[thorough]
        try:
            answer, _, good = empty.insert(key, value).query(query)
        except RefusalError:
            return math.inf
        if not good.any():
            return math.inf
        squares = np.sum((answer - truth)[good].astype(np.float64) ** 2, axis=1)
        if thorough:
            self._set_aim(squares)
        return math.sqrt(float(squares.sum())) / size if size else 0.0

    def _drift(self, part: Array) -> float:
        """How much larger answers over all keys are, next to what varies in them.

        The errors follow what varies. Where the rows share one mean, its size over few
        keys says little about its size over all.
        """
        head, few = self.head, self.sample.held[:_DRIFT_ROWS]
        move = {"dtype": head.query.dtype, "device": device_of(head.query)}
        whole, _ = replace(head, query=head.xp.asarray(few, **move)).attend()
        varies, varied = _varying(to_host(whole)), _varying(part[:_DRIFT_ROWS])
        return varied / varies if varies > 0 and varied > 0 else 1.0

    def _set_aim(self, squares: Array) -> None:
        """Leave what the certificate will add for its sampling, and a pilot's doubt."""
        mean = float(squares.mean())
        spread = float(squares.std()) / mean if mean > 0 else 0.0
        doubt = MARGIN / math.sqrt(ROWS) + _DOUBT / math.sqrt(len(squares))
        self.aim = self.tol * _BOLD / math.sqrt(1 + spread * doubt)

    def _most(self, sizes: Callable[[int], tuple[int, int]], cap: int) -> int:
        """The largest size up to ``cap`` that is within the cost allowed."""
        low, high = 1, cap
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(*sizes(middle)) <= self.limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _energies(self, hermite: Hermite) -> Array:
        """Root of the share of the trace that the first polynomials leave."""
        y, log_weight = self.frame.coordinates(self.sample.key[:_ENERGY_KEYS])
        weight = np.exp(log_weight - log_weight.max())
        taken = np.sum((hermite.features(y) * weight[:, None]) ** 2, axis=0)
        square = np.sum(y.astype(np.float64) ** 2, axis=1)
        whole = np.sum(np.exp(square) * weight.astype(np.float64) ** 2)
        left = 1 - np.cumsum(taken, dtype=np.float64) / whole
        return np.sqrt(np.maximum(left, 0.0))

    def _end(self, empty: LowRank, error: float, reason: str) -> Prediction:
        rank, landmarks = empty.rank, empty.landmarks
        return Prediction(
            rank, landmarks, error, self.cost(rank, landmarks), reason, empty
        )


def _varying(answer: Array) -> float:
    """The share of rows that their mean does not explain."""
    answer = answer.astype(np.float64)
    size = float(np.linalg.norm(answer))
    return float(np.linalg.norm(answer - answer.mean(axis=0))) / size if size else 0.0


def _grow(pivots: Pivots, target: float, most: int) -> bool:
    """Add pivots until ``target`` is left of the trace, if that is within reach."""
    start, first = len(pivots), pivots.left
    # the constant alone leaves all of it
    if not _within_reach(pivots, target, most, (1, 1.0)):
        return False
    while pivots.grow(most):
        if pivots.left <= target:
            return True
        if not _within_reach(pivots, target, most, (start, first)):
            return False
    return False


def _within_reach(
    pivots: Pivots, target: float, most: int, before: tuple[int, float]
) -> bool:
    """Whether the slope since ``before`` may lead to the target."""
    size, left = before
    if pivots.left <= target or len(pivots) <= size:
        return True
    slope = math.log(left / pivots.left) / math.log(len(pivots) / size)
    reach = math.log(most / len(pivots)) * _STEEPER * slope
    return math.log(pivots.left / target) <= reach


def _too_many(what: str) -> str:
    return f"{what}, the most that pay, leave too large an error"
