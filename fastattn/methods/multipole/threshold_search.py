"""Tune the threshold between near and far field to a tolerance.

A few rows of a few blocks are computed exactly and with trial thresholds. The error is
about a power of the threshold, so that two or three secant steps suffice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastattn._ops.softmax import attend
from fastattn.certificates.ratio_estimate import FIRST, importance_probabilities
from fastattn.certificates.sampled import sampled_rows
from fastattn.costs.policy import POLICY
from fastattn.costs.power_law import PowerLaw
from fastattn.methods.multipole.clusters import Blocks, Clusters, largest_row_error
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError

# an error that counts as zero
_NOTHING = 1e-14


@dataclass(frozen=True, slots=True)
class Counts:
    """Averages per row: near keys, first-order keys and clusters of its block."""

    near: float
    first_order: float
    clusters: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold with the expected certified error, and its average counts."""

    threshold: float
    error: float
    counts: Counts


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Some rows of some blocks with their exact outputs.

    Parameters
    ----------
    clusters : Clusters
        The keys.
    blocks : Blocks
        The sampled rows, with the descriptions of their whole blocks.
    truth : array, shape (rows, p)
        Exact outputs, in float64 on the host.
    share : array, shape (rows,)
        The share of all rows that each row represents.
    n : int
        Number of all rows.
    """

    clusters: Clusters
    blocks: Blocks
    truth: Array
    share: Array
    n: int

    @staticmethod
    def of(clusters: Clusters, blocks: Blocks, rng: np.random.Generator) -> "Trial":
        """Draw rows and compute them exactly."""
        policy = POLICY.threshold
        n = int(blocks.cuts[-1])
        sizes = np.diff(blocks.cuts)
        count = min(len(sizes), max(4, min(policy.blocks, n // policy.queries_a_block)))
        total = sampled_rows(n)
        # equally many rows of each block, weighted by the size of the block
        some = np.sort(rng.choice(len(sizes), count, replace=False))
        few = np.minimum(sizes[some], -(-total // count))
        sample = blocks.subsample(some, few, rng)
        truth, _ = attend(
            sample.query[None, ...],
            clusters.key[None, ...],
            clusters.value[None, ...],
            scale=1.0,
            prefix_lengths=None,
        )
        share = np.repeat(sizes[some] / few, few) / sizes[some].sum()
        return Trial(clusters, sample, _double(truth[0, ...]), share, n)

    def run(self, threshold: float) -> tuple[float, Counts]:
        """The error that a certificate would be expected to show, and the counts."""
        value, _, error, counts = self.clusters.answer(self.blocks, threshold)
        weight = np.add.reduceat(self.share, self.blocks.cuts[:-1])
        found = Counts(*(float(x) for x in weight @ counts))
        limit = largest_row_error(error, found.near / self.clusters.key.shape[0])
        with np.errstate(all="ignore"):
            squares = np.sum((_double(value) - self.truth) ** 2, axis=1)
            # these rows will be recomputed exactly
            squares[to_host(error) > limit] = 0
            size = float(self.share @ np.sum(self.truth**2, axis=1))
            mean = float(self.share @ squares)
            # importance sampling will draw rows with larger estimated errors more often
            error_profile, rows = to_host(error), sampled_rows(self.n)
            probabilities = importance_probabilities(
                np.where(error_profile > limit, 0, error_profile), rows
            )
            often = probabilities * len(error_profile)
            spread = float(self.share @ (squares**2 / often)) - mean**2
            upper = mean + FIRST.expected(math.sqrt(max(spread, 0.0)), mean, rows)
        upper = math.sqrt(upper / size) if size else math.inf if upper else 0.0
        return upper, found


def choose(
    trial: Trial, wanted: float, cost: Callable[[Counts], float], limit: float
) -> Choice:
    """Find the threshold with an expected certified error of ``wanted``.

    Raises
    ------
    RefusalError
        As soon as the work is predicted to exceed the budget ``limit``, or if no
        threshold gives the error.
    """
    policy = POLICY.threshold
    aim = policy.aim * wanted
    # zero after a certificate that was infinite
    if not aim > 0:
        raise RefusalError(f"no threshold gives an error of {wanted:.1e}: use Exact()")
    typical, error = policy.typical
    typical *= (policy.keys / trial.clusters.key.shape[0]) ** policy.thinner
    law = PowerLaw(typical, error, policy.slope)
    threshold, best = min(law.solve(aim), policy.largest), None
    for number in range(policy.tries):
        error, counts = trial.run(threshold)
        if not math.isfinite(error):
            raise RefusalError("sums over clusters are not finite: use Exact()")
        here = Choice(threshold, error, counts)
        now = threshold, max(error, _NOTHING)
        if number and law.y > _NOTHING < error and law.x != threshold:
            least, most = policy.slopes
            law = PowerLaw.fit((law.x, law.y), now, least=least, most=most)
        else:
            law = PowerLaw(*now, law.exponent)
        there = _scaled(here, aim, law)
        work = cost(there.counts)
        if work > limit * policy.hope:
            raise RefusalError(_too_much(there, work, limit))
        close = aim / policy.close <= error <= aim * policy.close
        if close or (error <= aim and there.threshold == threshold):
            best = there
            break
        if error <= aim and (best is None or threshold > best.threshold):
            best = here
        if there.threshold < policy.smallest:
            break
        threshold = there.threshold
    if best is None:
        raise RefusalError(
            f"no threshold gives an error of {wanted:.1e}: {here.threshold:.1e} gives "
            f"{error:.1e}, the logits vary too much within blocks of queries"
        )
    if cost(best.counts) > limit:
        raise RefusalError(_too_much(best, cost(best.counts), limit))
    return best


def _scaled(choice: Choice, aim: float, law: PowerLaw) -> Choice:
    """Extrapolate to the threshold at which the error is ``aim``."""
    threshold = min(law.solve(aim), POLICY.threshold.largest)
    factor = threshold / choice.threshold
    near = choice.counts.near * factor**-POLICY.threshold.crowd
    error = choice.error * factor**law.exponent
    return Choice(threshold, error, replace(choice.counts, near=near))


def _too_much(choice: Choice, work: float, limit: float) -> str:
    return (
        f"threshold={choice.threshold:.1e} with {choice.counts.near:.0f} near keys a "
        f"row takes {work / limit:.1f} times the budget"
    )


def _double(x: Array) -> Array:
    return to_host(x).astype(np.float64)
