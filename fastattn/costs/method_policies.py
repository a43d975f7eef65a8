"""Planning of the methods: the parts of ``PlanningPolicy`` by method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizedPolicy:
    """int8/bfloat16 matmuls: whether a head suits them."""

    rows: int = 128  # rows whose logits are rounded first: time for accuracy [alone]
    keys: int = 1024  # keys of these logits [alone]
    # RMS logit error, in tolerances, below which no pilot run is needed [alone]
    safe: float = 0.75
    hopeless: float = 4.5  # the same above which the head is refused [alone]
    pilot_rows: int = 32  # rows of a pilot run [alone]
    sure: float = 0.6  # share of the tolerance that its error may be [seeds]


@dataclass(frozen=True)
class SamplePolicy:
    """The planning sample of a low rank, and its pilot runs."""

    queries: int = 896  # queries that a low rank is planned on: time for accuracy
    # held-out queries of pilot runs: fewest and most [seeds]
    held: tuple[int, int] = (256, 512)
    held_of: int = 16  # one query in so many between these
    fewest_keys: int = 2048  # keys that a low rank is planned on, at least
    most_keys: int = 8192  # and at most: time for accuracy
    mass_keys: int = 512  # keys that estimate the softmax denominators of the queries
    # logit variance, in means, that makes a query unreliable or a key far
    limit: float = 10.0
    quantile: float = 0.95  # quantile of key lengths up to which no key is far
    # share of the unweighted covariance of the queries in the weighted one
    blend: float = 0.02
    # queries of a first pilot run; later ones use all held-out ones
    pilot_queries: int = 128
    pilot_keys: int = 2048  # keys of a first pilot run: time for accuracy
    few_keys: int = 16384  # keys of a head up to which it uses half as many [alone]
    norm_rows: int = 32  # rows computed over all keys, to compare the norms of outputs
    # target before the first pilot run, share of the tolerance [seeds]
    caution: float = 0.66
    # target after a margin, for one and for two sampling rounds [seeds]
    bold: tuple[float, float] = (0.9, 0.95)
    # deviation of squared errors, in means, above which half counts [seeds]
    heavy: float = 2.5


@dataclass(frozen=True)
class LowRankPolicy:
    """Low ranks: the search for the number of polynomials or landmarks."""

    # logit variance above which no pilot run is made [nothing-fits]
    largest_variance: float = 4.0
    # effective share of the queries that cause the error: the same below
    least_share: float = 0.1
    hopeless: float = 6.0  # error of a pilot run, in tolerances, that ends the search
    # the same for the first one of polynomials, which has a higher rank
    far: float = 8.0
    # keys that landmarks are drawn from: fewest and most
    pivot_keys: tuple[int, int] = (1152, 4096)
    pivot_share: int = 8  # one key in so many between these
    # parts of them that are factorized separately: time for fewer pivots
    parts: int = 2
    # keys for a given number: landmarks of more crowd at extreme keys
    given_pivot_keys: int = 2304
    batch: int = 64  # pivots drawn at once: time for the quality of pivots
    held: int = 5  # one key in so many is no pivot, and estimates the residual trace
    landmarks: int = 64  # landmarks of the first pilot run [alone]
    rank: int = 128  # polynomials of their first pilot run [alone]
    # indices whose energies are computed first, then twice as many, then all
    many: int = 640
    # next rank over the predicted one: it also gives all smaller errors
    more: float = 1.2
    # exponent of the error as a power of the root of the residual trace
    bend: float = 2.1
    # exponent of the error in later steps, relative to the first step's
    faster: float = 1.5
    # keys of later pilot runs of polynomials, in units of the first
    polynomial_keys: int = 2
    landmark_keys: int = 3  # the same of landmarks: few keys bias their errors up
    tight: float = 0.98  # target of a reduced rank, share of the aim
    # reduction that justifies a trial of polynomials and of landmarks
    worthwhile: tuple[float, float] = (0.97, 0.93)
    trials: int = 8  # trials of reduced ranks at most
    # least exponent of an extrapolation: two errors may be equal by chance
    flattest: float = 0.1
    largest_rank: int = 2304  # largest rank that is planned
    logits: int = 1 << 16  # logits of the head for each unit of rank
    energy_keys: int = 512  # keys over which the energies of polynomials are summed
    # most that exponents of the trace steepen: before a pilot run, and after
    steeper: tuple[float, float] = (4.0, 2.0)
    # degree of a coordinate: one of mean square > 1/2 would take all indices
    largest_degree: int = 12
    # share of the logit variance in coordinates that landmarks ignore
    ignored: float = 1e-4
    # strata of the rows after the first chunk of a causal head [causal]
    strata: int = 6
    stratum_rows: int = 12  # rows sampled in each stratum: time for accuracy [causal]
    whole_rows: int = 32  # rows that are computed over all keys [causal]
    early_rows: int = 256  # very first rows that are all sampled [causal]
    some_rows: int = 96  # rows sampled in the rest of the first chunk [causal]
    # fixed work of a chunk: calls, and arrays that are read again [causal]
    chunk_work: float = 4e7


@dataclass(frozen=True)
class MultipolePolicy:
    """``Multipole``: clusters of keys and blocks of queries."""

    # logits below which Auto() tries no clusters: refusals cost too much [sharp]
    few_logits: int = 1 << 26
    # share of exact work below which a low rank precludes clusters [alone]
    quick_share: float = 0.15
    keys: int = 128  # keys per cluster: moments read for near keys [sharp]
    # the same where int8/bfloat16 matmuls make near keys cheap [sharp]
    cheap_keys: int = 256
    # clusters at most, in roots of the number of keys [clustered-growth]
    most_clusters: float = 2.0
    group_clusters: int = 16  # clusters per group of shared first moments [sharp]
    groups: int = 16  # groups at most: accuracy for time [sharp]
    # groups at most at large tolerances: faster by 8 % at 0.05 [sharp]
    few_groups: int = 4
    large_tol: float = 0.02  # tolerance from which that holds [sharp]
    # queries per block, in roots of their number: near keys for blocks [sharp]
    queries: float = 2.83
    cheap_queries: float = 6.0  # the same where near keys are cheap [sharp]
    # factor by which blocks shrink where the logit variance is too large
    fewer: int = 4
    fewest: int = 16  # queries per block at least
    # least tolerance for int8 logits of near keys, which err by a quarter of it [sharp]
    int8_tol: float = 0.02
    bfloat16_tol: float = 0.005  # the same for bfloat16 [sharp]
    # standard deviations of a key column above which int8 is not used
    outstanding: float = 12.0
    # mean square of (q - block mean) . (k - cluster mean): refused above [sharp]
    largest_variance: float = 1.5
    sample: int = 1024  # rows that estimate this variance at least [nothing-fits]
    sample_a_cluster: int = 8  # the same per cluster [nothing-fits]
    # one row in so many balances coordinates under a budget [nothing-fits]
    sampled: int = 4
    # factor of largest_variance at which a sampled one refuses a head
    clearly: float = 1.25
    # share of the mean square of all logits at which it does [nothing-fits]
    useless: float = 0.55
    tries: int = 3  # runs at most where the certificate misses the tolerance [seeds]
    sampled_rows: int = 64  # rows of a block that estimate the weights of clusters
    # squared error, in means times the share of near keys, of an outlier [seeds]
    outlying: float = 2.0
    outlying_more: float = 0.05  # what is added to that share
    most_outliers: float = 0.018  # share of rows that are recomputed exactly at most
    # rounds of k-means over the queries: time for smaller blocks [sharp]
    rounds: int = 2
    # halvings of a causal head at most: the remaining triangles are small [causal]
    deepest: int = 8


@dataclass(frozen=True)
class ThresholdPolicy:
    """The search for the threshold between near and far field."""

    blocks: int = 16  # blocks of the sample at most: time for accuracy
    queries_a_block: int = 1024  # queries of the head for each of these blocks
    # first guess: this threshold gives this error for some number of keys [sharp]
    typical: tuple[float, float] = (2.4e-4, 0.045)
    keys: int = 1 << 15  # this number of keys [sharp]
    # for m keys the threshold is proportional to m ** -thinner [sharp]
    thinner: float = 0.85
    slope: float = 0.8  # exponent of the error as a power of the threshold [sharp]
    # least and largest measured exponent that is used
    slopes: tuple[float, float] = (0.4, 1.2)
    crowd: float = 0.9  # near keys are proportional to threshold ** -crowd [sharp]
    tries: int = 4  # trials of thresholds at most
    aim: float = 0.85  # target, share of the wanted error [seeds]
    close: float = 1.5  # factor from the target at which the search ends
    smallest: float = 1e-10  # least threshold
    largest: float = 0.3  # largest threshold
    hope: float = 1.3  # predicted work, in budgets, at which the search is given up
