"""The numbers that planning depends on, each with what it trades.

``POLICY`` holds thresholds of when a method is tried, sizes of the samples and trials
that plans rest on, targets and limits of searches. They decide which method runs and
how long planning takes, never whether a certificate holds: what proofs rely on is
beside the proofs, and block sizes are beside the kernels. The comment of a field says
its unit and what it trades. In brackets stands the study of ``python -m benches`` to
measure a change with, or ``derived`` for a formula; a field without brackets is not
measured: it was chosen. Values were fitted to a few heads on one processor with
AVX-512, and no record of the single fits is kept.
"""

from dataclasses import dataclass, field

from fastattn.costs.method_policies import (
    LowRankPolicy,
    MultipolePolicy,
    QuantizedPolicy,
    SamplePolicy,
    ThresholdPolicy,
)
from fastattn.costs.task_policies import (
    CalibrationPolicy,
    GradientPolicy,
    PreparedPolicy,
    StreamingPolicy,
    TensorPolicy,
    TreePolicy,
)


@dataclass(frozen=True)
class AutoPolicy:
    """``Auto()`` and ``explain``: which methods are tried, in what order."""

    # budgets of low ranks and of clusters, shares of int8/bfloat16 work [alone]
    rounded_time_shares: tuple[float, float] = (0.5, 0.9)
    # logits below which nothing is searched: a search costs more than it saves [alone]
    few_logits: int = 1 << 24
    # logits below which not even int8/bfloat16 matmuls are tried [alone]
    fewest_logits: int = 1 << 21
    # logits from which clusters are tried beside an accepted low rank [sharp]
    always_clusters: int = 1 << 28
    # logits a unit of logit variance for low ranks beside int8 matmuls [alone]
    low_variance_logits: int = 5 << 25
    # logits times logit variance for clusters beside int8 matmuls [alone]
    high_variance_logits: int = 1 << 30
    # estimated logit variance above which low ranks are not tried [nothing-fits]
    low_variance: float = 6.0
    # tolerance for bfloat16 sums of polynomials: they add a twentieth [diffuse]
    low_precision_sums: float = 0.009
    tries: int = 2  # runs with a new search before the head is computed exactly [seeds]
    # runs of a method with smaller target errors before that [seeds]
    tries_again: int = 3
    # logits that explain(run=True) computes exactly to measure an error
    explained_logits: int = 1 << 26
    # seconds above which explain(run=True) runs no candidate
    longest_run: float = 300.0


@dataclass(frozen=True)
class StatisticsPolicy:
    """Statistics of rows, and outlier rows."""

    # rows from which transforms and statistics are computed: time for accuracy
    sample: int = 4096
    keys: int = 2048  # keys sampled for their statistics: time for accuracy
    queries: int = 512  # queries sampled for the statistics of the values
    # rows and keys from which the logit variance is estimated [nothing-fits]
    pairs: int = 256
    # extreme keys of each kind that get exact weights: time for sharp profiles
    extreme: int = 16
    unusual: int = 8  # outlier queries of each kind whose largest keys are extreme, too
    seen: int = 2  # extreme keys for each outlier query
    # weight over sum of weights, <= 1 if exact, where the error profile ends
    largest_share: float = 3.0
    # logit variance above which all low-rank errors count as equal
    largest_variance: float = 50.0
    # error by other keys of a low rank, in standard deviations of values
    bulk: float = 0.1
    rounded_bulk: float = 0.15  # the same where all logits are rounded
    # multiple of the median above which rows are outliers: exact rows for error [seeds]
    outlying: float = 2.0
    # outlier rows by the error profile that are recomputed exactly [seeds]
    most_by_error: int = 32
    # outlier rows by an extreme key that are recomputed exactly [seeds]
    most_by_seen_key: int = 16
    # outlier rows by logit variance that are recomputed exactly [seeds]
    most_outliers: int = 64
    # the same in gradients, which have no other criterion [gradients]
    most_in_gradients: int = 128


@dataclass(frozen=True)
class PlanningPolicy:
    """All numbers that planning depends on, by room."""

    # budget of a method, share of exact work: less gain against more fallbacks [alone]
    time_share: float = 0.8
    # next target, share of the tolerance over the certified error
    retarget: float = 0.9
    auto: AutoPolicy = field(default_factory=AutoPolicy)
    statistics: StatisticsPolicy = field(default_factory=StatisticsPolicy)
    gradients: GradientPolicy = field(default_factory=GradientPolicy)
    prepared: PreparedPolicy = field(default_factory=PreparedPolicy)
    tree: TreePolicy = field(default_factory=TreePolicy)
    tensor: TensorPolicy = field(default_factory=TensorPolicy)
    streaming: StreamingPolicy = field(default_factory=StreamingPolicy)
    calibration: CalibrationPolicy = field(default_factory=CalibrationPolicy)
    quantized: QuantizedPolicy = field(default_factory=QuantizedPolicy)
    sample: SamplePolicy = field(default_factory=SamplePolicy)
    low_rank: LowRankPolicy = field(default_factory=LowRankPolicy)
    multipole: MultipolePolicy = field(default_factory=MultipolePolicy)
    threshold: ThresholdPolicy = field(default_factory=ThresholdPolicy)


POLICY = PlanningPolicy()
