"""Planning of gradients, prepared keys, tensors and streams: see ``PlanningPolicy``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GradientPolicy:
    """``attention_vjp``: what is tried, and aimed at."""

    # tolerance for bfloat16, which erred by 0.016 at most, half of 3 tol [gradients]
    low_precision_tol: float = 0.01
    # logits below which nothing is rounded: the check costs as much [gradients]
    few_rounded_logits: int = 1 << 23
    # rows that check rounding errors, which are similar in all rows [gradients]
    check_rows: int = 48
    sure: float = 0.5  # share of the allowed error below which these rows suffice
    # work of bfloat16 gradients and their check, share of exact ones [gradients]
    rounded_time: float = 0.5
    # logits below which no low rank is planned: that costs as much [gradients]
    few_logits: int = 1 << 24
    # work of forward and backward passes of a low rank, in forward passes [gradients]
    passes: float = 3.1
    # output over gradient error: 1/sqrt(g + 1) a standard deviation, g = 2 [derived]
    order_loss: float = 3.0**-0.5
    aim: float = 0.7  # target of low ranks, share of the allowed error [gradients]
    # largest share of rows of a low rank that are recomputed exactly
    most_recomputed: float = 0.02
    # landmarks after a long first chunk of a causal head [gradients]
    landmarks: int = 448
    # logits below which these landmarks are not tried [gradients]
    many_logits: int = 1 << 28
    # share of the target that their trial must meet: few keys may dominate [gradients]
    careful: float = 0.95
    # work of planning the second try, which causal heads often need
    second_try: float = 5e8
    tries: int = 2  # tries of low ranks [gradients]
    # error of the first try, in allowed ones, above which there is no second
    hopeless: float = 1.6
    # target of the second try, share of the allowed error [gradients]
    tighter: float = 0.7
    # lengths of the first chunk that are tried, shares of all keys [gradients]
    first_chunks: tuple[float, ...] = (1 / 4, 3 / 8, 7 / 16, 1 / 2, 9 / 16, 5 / 8)
    chunk_rows: int = 192  # rows of their trial: time for accuracy
    chunk_keys: int = 4096  # keys of their trial: time for accuracy
    strata: int = 12  # strata of the rows of their trial
    early: int = 16  # first row of the second stratum
    stratum_rows: int = 48  # rows sampled in each stratum: time for accuracy
    stratum_logits: int = 1 << 20  # logits of such a sample at most
    # work of gradients by clusters, in forward passes [gradients]
    cluster_passes: float = 2.5
    # target of the first gradients by clusters, share of the allowed error [gradients]
    cluster_aim: float = 0.65
    cluster_retarget: float = 0.75  # the same for later ones [gradients]
    # gradients by clusters that are computed and checked at most [gradients]
    cluster_tries: int = 4
    sample_blocks: int = 8  # blocks of a trial of a threshold: time for accuracy
    sample_rows: int = 32  # rows of each of these blocks
    cluster_trials: int = 3  # trials of thresholds at most [gradients]
    cluster_close: float = 1.4  # factor from the target at which the search ends
    # near keys, share of all, that hardly change the error when added
    few_near: float = 0.01
    threshold_step: float = 3.0  # factor by which the threshold is lowered then
    furthest: float = 100.0  # largest factor by which one error changes the threshold
    # largest share of rows by clusters that are recomputed exactly
    most_recomputed_by_clusters: float = 0.05


@dataclass(frozen=True)
class PreparedPolicy:
    """``prepare``: held-out queries, states and clusters of prepared keys."""

    # held-out queries: work of an insertion for a tighter certificate [decoding]
    held_out: int = 128
    answered: int = 32  # held-out queries that must be reliable
    # queries below which nothing is planned: too few to hold some out
    fewest_queries: int = 256
    candidates: int = 2048  # candidates for held-out queries
    # held-out queries taken for their logit variance: tails for the bulk
    most_outliers: int = 64
    # keys beside a state before they are projected: too slow one by one [decoding]
    tail: int = 256
    # queries a rank search assumes, so that the cost of a query dominates
    queries: int = 1 << 14
    # largest share of held-out queries that a given method may refuse
    refused: float = 0.1
    # target of the next try, share of the tolerance over the error
    retarget: float = 0.85
    # recent keys above which all are clustered anew, if also above a share
    recent_keys: int = 1024
    # this share of all keys: work of insertions for work of queries
    recent_share: float = 0.25
    # queries from which blocks are faster than rows: certificates cost as much
    batch: int = 1024


@dataclass(frozen=True)
class TreePolicy:
    """The tree of prepared clusters, for few queries (``prepared.clusters.tree``)."""

    # mean keys of a leaf: moments read for keys read [decoding-clusters]
    leaf: int = 16
    cluster: int = 128  # mean keys of a cluster of recent keys [decoding-clusters]
    # keys below which exact attention is faster [decoding-clusters]
    fewest_keys: int = 8192
    # recent keys above which they go into the tree, if also above a share
    tail: int = 1024
    tail_share: float = 1 / 64  # this share of all keys
    rate: float = 8.5  # work of one multiply-add of a row [decoding-clusters]
    # rows whose exact work takes as long as reading the keys [decoding-clusters]
    reading_rows: int = 4
    trial: int = 128  # queries that the threshold is chosen on: time for accuracy
    check: int = 512  # queries that it is checked on
    # first threshold, in standard deviations of values within clusters
    typical: float = 0.005
    # exponent of the error as a power of the threshold [decoding-clusters]
    slope: float = 0.6
    tries: int = 4  # trials of thresholds at most
    smallest: float = 1e-7  # least threshold, in the same unit
    largest: float = 1.0  # largest threshold
    aim: float = 0.7  # target of the trial, share of the tolerance [decoding-clusters]
    close: float = 1.3  # factor below the target at which the search ends
    # multiple of the trial's largest row error above which rows are exact
    outlying: float = 4.0


@dataclass(frozen=True)
class TensorPolicy:
    """Tensor attention: degrees and sampled tuples."""

    # work below which heads are exact: planning costs as much [tensor]
    little_work: int = 1 << 22
    endless: float = 1e14  # work above which Auto() refuses exact attention: hours
    held: int = 16  # queries on which KV buffers are certified
    # largest share of rows recomputed pair by pair; float64 above
    most_recomputed: float = 0.02
    queries: int = 64  # random queries of the sample: time for accuracy
    furthest: int = 16  # queries of largest norm of the sample
    tuples: int = 1 << 15  # tuples of keys of the sample
    # extension of sampled logits on each side, share of their width [tensor-sampled]
    margin: float = 0.1
    # factor of width below which the interval of all logits is used: proven
    almost: float = 1.3
    # share of the tolerance for a bound relative to an approximate norm
    sure: float = 0.9
    # target of the degree search, share of the tolerance [tensor-sampled]
    aim: float = 0.6
    confirmed: float = 0.8  # the same where sampled tuples certify it [tensor-sampled]
    extra_degrees: int = 4  # degrees added for that at most
    largest_extra: int = 4096  # monomials of these degrees at most
    few_groups: int = 4  # groups of tuples of a trial certificate
    # work of exact rows below which they are cheaper than tuples
    quick_work: float = 4e9
    # rows that are computed exactly at most: time for a tighter certificate [tensor]
    rows: int = 64
    fewest_rows: int = 16  # rows below which tuples are sampled instead
    row_work: float = 1e11  # work of all these rows at most [tensor]
    # independent samples of tuples: time for a tighter certificate [tensor-wide]
    groups: int = 24
    group_rows: int = 8  # rows of each [tensor-wide]
    group_tuples: int = 1024  # tuples of each [tensor-wide]


@dataclass(frozen=True)
class StreamingPolicy:
    """Heads that are streamed from files."""

    keys: int = 1 << 16  # keys of the sample that a state is planned on [streaming]
    queries: int = 1 << 13  # queries of that sample [streaming]
    memory_share: int = 4  # far keys of a state take one part in so many of the memory


@dataclass(frozen=True)
class CalibrationPolicy:
    """``fastattn calibrate``."""

    rounds: int = 11  # rounds, of which the median is used: time against noise
    prior: float = 0.1  # ridge: weight of the built-in rates against one timing
    factor: float = 8.0  # largest factor between a fitted rate and the built-in one
    # polynomials and landmarks of the low ranks that are timed
    low_ranks: tuple[tuple[int, int], ...] = ((1, 32), (1, 384), (384, 0))
    flat_rows: int = 4096  # rows of their heads
    # peaked heads for the multipole method: rows, wanted error, clusters
    peaked: tuple[tuple[int, float, int | None], ...] = (
        (2048, 0.3, None),
        (8192, 0.1, None),
        (4096, 0.01, None),
        (4096, 0.2, 512),
    )
