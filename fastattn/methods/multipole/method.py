"""The multipole method: near keys exactly, far keys by moments of clusters."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastattn._ops.quantized import multiplies_quantized
from fastattn.certificates.certify import certified
from fastattn.certificates.sampled import ROWS, SharedSampling
from fastattn.costs.policy import POLICY
from fastattn.costs.work import multipole_work
from fastattn.methods.multipole.causal_halving import configured_halves
from fastattn.methods.multipole.clusters import Blocks, Clusters, sampled_logit_variance
from fastattn.methods.multipole.threshold_search import Choice, Counts, Trial, choose
from fastattn.problem.head import Head
from fastattn.problem.plan import Configurable, ConfiguredMethod, HeadAnswer, Plan
from fastattn.problem.rows import sample_rows
from fastattn.problem.transforms import Transform, balance
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_integer, check_number


@dataclass(frozen=True, slots=True)
class Multipole(Configurable):
    r"""Softmax attention with near keys exactly and far keys by cluster moments.

    Keys are clustered, and queries are sorted into blocks of similar ones. In a block
    with mean :math:`a` the weight of a key is :math:`e^{a \cdot k} e^{(q - a) \cdot
    k}`: the first factor is exact for every key, the second is expanded about the
    weighted center of the key's cluster, as in a treecode. Keys whose truncation error
    may exceed a share ``threshold`` of the softmax denominator form the near field and
    are evaluated exactly. Use it for peaked attention, whose weight matrix has no
    low-rank approximation.

    Parameters
    ----------
    clusters : int, optional
        Number of clusters; by default one for 128 keys (256 with int8/bfloat16
        matmuls), and ``2 sqrt(m)`` at most.
    threshold : float, optional
        Truncation error, as a share of the softmax denominator, above which a key
        belongs to the near field. By default it is tuned to the tolerance on a few
        rows.

    Notes
    -----
    The output is no convex combination of the values; a row outside their range is
    recomputed exactly. Nothing is proven: ``guarantee="proven"`` is refused. Where the
    tolerance allows it and the processor has AVX-512 BF16 and VNNI, float32 queries and
    near keys, both relative to block means, are multiplied by int8/bfloat16 matmuls.
    With ``is_causal=True`` the keys are halved recursively into rectangles without a
    mask (``causal_halving``).

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Multipole, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 512, 8))
    >>> answer = approximate(query, key, value, tol=0.05, method=Multipole(), rng=0)
    >>> bool(answer.certificate.error <= 0.05)
    True

    References
    ----------
    Hooper et al., Multipole Attention for Efficient Long Context Reasoning,
    arXiv 2506.13059.
    """

    clusters: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.clusters is not None:
            check_integer("clusters", self.clusters, least=1)
        if self.threshold is not None:
            check_number("threshold", self.threshold, least=0)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or refuse."""
        configured = self.configure(head, tol, guarantee, rng)
        shared = SharedSampling()
        answer = certified(head, configured, tol, rng, shared)
        for _ in range(POLICY.multipole.tries - 1):
            if answer.error <= tol or configured.retighten is None:
                break
            # scale the target by how far the certificate missed the tolerance
            configured = configured.retighten(POLICY.retarget * tol / answer.error)
            answer = certified(head, configured, tol, rng, shared)
        if answer.error <= tol:
            return answer
        raise RefusalError(
            f"{answer.plan.method} misses tol={tol:g}: {answer.error:.2e} on sampled "
            "rows; raise tol, lower threshold, or use Auto()"
        )

    def configure(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> ConfiguredMethod:
        """Choose all parameters for one head."""
        if guarantee == "proven":
            raise RefusalError(
                "Multipole() has no proven bound: use guarantee='sampled', "
                "Polynomial() or Exact()"
            )
        m, reason = head.sizes[1], "requested"
        if self.clusters is not None and self.clusters > m:
            reason += (
                f"; clusters={self.clusters} is more than one for each of {m} keys"
            )
        return configured_multipole(head, tol, rng, method=self, reason=reason)


def configured_multipole(
    head: Head,
    wanted: float,
    rng: np.random.Generator,
    *,
    limit: float = math.inf,
    method: Multipole | None = None,
    reason: str = "requested",
) -> ConfiguredMethod:
    """Cluster the keys of a head and choose the threshold.

    Parameters
    ----------
    head : Head
        One head.
    wanted : float
        The relative Frobenius error that the certificate should show.
    rng : Generator
        Draws the rows on which the threshold is tuned.
    limit : float
        Budget, in multiply-adds.
    method : Multipole, optional
        Parameters that are given.
    reason : str
        Reason of the plan.

    Raises
    ------
    RefusalError
        As soon as the work is predicted to exceed ``limit``, or if no threshold
        meets ``wanted``.
    """
    policy = POLICY.multipole
    method = Multipole() if method is None else method
    if head.prefix_lengths is not None:
        return _by_halves(head, wanted, rng, limit, method, reason)
    n, m, d, p = head.sizes
    if m == 0:
        raise RefusalError("there is no key to cluster: use Exact() or Auto()")
    cost = Cost(n, m, d, p, low_precision=_low_precision(head, wanted))
    count = method.clusters or clusters_for(
        m, policy.cheap_keys if cost.low_precision else policy.keys
    )
    groups = policy.few_groups if wanted >= policy.large_tol else policy.groups
    clusters, blocks = arrange(head, count, cost, limit, rng, groups)
    cost = replace(cost, blocks=len(blocks.cuts) - 1)

    def configured(
        clusters: Clusters,
        found: Choice,
        retighten: Callable[[float], ConfiguredMethod] | None,
    ) -> ConfiguredMethod:
        made = Multipole(len(clusters.group), found.threshold)
        plan = Plan(made, found.error, cost(found.counts), reason)

        def run(head: Head) -> tuple[Array, ...]:
            return clusters.query(head.query, found.threshold, blocks)

        return ConfiguredMethod(plan, run, math.inf, retighten)

    if method.threshold is not None:
        given = Choice(method.threshold, math.nan, Counts(0, 0, count))
        return configured(clusters, given, None)

    def search(trial: Trial, wanted: float) -> ConfiguredMethod:
        try:
            found = choose(trial, wanted, cost, limit)
        except RefusalError:
            # values that cancel may need near keys in full precision; a budget is one
            # of a method that is not asked for by name, and others are tried then
            if not trial.clusters.low_precision or math.isfinite(limit):
                raise
            clusters = replace(trial.clusters, low_precision="")
            return search(replace(trial, clusters=clusters), wanted)
        return configured(
            trial.clusters, found, lambda factor: search(trial, factor * wanted)
        )

    return search(Trial.of(clusters, blocks, rng), wanted)


def _by_halves(
    head: Head,
    wanted: float,
    rng: np.random.Generator,
    limit: float,
    method: Multipole,
    reason: str,
) -> ConfiguredMethod:
    """Configure the rectangles of a causal head."""
    # the same stream for every rectangle: their order is not fixed
    seed = int(rng.integers(2**63))

    def make(
        part: Head, limit: float, like: ConfiguredMethod | None
    ) -> ConfiguredMethod:
        chosen = method
        if like is not None and method.threshold is None:
            chosen = replace(method, threshold=like.plan.method.threshold)
        own = np.random.default_rng(seed)
        return configured_multipole(
            part, wanted, own, limit=limit, method=chosen, reason=reason
        )

    return configured_halves(head, make, limit)


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted work of one head from the average counts of its blocks."""

    n: int
    m: int
    d: int
    p: int
    blocks: int = 1
    low_precision: str = ""

    def __call__(self, counts: Counts) -> float:
        """Work, in multiply-adds, for average counts of near keys and clusters."""
        return multipole_work(
            self.n,
            self.m,
            self.d,
            self.p,
            blocks=self.blocks,
            clusters=counts.clusters,
            near=counts.near,
            first_order=counts.first_order,
            low_precision=self.low_precision,
        )


def _low_precision(head: Head, wanted: float) -> str:
    """Precision of the matmuls of near keys; empty for full precision."""
    if head.dtype != head.xp.float32 or not multiplies_quantized(head.query):
        return ""
    if wanted >= POLICY.multipole.int8_tol and not _stands_out(head):
        return "int8"
    return "bfloat16" if wanted >= POLICY.multipole.bfloat16_tol else ""


def _stands_out(head: Head) -> bool:
    """Whether a column of the keys has an outlier that makes int8 steps too large."""
    xp = head.xp
    key = xp.astype(head.key, head.dtype, copy=False)
    step, deviation = xp.abs(key - xp.mean(key, axis=0)), xp.std(key, axis=0)
    return bool(xp.any(xp.max(step, axis=0) > POLICY.multipole.outstanding * deviation))


def clusters_for(m: int, keys: int) -> int:
    """Number of clusters for ``m`` keys, about ``keys`` in each."""
    return max(1, min(m // keys, int(POLICY.multipole.most_clusters * math.sqrt(m))))


def arrange(
    head: Head,
    count: int,
    cost: Cost,
    limit: float,
    rng: np.random.Generator,
    groups: int,
) -> tuple[Clusters, Blocks]:
    """Cluster the keys and sort the queries into small enough blocks."""
    policy = POLICY.multipole
    n, clusters = head.sizes[0], None
    each = policy.cheap_queries if cost.low_precision else policy.queries
    size = max(policy.fewest, int(each * math.sqrt(n)))
    while True:
        floor = replace(cost, blocks=-(-n // size))(Counts(0, 0, count))
        if floor > limit:
            raise RefusalError(
                f"{count} clusters and {-(-n // size)} blocks of queries take "
                f"{floor / limit:.1f} times the budget"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            clusters = clusters or _cluster(head, count, size, limit, rng, groups)
            clusters = replace(clusters, low_precision=cost.low_precision)
            blocks = clusters.arrange(head.query, size)
            variance = clusters.cluster_logit_variance(blocks)
        if variance <= policy.largest_variance:
            return clusters, blocks
        # smaller blocks reduce the variance, but rarely stay within a budget
        if size == policy.fewest or math.isfinite(limit):
            break
        size = max(size // policy.fewer, policy.fewest)
    # the certificate compares all rows of such a head, and holds in any case
    if n <= ROWS:
        return clusters, blocks
    raise RefusalError(_too_far(size, variance))


def _glance(
    query: Array, key: Array, transform: Transform, size: int, blocks: int, count: int
) -> None:
    """Raise ``RefusalError`` if a sample shows too large a variance in clusters."""
    policy = POLICY.multipole
    every = -(
        -max(len(query), len(key))
        // max(policy.sample, policy.sample_a_cluster * count)
    )
    few = slice(0, None, every)
    variance = sampled_logit_variance(query[few], key[few], transform, blocks, count)
    whole = float(transform.scales @ transform.scales)
    if not variance <= min(
        policy.clearly * policy.largest_variance, policy.useless * whole
    ):
        raise RefusalError(_too_far(size, variance))


def _too_far(size: int, variance: float) -> str:
    return (
        f"logits within {size} similar queries and a cluster have a mean square of "
        f"{variance:.2g}, too large: give more clusters, or use Exact()"
    )


def _cluster(
    head: Head,
    count: int,
    size: int,
    limit: float,
    rng: np.random.Generator,
    groups: int,
) -> Clusters:
    policy = POLICY.multipole
    few = POLICY.statistics.sample
    if math.isfinite(limit):
        # under a budget most heads are refused, which must be cheap
        few = min(
            POLICY.statistics.sample,
            max(policy.sample, max(head.sizes[:2]) // policy.sampled),
        )
    query, key = sample_rows(head, rng, few)
    transform = balance(query, key, head.scale, queries=False)
    if math.isfinite(limit):
        # refuse most unsuitable heads before clustering
        _glance(query, key, transform, size, -(-head.sizes[0] // size), count)
    groups = min(groups, max(1, count // policy.group_clusters))
    return Clusters.of(
        head.key, head.value, transform, head.scale, clusters=count, groups=groups
    )
