r"""Error profiles: the expected errors of the rows of an output, before sampling.

With approximate weights ``w'`` in place of ``w``, the error of row ``i`` is
:math:`o_i' - o_i = \sum_j (w_{ij}' - w_{ij}) (v_j - o_i)`. A few keys can cause most of
it: keys of large norm, also in the metric of the keys; keys whose values are far from
the mean; and the keys that outlier queries attend to most. The logits of all rows with
these *extreme keys* are computed exactly; with the log-sum-exps of the output they show
each key's share of a row, and which sums of weights are impossibly small.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.problem.head import Head, host_rows
from fastattn.problem.row_lengths import row_lengths
from sketching._lib.arrays import Array, device_of, to_host

_BLOCK = 2048
# ridge of the variances of keys and queries, relative to their mean or largest
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class _KeyMetric:
    """Mean and covariance of a sample of the keys.

    Parameters
    ----------
    center : array, shape (d,)
        Mean key.
    variances : array, shape (d,)
        Eigenvalues of the covariance in units of ``peak`` squared.
    axes : array, shape (d, d)
        Its eigenvectors, one to a column.
    peak : float
        Largest entry of a centred key.
    """

    center: Array
    variances: Array
    axes: Array
    peak: float

    @staticmethod
    def of(head: Head, rng: np.random.Generator) -> "_KeyMetric":
        m = head.sizes[1]
        some = np.sort(rng.choice(m, min(m, POLICY.statistics.keys), replace=False))
        keys = host_rows(head.key, some).astype(np.float64)
        tiny = float(np.finfo(np.float64).tiny)
        # scaled, so that neither the mean nor a square overflows
        unit = max(float(np.abs(keys).max()), tiny)
        keys /= unit
        center = keys.mean(axis=0)
        keys -= center
        peak = max(float(np.abs(keys).max()), tiny)
        keys /= peak
        variances, axes = np.linalg.eigh(keys.T @ keys / len(keys))
        return _KeyMetric(
            center * unit, np.maximum(variances, 0.0), axes, max(peak * unit, tiny)
        )

    @property
    def root(self) -> Array:
        """A query times this matrix has the norm of the deviation of its logits."""
        return self.axes * np.sqrt(self.variances)

    @property
    def whiten(self) -> Array:
        """A centred key times this matrix has its Mahalanobis norm.

        Only axes of small variance, the first, add to what the Euclidean norm shows.
        """
        few = -(-len(self.variances) // 2)
        least = _RIDGE * max(float(self.variances.mean()), np.finfo(np.float64).tiny)
        return self.axes[:, :few] / np.sqrt(self.variances[:few] + least)


def high_variance_rows(head: Head, rng: np.random.Generator) -> Array:
    """Indices of the outlier rows by logit variance."""
    return outlying_rows(
        logit_spread(head, rng),
        min(POLICY.statistics.most_in_gradients, head.sizes[0] // 4),
    )


def outlying_rows(sizes: Array, count: int) -> Array:
    """Indices of at most ``count`` rows whose size is far above the median."""
    sizes = _no_nan(np.array(sizes))
    median = np.partition(sizes, len(sizes) // 2)[len(sizes) // 2]
    outlying = np.flatnonzero(sizes > POLICY.statistics.outlying * median)
    if len(outlying) > count:
        outlying = np.sort(outlying[_largest(sizes[outlying], count)])
    return outlying


def _largest(sizes: Array, count: int) -> Array:
    """Indices of the largest sizes; NaN counts as infinite."""
    sizes = _no_nan(np.array(sizes))
    count = min(count, len(sizes))
    return np.argpartition(-sizes, count - 1)[:count] if count else np.zeros(0, int)


def logit_spread(head: Head, rng: np.random.Generator) -> Array:
    """Logit variance of each row over a sample of the keys, up to a common factor.

    The cost is ``d * d`` multiply-adds per row.
    """
    return _logit_spread(head, _KeyMetric.of(head, rng))


def _logit_spread(head: Head, metric: _KeyMetric) -> Array:
    spread = row_lengths(head.query, _first_mean(head), metric.root, head.dtype)
    # a row whose variance overflows is an outlier
    return _no_nan(spread)


def _first_mean(head: Head) -> Array:
    """Mean of the first queries, on the host."""
    few = head.query[: min(head.sizes[0], _BLOCK), :]
    with np.errstate(over="ignore", invalid="ignore"):
        return to_host(head.xp.mean(head.xp.astype(few, head.dtype), axis=0))


def logit_variance(head: Head, rng: np.random.Generator) -> float:
    """Logit variance over a few rows and keys, both centred."""
    few = (
        host_rows(x, rng.choice(x.shape[0], min(x.shape[0], POLICY.statistics.pairs)))
        for x in (head.query, head.key)
    )
    query, key = (x - x.mean(axis=0) for x in few)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.var(head.scale * (query @ key.T)))


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """Statistics of all rows that do not depend on an output.

    Parameters
    ----------
    variance : array, shape (n,)
        Logit variance of each row over the keys.
    extreme : integer array, shape (e,)
        Indices of the extreme keys.
    distance : array, shape (e,)
        Distances of their values from the mean value.
    mean : array, shape (p,)
        Mean value.
    deviation : float
        Root mean square distance of the values from it.
    """

    variance: Array
    extreme: Array
    distance: Array
    mean: Array
    deviation: float


def row_statistics(head: Head, rng: np.random.Generator) -> RowStatistics:
    """Compute the statistics, at ``d * d`` multiply-adds per row and key."""
    policy = POLICY.statistics
    metric = _KeyMetric.of(head, rng)
    mean_query = _first_mean(head)
    spread, unusual = (
        row_lengths(head.query, mean_query, turn, head.dtype)
        for turn in (metric.root, _column_scales(head))
    )
    spread = _no_nan(spread)
    long = [
        row_lengths(head.key, metric.center, turn, head.dtype)
        for turn in (None, metric.whiten)
    ]
    distance, mean, deviation = _value_sizes(head)
    rows = np.union1d(*(_largest(x, policy.unusual) for x in (spread, unusual)))
    far = [_largest(x, policy.extreme) for x in (distance, *long)]
    extreme = np.union1d(_seen_keys(head, rows), np.concatenate(far))
    with np.errstate(over="ignore", invalid="ignore"):
        variance = spread * np.square(head.scale * metric.peak)
    variance = _no_nan(variance)
    return RowStatistics(variance, extreme, distance[extreme], mean, deviation)


def _column_scales(head: Head) -> Array:
    """Reciprocal standard deviation of each column of the queries."""
    n = head.sizes[0]
    some = np.unique(
        np.linspace(0, n - 1, min(n, POLICY.statistics.queries)).astype(np.intp)
    )
    sample = host_rows(head.query, some).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        sample -= sample.mean(axis=0)
        width = np.abs(sample).max(axis=0)
        # scaled squares neither overflow nor underflow
        width *= np.std(sample / np.where(width > 0, width, 1.0), axis=0)
    width = np.nan_to_num(width, nan=np.inf)
    least = max(_RIDGE * float(width.max()), np.finfo(np.float64).tiny)
    return 1 / np.maximum(width, least)


def _value_sizes(head: Head) -> tuple[Array, Array, float]:
    """Distances of the values from their mean, the mean, and the RMS distance."""
    xp = head.xp
    with np.errstate(over="ignore", invalid="ignore"):
        mean = to_host(xp.mean(xp.astype(head.value, head.dtype, copy=False), axis=0))
        squares = row_lengths(head.value, mean, dtype=head.dtype)
        distance = np.sqrt(_no_nan(squares))
        deviation = float(np.sqrt(np.mean(squares)))
    return distance, mean.astype(np.float64), deviation


def _seen_keys(head: Head, rows: Array) -> Array:
    """The keys with the largest logits in the given rows."""
    few = head.with_rows(rows)
    logits = _logits(few, few.key, np.arange(head.sizes[1]))
    logits, each = np.ascontiguousarray(to_host(logits).T), np.arange(len(rows))
    found = []
    for _ in range(min(POLICY.statistics.seen, logits.shape[1])):
        found.append(np.argmax(logits, axis=1))
        logits[each, found[-1]] = -np.inf
    return np.unique(np.concatenate(found))


def _logits(head: Head, key: Array, numbers: Array) -> Array:
    """Logits of some keys, shape (keys, n); minus infinity where a key is masked."""
    xp = head.xp
    query, key = (xp.astype(x, head.dtype, copy=False) for x in (head.query, key))
    # keys are rows: maxima over columns are faster than maxima over rows
    with np.errstate(over="ignore", invalid="ignore"):
        logits = xp.matmul(key, xp.matrix_transpose(query * head.scale))
    if head.prefix_lengths is None:
        return logits
    numbers = xp.asarray(numbers, device=device_of(head.query))
    hidden = numbers[:, None] >= head.prefix_lengths[None, :]
    return xp.where(hidden, xp.full_like(logits, -math.inf), logits)


def _no_nan(x: Array) -> Array:
    """Replace NaN by infinity, in place."""
    x[np.isnan(x)] = np.inf
    return x


@dataclass(frozen=True, slots=True, eq=False)
class SeenKeys:
    """Weights of the extreme keys in the rows of an output.

    Parameters
    ----------
    share : array, shape (n,)
        Largest weight of an extreme key, over the output's own sum of weights: above
        one where that sum is too small.
    farthest : array, shape (n,)
        Largest weight times the distance of the key's value from the mean value.
    distance : array, shape (n,)
        Distance of the row's output from the mean value.
    """

    share: Array
    farthest: Array
    distance: Array

    @staticmethod
    def of(
        head: Head, found: RowStatistics, value: Array, normalizer: Array
    ) -> "SeenKeys":
        """Compare the log-sum-exps of an output with logits of the extreme keys."""
        xp, n = head.xp, head.sizes[0]
        move = {"dtype": head.dtype, "device": device_of(head.query)}
        numbers = xp.asarray(found.extreme, device=move["device"])
        key = xp.take(head.key, numbers, axis=0)
        with np.errstate(divide="ignore", over="ignore"):
            far = xp.asarray(np.log(found.distance)[:, None], **move)
        share, farthest = np.empty((2, n))
        for start in range(0, n, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n))
            # failed rows, and rows without keys, are handled in certify
            with np.errstate(over="ignore", invalid="ignore"):
                logits = _logits(head.slice(rows), key, found.extreme)
                # the exp of the maximum, for the maximum of the exps
                share[rows] = to_host(xp.max(logits, axis=0))
                farthest[rows] = to_host(xp.max(logits + far, axis=0))
        own = to_host(normalizer).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            share, farthest = np.exp(share - own), np.exp(farthest - own)
            distance = np.sqrt(row_lengths(value, found.mean, dtype=head.dtype))
        return SeenKeys(*(_no_nan(x) for x in (share, farthest, distance)))


def series_squares(variance: Array) -> Array:
    """Error profile of a truncated series of exp, by the logit variance of rows."""
    return np.minimum(np.asarray(variance), POLICY.statistics.largest_variance) ** 2


@dataclass(frozen=True, slots=True, eq=False)
class RowErrors:
    """Error profile of an output, and its outlier rows.

    ``squares`` are expected squared errors of the rows up to a common factor.
    """

    squares: Array
    outlier_rows: Array


def profile_errors(
    found: RowStatistics,
    seen: SeenKeys,
    *,
    rounding: Array | None = None,
    own: Array | None = None,
    factor: Array | float = 1.0,
) -> RowErrors:
    r"""Compute the error profile of an output and find its outlier rows.

    The expected error of a row is the error of its logits (or of its weights, for a
    truncated series) times the distance of the values it attends to from its output.

    Parameters
    ----------
    found, seen : RowStatistics, SeenKeys
        Statistics of the head, and weights of its extreme keys in the output.
    rounding : array, shape (n,), optional
        Standard deviation of the error of a row's logits. By default it is the error of
        a truncated series, which grows with the logit variance, plus a term that grows
        with the share of an extreme key.
    own : array, shape (n,), optional
        Error profile of the method itself (squares, up to a factor).
    factor : array, shape (n,), or float
        Further factor of the squares, such as that of causal prefixes.
    """
    policy = POLICY.statistics
    n, bulk, spread = len(found.variance), policy.rounded_bulk, policy.most_by_seen_key
    large = np.maximum(seen.share / policy.largest_share, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        if rounding is None:
            bulk, spread = policy.bulk, policy.most_outliers
            rounding = np.minimum(found.variance, policy.largest_variance)
            rounding = rounding + np.minimum(seen.share, policy.largest_share)
        rest = seen.distance + bulk * found.deviation
        full = np.sqrt(factor) * rounding * (seen.farthest + rest)
        squares = factor * (rounding * (seen.farthest / large + rest)) ** 2
        if own is not None:
            full, squares = np.sqrt(own), _combined(own, squares)
    most = min(policy.most_by_error, n // 8), min(policy.most_by_seen_key, n // 16)
    outlier_rows = [
        outlying_rows(full, most[0]),
        outlying_rows(rounding * seen.farthest, most[1]),
        outlying_rows(found.variance, min(spread, n // 4)),
    ]
    return RowErrors(_no_nan(squares), np.unique(np.concatenate(outlier_rows)))


def _combined(own: Array, squares: Array) -> Array:
    """Add two error profiles in units of their medians."""
    units = [float(np.median(x[np.isfinite(x)])) for x in (own, squares)]
    if min(units) > 0:
        return own / units[0] + squares / units[1]
    return own if units[0] > 0 else squares
