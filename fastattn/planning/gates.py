"""The gates of ``Auto``: when a family of methods is likely enough to be the fastest.

A search for the parameters of a method takes time even where it fails. Each gate
returns the reason, as ``explain`` prints it, why its family is not searched for a head;
an empty string where it is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.problem.head import Head


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of a head before a family of methods is searched.

    Parameters
    ----------
    head : Head
        The head.
    variance : float
        An estimate of the variance of its logits.
    rounded : float or None
        Work of int8/bfloat16 matmuls; None where they are refused.
    low_ranks : tuple of float
        Work of the low ranks that are predicted to meet the tolerance.
    """

    head: Head
    variance: float
    rounded: float | None
    low_ranks: tuple[float, ...] = ()

    @property
    def exact(self) -> float:
        """Work of exact attention."""
        return exact_work(*self.head.sizes, logits=self.head.logits)


Gate = Callable[[Facts], str]


def refusal(gates: Iterable[Gate], facts: Facts) -> str:
    """The reason of the first gate that is closed; empty if all are open."""
    return next(filter(None, (gate(facts) for gate in gates)), "")


def enough_logits(head: Head, *, rounded: bool) -> str:
    """Whether planning may pay; ``rounded`` says that the processor has int8 matmuls.

    This gate is the first, before anything is known of the head.
    """
    policy = POLICY.auto
    if head.logits >= (policy.fewest_logits if rounded else policy.few_logits):
        return ""
    n, m, _, _ = head.sizes
    logits = f"{n} x {m}" if head.prefix_lengths is None else head.logits
    return f"{logits} logits are too few: planning costs more than it saves"


def low_variance(facts: Facts) -> str:
    """Low ranks: large logits have no weight matrix of low rank."""
    if facts.variance <= POLICY.auto.low_variance:
        return ""
    return (
        f"the logit variance is {facts.variance:.1f}, above the "
        f"{POLICY.auto.low_variance:g} up to which a low rank may be accurate"
    )


def low_rank_beats_quantized(facts: Facts) -> str:
    """Low ranks beside int8/bfloat16 matmuls: the smaller a head, the likelier."""
    least = facts.variance * POLICY.auto.low_variance_logits
    if facts.rounded is None or least <= facts.head.logits:
        return ""
    return _too_few_beside_quantized(facts, "a low rank", least)


def clusters_beat_quantized(facts: Facts) -> str:
    """Clusters beside int8/bfloat16 matmuls: the smaller a head, the likelier."""
    least = POLICY.auto.high_variance_logits
    if facts.rounded is None or facts.variance * facts.head.logits >= least:
        return ""
    return _too_few_beside_quantized(
        facts, "clusters", least / facts.variance if facts.variance else least
    )


def enough_logits_for_clusters(facts: Facts) -> str:
    """Clusters: a refusal is expensive, and they rarely beat an accepted low rank."""
    logits = facts.head.logits
    if logits >= POLICY.auto.always_clusters:
        return ""
    # the rectangles of a causal head are smaller still
    if logits < POLICY.multipole.few_logits or facts.head.prefix_lengths is not None:
        return f"{logits} logits are too few to search clusters of the keys"
    if facts.low_ranks:
        return f"a low rank is accepted, and {logits} logits are too few to search both"
    return ""


def no_quick_low_rank(facts: Facts) -> str:
    """Clusters: they are not faster than a low rank of very little work."""
    share = min(facts.low_ranks, default=facts.exact) / facts.exact
    if share > POLICY.multipole.quick_share:
        return ""
    return f"a low rank takes {share:.0%} of the work of exact attention"


LOW_RANK_GATES: tuple[Gate, ...] = low_variance, low_rank_beats_quantized
CLUSTER_GATES: tuple[Gate, ...] = (
    clusters_beat_quantized,
    enough_logits_for_clusters,
    no_quick_low_rank,
)


def _too_few_beside_quantized(facts: Facts, what: str, least: float) -> str:
    return (
        f"int8/bfloat16 matmuls meet the tolerance, and at a logit variance of "
        f"{facts.variance:.2g} {what} can be faster only from {least:.1e} logits on: "
        f"there are {facts.head.logits:.1e}"
    )
