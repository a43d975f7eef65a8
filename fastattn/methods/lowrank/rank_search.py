"""Search for the least number of polynomials or landmarks that a head needs.

A pilot run of a small low rank gives an error on held-out queries. The error at other
ranks is extrapolated from the residual trace of the kernel of the keys, which pivoted
Cholesky factorization (or the energies of polynomials) gives at every rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.costs.power_law import PowerLaw
from fastattn.methods.lowrank.basis import Basis, Hermite
from fastattn.methods.lowrank.landmarks import PivotedCholesky
from fastattn.methods.lowrank.pilots import Pilots
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample, Whitening
from fastattn.problem.head import Head
from sketching._lib.arrays import Array

# a share of the trace, and an error, that are rounding only
_NOTHING = 1e-7
_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class RankEstimate:
    """Rank and landmarks with predicted error and cost.

    Parameters
    ----------
    rank, landmarks : int
        Numbers of polynomials and of landmarks.
    error : float
        Predicted relative Frobenius error; infinite where there was no pilot run.
    cost : float
        Predicted cost, in the unit of the caller.
    reason : str
        Why it is refused; empty if it is accepted.
    empty : LowRank or None
        The structure without keys; None where it was refused before a pilot run.
    """

    rank: int
    landmarks: int
    error: float
    cost: float
    reason: str
    empty: LowRank | None

    @property
    def accepted(self) -> bool:
        """Whether it is predicted to meet the tolerance within the budget."""
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
    """Find the least rank, or number of landmarks, predicted to meet a tolerance.

    Two families are searched: landmarks with the constant polynomial, and polynomials
    without landmarks; mixtures were rarely the cheapest.

    Parameters
    ----------
    head, sample : Head, PlanningSample
        One head and a sample of it.
    tol : float
        Tolerance, the relative Frobenius error.
    rng : Generator
        Draws landmarks.
    cost : callable
        Predicted cost of a rank and a number of landmarks, in any unit.
    limit : float
        Budget: the largest cost of interest, in the same unit.
    whitening : Whitening, optional
        The whitening fitted to the sample, where it is known.
    landmarks : bool, default True
        Whether landmarks are searched.

    Returns
    -------
    list of RankEstimate
        The accepted ones, cheapest first; else the one with the least error.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        whitening = Whitening.fit(sample) if whitening is None else whitening
        search = _RankSearch(head, sample, whitening, tol, rng, cost, limit)
        first = search.start()
        if first is not None:
            return [first]
        found = [search.polynomials()]
        # landmarks are searched where they may cost less than half
        search.limit = found[0].cost / 2 if found[0].accepted else limit
        if landmarks and (search.landmarks_may_pay or not found[0].accepted):
            found.append(search.landmarks())
    accepted = [x for x in found if x.accepted]
    if accepted:
        return sorted(accepted, key=lambda x: x.cost)
    return [min(found, key=lambda x: x.error)]


class _RankSearch:
    """The state of the search for one head: pilot runs and residual traces."""

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
        policy = POLICY.low_rank
        self.sample, self.tol, self.rng = sample, tol, rng
        self.cost, self.limit = cost, limit
        self.whitening = whitening
        self.pilots = Pilots(head, sample, self.whitening, tol)
        n, m, _, _ = head.sizes
        self.keys = min(
            max(m // policy.pivot_share, policy.pivot_keys[0]), policy.pivot_keys[1]
        )
        self.landmarks_may_pay = True
        self.largest_rank = min(
            max(n * m // policy.logits, policy.rank), policy.largest_rank
        )

    def start(self) -> RankEstimate | None:
        """Make a pilot run with few landmarks, unless a low rank is ruled out."""
        policy = POLICY.low_rank
        reason = self._refusal()
        if reason:
            return RankEstimate(1, 0, math.inf, self.cost(1, 0), reason, None)
        self.constant = Hermite.of(self.whitening.spread, 1)
        self.narrow = Basis.fitting(self.whitening, self.constant, landmarks=True)
        y, log_weight = self.narrow.coordinates(self.sample.key[: self.keys])
        self.pivots = PivotedCholesky(
            y, log_weight, self.constant, self.rng, policy.parts
        )
        self.pivots.add_batch(policy.landmarks)
        key, value = self.pilots.subsample(1)
        few = replace(self.sample, key=key, value=value)
        marks = self.pivots.landmarks
        self.empty = LowRank.over(self.narrow, self.constant, marks, few)
        self.error = self.pilots.estimate_error(self.pilots.fill(self.empty, 1), 1)
        return None

    def landmarks(self) -> RankEstimate:
        """Search the least number of landmarks, with the constant polynomial."""
        policy = POLICY.low_rank
        pivots, empty, error = self.pivots, self.empty, self.error
        most = self._most(lambda size: (1, size), 2 * pivots.most // 3)
        size = len(pivots)
        if size > most and error <= policy.hopeless * self.tol:
            return self._end(empty, error, "landmarks exceed the budget")
        hopeful = error <= policy.hopeless * self.tol
        law = PowerLaw(pivots.residual_trace_ratio, max(error, _TINY), policy.bend)
        left = law.solve(min(self.pilots.aim, law.y))
        grown = hopeful and _add_pivots(pivots, left, most)
        while grown and error <= policy.hopeless * self.tol:
            before, size = (size, error), len(pivots)
            empty = self._with_landmarks(size)
            filled = self.pilots.fill(empty, policy.landmark_keys)
            error = self.pilots.estimate_error(filled, policy.landmark_keys)
            if filled is not None and error <= self.pilots.enough:
                return self._least(filled, error, before, policy.landmark_keys)
            grown = self._continue(before, (size, error), most)
        if not error <= policy.hopeless * self.tol:
            reason = f"{size} landmarks: error {error:.1e} in a pilot run"
        elif error <= self.pilots.last:
            reason = ""
        else:
            reason = _too_many(most, "landmarks")
        return self._end(empty, error, reason)

    def _continue(
        self, before: tuple[int, float], now: tuple[int, float], most: int
    ) -> bool:
        """Add as many pivots as extrapolation from two errors needs, if affordable."""
        policy = POLICY.low_rank
        if not (now[0] > before[0] and _TINY < now[1] < before[1]):
            return False
        law = PowerLaw.fit(before, now, steeper=policy.faster, most=-policy.flattest)
        for wanted in (self.pilots.aim, self.pilots.last):
            # a target that is met already needs no more pivots
            if now[1] <= wanted:
                return False
            size = law.solve(wanted)
            if size <= most:
                return self.pivots.add_until(math.ceil(size))
        return False

    def polynomials(self) -> RankEstimate:
        """Search the least number of polynomials, without landmarks."""
        policy = POLICY.low_rank
        most = self._most(lambda size: (size, 0), self.largest_rank)
        few = min(policy.rank, most)
        hermite, left = self._indices(few)
        # the pilot run of landmarks predicts whether one of polynomials can succeed
        expected = (
            self.error
            * float(left[-1])
            / max(self.pivots.residual_trace_ratio, _NOTHING)
        )
        if not expected <= policy.hopeless * self.tol:
            reason = f"{few} polynomials leave too large a residual trace of the kernel"
            return RankEstimate(few, 0, math.inf, self.cost(few, 0), reason, None)
        empty = self._without_landmarks(hermite)
        error = self.pilots.estimate_error(self.pilots.fill(empty, 1), 1)
        # polynomials of the same cost as the pilot run of landmarks
        self.landmarks_may_pay = self.error < error
        if not error <= policy.far * self.tol:
            reason = f"{few} polynomials: error {error:.1e} in a pilot run"
            return self._end(empty, error, reason)
        for _ in range(2):
            enough = self._enough(empty.rank, error, most)
            if enough is None:
                break
            known = empty.rank, error
            empty = self._without_landmarks(enough)
            filled = self.pilots.fill(empty, policy.polynomial_keys)
            error = self.pilots.estimate_error(filled, policy.polynomial_keys)
            if filled is not None and error <= self.pilots.enough:
                return self._least(filled, error, known, policy.polynomial_keys)
        met = error <= self.pilots.last
        return self._end(empty, error, "" if met else _too_many(most, "polynomials"))

    def _enough(self, rank: int, error: float, most: int) -> Hermite | None:
        """Indices predicted to meet the aim, and some more; None if above ``most``."""
        policy = POLICY.low_rank
        for many in dict.fromkeys(
            min(x, most) for x in (policy.many, 2 * policy.many, most)
        ):
            hermite, left = self._indices(many)
            if rank <= many:
                unit = error / float(left[rank - 1])
                met = np.flatnonzero(unit * left <= self.pilots.aim)
                if len(met):
                    return hermite.prefix(
                        min(math.ceil(policy.more * (met[0] + 1)), many)
                    )
        return None

    def _least(
        self, filled: LowRank, error: float, low: tuple[int, float], share: int
    ) -> RankEstimate:
        """Reduce a structure to its first basis functions that still meet the aim.

        ``low`` is a number of functions and their error, which is too large.
        """
        policy = POLICY.low_rank
        count, error = filled.rank + filled.landmarks, max(error, _TINY)
        if not (low[0] < count and low[1] > error):
            low = 1, max(1.0, 2 * error)
        marks = filled.landmarks > 0
        least_gain = policy.worthwhile[marks]
        failed = False
        for _ in range(policy.trials if count > low[0] else 0):
            aim = policy.tight * self.pilots.aim
            law = PowerLaw.fit(low, (count, error), most=-policy.flattest)
            size = math.ceil(law.solve(max(aim, error)))
            if failed:
                # the error may fall in steps: bisect where secant steps are too short
                size = max(size, (low[0] + count) // 2)
            size = max(size, low[0] + 1)
            if size > least_gain * count:
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
        """Return why a low rank is ruled out before a pilot run, or an empty string."""
        variance = float(self.whitening.spread.sum())
        if not variance <= POLICY.low_rank.largest_variance:
            return f"the logit variance is {variance:.1f}"
        if not self.whitening.share >= POLICY.low_rank.least_share:
            return f"{self.whitening.share:.1%} of the queries cause most of the error"
        if len(self.sample.held) == 0:
            return "there are too few queries for a pilot run"
        if self.cost(1, 1) > self.limit:
            return "a single landmark exceeds the budget"
        return ""

    def _with_landmarks(self, size: int) -> LowRank:
        marks = self.pivots.landmarks[:size]
        return LowRank.over(self.narrow, self.constant, marks, self.sample)

    def _without_landmarks(self, hermite: Hermite) -> LowRank:
        whitening = Basis.fitting(self.whitening, hermite, landmarks=False)
        return LowRank.over(whitening, hermite, None, self.sample)

    def _most(self, sizes: Callable[[int], tuple[int, int]], cap: int) -> int:
        """The largest size up to ``cap`` within the budget."""
        low, high = 1, cap
        while low < high:
            midpoint = (low + high + 1) // 2
            if self.cost(*sizes(midpoint)) <= self.limit:
                low = midpoint
            else:
                high = midpoint - 1
        return low

    def _indices(self, rank: int) -> tuple[Hermite, Array]:
        """Indices, and root of residual trace over trace for each prefix of them."""
        hermite = Hermite.of(self.whitening.spread, rank)
        y, log_weight = self.whitening.coordinates(
            self.sample.key[: POLICY.low_rank.energy_keys]
        )
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
    """Add pivots until the residual trace ratio is ``target``, if attainable."""
    policy = POLICY.low_rank
    start, first = len(pivots), pivots.residual_trace_ratio
    # the constant polynomial alone leaves the whole trace
    if not _is_attainable(pivots, target, most, (1, 1.0), policy.steeper[0]):
        return False
    while pivots.add_batch(most):
        if pivots.residual_trace_ratio <= target:
            return True
        if not _is_attainable(pivots, target, most, (start, first), policy.steeper[1]):
            return False
    return False


def _is_attainable(
    pivots: PivotedCholesky,
    target: float,
    most: int,
    before: tuple[int, float],
    steeper: float,
) -> bool:
    """Whether extrapolating the log-log slope since ``before`` meets the target."""
    now = len(pivots), pivots.residual_trace_ratio
    if now[1] <= target or now[0] <= before[0]:
        return True
    return PowerLaw.fit(before, now, steeper=steeper).value(most) <= target


def _too_many(most: int, what: str) -> str:
    return f"the error of {most} {what}, the most within the budget, is too large"
