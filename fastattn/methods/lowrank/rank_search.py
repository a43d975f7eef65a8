"""How many polynomials or landmarks a head needs: one pilot, then a trace.

A small structure over a few keys gives an error on queries that were held out. From
there the error follows what is left of the trace of the kernel of the keys, which a
pivoted Cholesky factorization, or the energies of the polynomials, give for any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastattn.methods.lowrank.basis import Basis, Hermite
from fastattn.methods.lowrank.landmarks import PivotedCholesky
from fastattn.methods.lowrank.pilots import Pilots
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.problem.head import Head
from sketching._lib.arrays import Array

# logits of a larger variance, over the whole head, are not worth a pilot
LARGEST_VARIANCE = 4.0
# nor are heads whose error comes from fewer of the queries than this share
_LEAST_SHARE = 0.1
# a pilot that misses the tolerance by this factor ends the search
_HOPELESS = 6.0
# so does this factor for the polynomials of a pilot, which are more to begin with
_FAR = 8.0
# keys that landmarks are drawn from: at least and at most, one in so many between;
# they are factorized in parts
_PIVOT_KEYS = 1152, 4096
_PIVOT_SHARE = 8
_PARTS = 2
# landmarks of a first pilot, polynomials of the other
_LANDMARKS = 64
_RANK = 128
# indices that are looked at before twice as many, and then all, and the share taken
# beyond what is likely to be enough: a pilot tells the error of any prefix, but of no
# more
_MANY = 640
_MORE = 1.2
# a share of the trace, and an error, that are no more than rounding
_NOTHING = 1e-7
_TINY = 1e-30
# the error falls faster than the root of the trace, and so much faster at last than
# from the first pilot on, on a doubly logarithmic scale
_BEND = 2.1
_FASTER = 1.5
# parts of the keys of a pilot: few keys flatter no polynomial, but blame landmarks
_POLYNOMIAL_KEYS = 2
_LANDMARK_KEYS = 3
# where a step went further than it had to: how close to the aim is close enough, the
# share that must be left for another trial, of polynomials and of landmarks, which
# cost a solution each, and the most trials
_TIGHT = 0.98
_WORTHWHILE = 0.97, 0.93
_PROBES = 8
# the least slope that is believed: two errors may be alike by chance
_FLATTEST = 0.1
# the largest rank that is ever planned, one for so many logits
_LARGEST_RANK = 2304
_LOGITS = 1 << 16
# keys that energies of many polynomials are summed over
_ENERGY_KEYS = 512
# traces go on to fall up to this much faster, on a doubly logarithmic scale: than up to
# the first pilot, and than from there on
_STEEPER = 4.0, 2.0


@dataclass(frozen=True, slots=True, eq=False)
class RankEstimate:
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


def search_ranks(
    head: Head,
    sample: PlanningSample,
    tol: float,
    rng: np.random.Generator,
    cost: Callable[[int, int], float],
    limit: float,
    *,
    whitening: Whitening | None = None,
    landmarks: bool = True,
) -> list[RankEstimate]:
    """Find the least sizes that are predicted to meet a tolerance.

    Landmarks with a constant, and polynomials without landmarks, are looked at; the
    mixed sizes were rarely the cheapest.

    Parameters
    ----------
    head, sample : Head, PlanningSample
        One head and a sample of it.
    tol : float
        Relative Frobenius error that is allowed.
    rng : Generator
        Draws landmarks.
    cost : callable
        Predicted cost from a rank and a number of landmarks, in any unit.
    limit : float
        Sizes that cost more are of no interest.
    whitening : Whitening, optional
        That of the sample, where it is known.
    landmarks : bool, default True
        Whether landmarks are looked at.

    Returns
    -------
    list of Prediction
        Those that were accepted, the cheapest first; else the one that came nearest.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        whitening = Whitening.fit(sample) if whitening is None else whitening
        search = _RankSearch(head, sample, whitening, tol, rng, cost, limit)
        first = search.start()
        if first is not None:
            return [first]
        found = [search.polynomials()]
        # landmarks are looked for where they may be cheaper by half
        search.limit = found[0].cost / 2 if found[0].accepted else limit
        if landmarks and (search.landmarks_may_pay or not found[0].accepted):
            found.append(search.landmarks())
    accepted = [x for x in found if x.accepted]
    if accepted:
        return sorted(accepted, key=lambda x: x.cost)
    return [min(found, key=lambda x: x.error)]


class _RankSearch:
    """The pilots and traces of one head."""

    def __init__(
        self,
        head: Head,
        sample: PlanningSample,
        whitening: Whitening,
        tol: float,
        rng: np.random.Generator,
        cost: Callable[[int, int], float],
        limit: float,
    ) -> None:
        self.sample, self.tol, self.rng = sample, tol, rng
        self.cost, self.limit = cost, limit
        self.whitening = whitening
        self.pilots = Pilots(head, sample, self.whitening, tol)
        n, m, _, _ = head.sizes
        self.keys = min(max(m // _PIVOT_SHARE, _PIVOT_KEYS[0]), _PIVOT_KEYS[1])
        self.landmarks_may_pay = True
        self.largest_rank = min(max(n * m // _LOGITS, _RANK), _LARGEST_RANK)

    def start(self) -> RankEstimate | None:
        """Run the pilot of a few landmarks, unless that is ruled out already."""
        reason = self._refusal()
        if reason:
            return RankEstimate(1, 0, math.inf, self.cost(1, 0), reason, None)
        self.constant = Hermite.of(self.whitening.spread, 1)
        self.narrow = Basis.fitting(self.whitening, self.constant, landmarks=True)
        y, log_weight = self.narrow.coordinates(self.sample.key[: self.keys])
        self.pivots = PivotedCholesky(y, log_weight, self.constant, self.rng, _PARTS)
        self.pivots.add_batch(_LANDMARKS)
        key, value = self.pilots.subsample(1)
        few = replace(self.sample, key=key, value=value)
        marks = self.pivots.landmarks
        self.empty = LowRank.over(self.narrow, self.constant, marks, few)
        self.error = self.pilots.estimate_error(self.pilots.fill(self.empty, 1), 1)
        return None

    def landmarks(self) -> RankEstimate:
        """A constant and as many landmarks as it takes."""
        pivots, empty, error = self.pivots, self.empty, self.error
        most = self._most(lambda size: (1, size), 2 * pivots.most // 3)
        size = len(pivots)
        if size > most and error <= _HOPELESS * self.tol:
            return self._end(empty, error, "other sizes cost less")
        hopeful = error <= _HOPELESS * self.tol
        share = min(self.pilots.aim / max(error, _TINY), 1.0)
        left = pivots.residual_trace_ratio * share ** (1 / _BEND)
        grown = hopeful and _add_pivots(pivots, left, most)
        while grown and error <= _HOPELESS * self.tol:
            before, size = (size, error), len(pivots)
            empty = self._with_landmarks(size)
            filled = self.pilots.fill(empty, _LANDMARK_KEYS)
            error = self.pilots.estimate_error(filled, _LANDMARK_KEYS)
            if filled is not None and error <= self.pilots.enough:
                return self._least(filled, error, before, _LANDMARK_KEYS)
            grown = self._continue(before, (size, error), most)
        if not error <= _HOPELESS * self.tol:
            reason = f"{size} landmarks err by {error:.1e} in a pilot"
        elif error <= self.pilots.last:
            reason = ""
        else:
            reason = _too_many(most, "landmarks")
        return self._end(empty, error, reason)

    def _continue(
        self, before: tuple[int, float], now: tuple[int, float], most: int
    ) -> bool:
        """Add as many pivots as two errors ask for, if they are not too many."""
        if not (now[0] > before[0] and _TINY < now[1] < before[1]):
            return False
        slope = _FASTER * math.log(before[1] / now[1]) / math.log(now[0] / before[0])
        slope = max(slope, _FLATTEST)
        for wanted in (self.pilots.aim, self.pilots.last):
            # nothing more to do for what is met, though not comfortably
            if now[1] <= wanted:
                return False
            size = now[0] * (now[1] / wanted) ** (1 / slope)
            if size <= most:
                return self.pivots.add_until(math.ceil(size))
        return False

    def polynomials(self) -> RankEstimate:
        """As many polynomials as it takes, without landmarks."""
        most = self._most(lambda size: (size, 0), self.largest_rank)
        few = min(_RANK, most)
        hermite, left = self._indices(few)
        # the pilot of the landmarks tells whether one of the polynomials may pay
        expected = (
            self.error
            * float(left[-1])
            / max(self.pivots.residual_trace_ratio, _NOTHING)
        )
        if not expected <= _HOPELESS * self.tol:
            reason = f"{few} polynomials leave too much of the kernel"
            return RankEstimate(few, 0, math.inf, self.cost(few, 0), reason, None)
        empty = self._without_landmarks(hermite)
        error = self.pilots.estimate_error(self.pilots.fill(empty, 1), 1)
        # as many as cost what the pilot of the landmarks did
        self.landmarks_may_pay = self.error < error
        if not error <= _FAR * self.tol:
            reason = f"{few} polynomials err by {error:.1e} in a pilot"
            return self._end(empty, error, reason)
        for _ in range(2):
            enough = self._enough(empty.rank, error, most)
            if enough is None:
                break
            known = empty.rank, error
            empty = self._without_landmarks(enough)
            filled = self.pilots.fill(empty, _POLYNOMIAL_KEYS)
            error = self.pilots.estimate_error(filled, _POLYNOMIAL_KEYS)
            if filled is not None and error <= self.pilots.enough:
                return self._least(filled, error, known, _POLYNOMIAL_KEYS)
        met = error <= self.pilots.last
        return self._end(empty, error, "" if met else _too_many(most, "polynomials"))

    def _enough(self, rank: int, error: float, most: int) -> Hermite | None:
        """Somewhat more indices than meet the aim, by the error of ``rank`` of them."""
        for many in dict.fromkeys(min(x, most) for x in (_MANY, 2 * _MANY, most)):
            hermite, left = self._indices(many)
            if rank <= many:
                unit = error / float(left[rank - 1])
                met = np.flatnonzero(unit * left <= self.pilots.aim)
                if len(met):
                    return hermite.prefix(min(math.ceil(_MORE * (met[0] + 1)), many))
        return None

    def _least(
        self, filled: LowRank, error: float, low: tuple[int, float], share: int
    ) -> RankEstimate:
        """The first functions of a structure that meet the aim by themselves.

        ``low`` is a number of functions with an error that is too large.
        """
        count, error = filled.rank + filled.landmarks, max(error, _TINY)
        if not (low[0] < count and low[1] > error):
            low = 1, max(1.0, 2 * error)
        marks = filled.landmarks > 0
        worth = _WORTHWHILE[marks]
        failed = False
        for _ in range(_PROBES if count > low[0] else 0):
            aim = _TIGHT * self.pilots.aim
            slope = math.log(low[1] / error) / math.log(count / low[0])
            slope = max(slope, _FLATTEST)
            size = math.ceil(count * min(error / max(aim, _TINY), 1.0) ** (1 / slope))
            if failed:
                # the error may fall in steps: a chord alone would creep
                size = max(size, (low[0] + count) // 2)
            size = max(size, low[0] + 1)
            if size > worth * count:
                break
            few = filled.first(size)
            now = self.pilots.estimate_error(few, share)
            failed = now > (self.pilots.enough if marks else self.pilots.aim)
            if failed:
                low = size, now
            else:
                filled, count, error = few, size, max(now, _TINY)
        return self._end(filled.emptied(), error, "")

    def _refusal(self) -> str:
        """Say what rules out a low rank before anything is tried."""
        variance = float(self.whitening.spread.sum())
        if not variance <= LARGEST_VARIANCE:
            return f"the variance of the logits is {variance:.1f}"
        if not self.whitening.share >= _LEAST_SHARE:
            return f"{self.whitening.share:.1%} of the queries make the error"
        if len(self.sample.held) == 0:
            return "there are too few queries to plan for"
        if self.cost(1, 1) > self.limit:
            return "a single landmark costs more than exact attention"
        return ""

    def _with_landmarks(self, size: int) -> LowRank:
        marks = self.pivots.landmarks[:size]
        return LowRank.over(self.narrow, self.constant, marks, self.sample)

    def _without_landmarks(self, hermite: Hermite) -> LowRank:
        whitening = Basis.fitting(self.whitening, hermite, landmarks=False)
        return LowRank.over(whitening, hermite, None, self.sample)

    def _most(self, sizes: Callable[[int], tuple[int, int]], cap: int) -> int:
        """The largest size up to ``cap`` that is within the cost allowed."""
        low, high = 1, cap
        while low < high:
            midpoint = (low + high + 1) // 2
            if self.cost(*sizes(midpoint)) <= self.limit:
                low = midpoint
            else:
                high = midpoint - 1
        return low

    def _indices(self, rank: int) -> tuple[Hermite, Array]:
        """Indices, and the root of the share of the trace that the first ones leave."""
        hermite = Hermite.of(self.whitening.spread, rank)
        y, log_weight = self.whitening.coordinates(self.sample.key[:_ENERGY_KEYS])
        weight = np.exp(log_weight - log_weight.max())
        taken = np.sum((hermite.features(y) * weight[:, None]) ** 2, axis=0)
        square = np.sum(y.astype(np.float64) ** 2, axis=1)
        whole = np.sum(np.exp(square) * weight.astype(np.float64) ** 2)
        left = 1 - np.cumsum(taken, dtype=np.float64) / whole
        return hermite, np.sqrt(np.maximum(left, _NOTHING**2))

    def _end(self, empty: LowRank, error: float, reason: str) -> RankEstimate:
        rank, landmarks = empty.rank, empty.landmarks
        return RankEstimate(
            rank, landmarks, error, self.cost(rank, landmarks), reason, empty
        )


def _add_pivots(pivots: PivotedCholesky, target: float, most: int) -> bool:
    """Add pivots until ``target`` is left of the trace, if that is within reach."""
    start, first = len(pivots), pivots.residual_trace_ratio
    # the constant alone leaves all of it
    if not _is_attainable(pivots, target, most, (1, 1.0), _STEEPER[0]):
        return False
    while pivots.add_batch(most):
        if pivots.residual_trace_ratio <= target:
            return True
        if not _is_attainable(pivots, target, most, (start, first), _STEEPER[1]):
            return False
    return False


def _is_attainable(
    pivots: PivotedCholesky,
    target: float,
    most: int,
    before: tuple[int, float],
    steeper: float,
) -> bool:
    """Whether the slope since ``before`` may lead to the target."""
    size, left = before
    if pivots.residual_trace_ratio <= target or len(pivots) <= size:
        return True
    slope = math.log(left / pivots.residual_trace_ratio) / math.log(len(pivots) / size)
    attainable = math.log(most / len(pivots)) * steeper * slope
    return math.log(pivots.residual_trace_ratio / target) <= attainable


def _too_many(most: int, what: str) -> str:
    return f"{most} {what}, the most that pay, leave too large an error"
