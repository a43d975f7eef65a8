"""What sampled rows say about the error of an answer.

Rows are computed exactly after the answer exists. The rows whose logits spread most
are where a low-rank answer errs most, and a few of them can hold most of the error;
so they are not left to chance: they are computed exactly and *written into* the
answer. A random sample of the others then gives an upper estimate of the relative
Frobenius error and the distribution-free statement of Wilks (1941): with confidence
``1 - f``, at least a share ``f ** (1/m)`` of those rows has an error no larger than the
largest of ``m`` sampled ones. Where the method says how the rows' errors compare, rows
of larger ones are drawn more often (Hansen and Hurwitz, 1943), but every row at least
half as often as before, so that a wrong guess does little harm. Where the estimate
meets the tolerance and its margin does not, more rows are drawn once; the two looks
share the chance of failure.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._problem import Head, host_rows
from fastattn._rounding import cut_weights, smallest_number
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    device_of,
    to_host,
)

# the probability with which a sampled certificate is allowed to be wrong
FAILURE = 0.05
# rows of a sample
ROWS = 128
# where the errors are guessed: one row in so many, and most; and the share of the draws
# that are made without the guess
_GUESSED, _MOST_GUESSED = 128, 256
BLIND = 0.5
# where the whole answer is cheap: one row in so many, and at least so many
_FEW, _FEWEST = 128, 64
# rows of a second one, where the first leaves it open: one row in so many, and most
_SECOND = 32
_MOST = 1024
# rows that are computed exactly because their logits spread most: so many at most,
# those whose variance is so many times the median
HARD = 128
OUTLYING = 2.0
# standard errors added to the sampled mean square: twice the normal quantiles of .04
# and .01, which make up FAILURE, because squared errors are skewed to the right
MARGIN = 3.5
SECOND_MARGIN = 4.65
# below this tolerance float32 rows are no longer a truth to compare with
FLOAT64_BELOW = 1e-4
# rows that confirm what exact attention rounded
_EXACT_ROWS = 8
# keys that the spread of a row's logits is judged from
_KEYS = 2048
_BLOCK = 2048
# rows and keys that the variance of all logits is judged from
_PAIRS = 256
# rounding of the truth itself, in units of eps times the size of the exponents
TRUTH = 4


@dataclass(frozen=True, slots=True)
class SampledError:
    """What a sample of rows shows.

    Parameters
    ----------
    estimate : float
        Estimated relative Frobenius error of the head.
    upper : float
        The same with a margin for the sampling: the number that is certified.
    source : str
        The rule in words, with the share of rows and the largest error seen.
    """

    estimate: float
    upper: float
    source: str


def hardest_rows(head: Head, rng: np.random.Generator) -> Array:
    """Numbers of the few rows whose logits vary far more than those of the others."""
    return outlying_rows(logit_spread(head, rng))


def outlying_rows(spread: Array) -> Array:
    """Numbers of the few rows whose spread is far larger than that of the others."""
    n = len(spread)
    middle = np.partition(spread, n // 2)[n // 2]
    outlying = np.flatnonzero(spread > OUTLYING * middle)
    # few rows: the answer must not become exact attention under another name
    count = min(HARD, n // 4)
    if len(outlying) > count:
        order = np.argpartition(-spread[outlying], count)
        outlying = np.sort(outlying[order[:count]])
    return outlying


def logit_spread(head: Head, rng: np.random.Generator) -> Array:
    """How much the logits of each row vary over the keys, up to a factor.

    It is the variance over a sample of the keys, from their covariance: it costs
    ``d * d`` products a row.
    """
    xp, (n, m, _, _) = head.xp, head.sizes
    keys = host_rows(head.key, np.sort(rng.choice(m, min(m, _KEYS), replace=False)))
    keys = keys.astype(np.float64)
    keys -= keys.mean(axis=0)
    keys /= max(float(np.abs(keys).max()), np.finfo(np.float64).tiny)
    values, vectors = np.linalg.eigh(keys.T @ keys / len(keys))
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    move = {"dtype": head.dtype, "device": device_of(head.query)}
    root = xp.asarray(root, **move)
    center = xp.mean(xp.astype(head.query[: min(n, _BLOCK), :], head.dtype), axis=0)
    spread = np.empty(n)
    for start in range(0, n, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n))
        block = xp.astype(head.query[rows, :], head.dtype, copy=False) - center
        # a row whose spread overflows is a hard one
        with np.errstate(over="ignore", invalid="ignore"):
            turned = xp.matmul(block, root)
            spread[rows] = to_host(xp.vecdot(turned, turned))
    spread[np.isnan(spread)] = np.inf
    return spread


def rough_spread(head: Head) -> Array:
    """``logit_spread`` as if the coordinates of the keys did not correlate.

    That of a row is taken over the number of keys that it sees: errors of weights
    average out.
    """
    xp, d = head.xp, head.sizes[2]
    query, key = (xp.astype(x, head.dtype, copy=False) for x in (head.query, head.key))
    with np.errstate(over="ignore", invalid="ignore"):
        step = (query - xp.mean(query, axis=0)) ** 2
        spread = xp.matmul(step, xp.reshape(xp.var(key, axis=0), (d, 1)))[:, 0]
    if head.visible is None:
        return to_host(spread)
    return to_host(spread) / np.maximum(to_host(head.visible), 1)


def logit_variance(head: Head, rng: np.random.Generator) -> float:
    """Variance of the logits over a few rows and keys, but for what keys share."""
    few = (
        host_rows(x, rng.choice(x.shape[0], min(x.shape[0], _PAIRS)))
        for x in (head.query, head.key)
    )
    query, key = (x - x.mean(axis=0) for x in few)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.var(head.scale * (query @ key.T)))


def certify_rows(
    head: Head,
    value: Array,
    tol: float,
    rng: np.random.Generator,
    *,
    settled: Array | None = None,
    size: tuple[float, float] | None = None,
    doubt: Array | None = None,
    first: int | None = None,
    margin: float = MARGIN,
) -> SampledError:
    """Compare ``value`` with exact attention on a fresh sample of rows.

    Rows numbered ``settled`` are known to be exact. Where it is None, all are up to
    rounding: they are compared with float64, on few rows, because the same arithmetic
    again would show no error at all. ``size`` is what ``scaled_frobenius`` says of
    ``value``, where that is known; ``doubt`` is how the squares of the rows' errors are
    guessed to compare. ``first`` rows are drawn, by default ``ROWS``, or by
    ``guessed_rows`` where there is a guess; their ``margin`` is in standard errors.
    """
    n = head.sizes[0]
    others = np.arange(n)
    if settled is not None:
        others = np.delete(others, settled)
    # where every row is settled, they are compared among themselves
    others = others if len(others) else np.arange(n)
    if first is None:
        first = _EXACT_ROWS if settled is None else ROWS
        first = first if doubt is None else guessed_rows(n)
    first = min(len(others), first)
    second = 0 if settled is None else min(len(others) - first, second_rows(n))
    # a sample of all the rows needs no guess
    odds = None if doubt is None or not second else guessed_odds(doubt[others])
    rows = rng.choice(len(others), first + second, replace=odds is not None, p=odds)
    counts = np.ones(len(rows)) if odds is None else 1 / (odds[rows] * len(others))
    rows = others[rows]
    peak, norm = scaled_frobenius(value) if size is None else size
    xp = head.xp
    dtype = xp.float64 if settled is None or tol < FLOAT64_BELOW else head.dtype
    # an exact answer is off by its own rounding, which few rows may not show; settled
    # rows are not sampled, but they too were rounded to the query's dtype
    eps = float(xp.finfo(head.dtype if settled is None else dtype).eps)
    own = float(xp.finfo(head.query.dtype).eps) / 2
    # weights that underflow are missed here as they are in the answer
    lost = lost_norm(
        xp, head.dtype, head.query.dtype, head.sizes, head.largest_value, peak
    )

    def judged(look: slice, before: Array, margin: float) -> tuple[SampledError, Array]:
        squares, exponent = _squares(head, value, rows[look], dtype, peak)
        squares = np.append(before, squares)
        if not (math.isfinite(peak) and np.isfinite(squares).all()):
            nothing = SampledError(math.inf, math.inf, "the answer is not finite")
            return nothing, squares
        rounding = TRUTH * eps * (1 + exponent) + own
        weights = None if odds is None else counts[: len(squares)]
        judgement = judge(squares, weights, norm, len(others), rounding, margin, lost)
        return judgement, squares

    found, squares = judged(slice(0, first), np.zeros(0), margin)
    if second and found.estimate <= tol < found.upper:
        found, _ = judged(slice(first, None), squares, SECOND_MARGIN)
    return found


def second_rows(n: int) -> int:
    """Rows of a second look at ``n`` rows."""
    return min(n // _SECOND, _MOST)


def guessed_rows(n: int) -> int:
    """Rows of a first sample of ``n``, drawn by how their errors are guessed."""
    return max(ROWS, min(_MOST_GUESSED, n // _GUESSED))


def few_rows(n: int) -> int:
    """Rows of a first sample of ``n`` where each of them costs a good deal."""
    return max(_FEWEST, min(ROWS, n // _FEW))


def series_doubt(spread: Array) -> Array:
    """How the squared errors of a series of the exponential compare, by the spread."""
    # that of the first terms left out is a power of it; the third did best
    with np.errstate(over="ignore"):
        return np.asarray(spread) ** 3


def guessed_odds(doubt: Array) -> Array:
    """Probabilities of the rows from how the squares of their errors compare."""
    doubt = np.where(np.isfinite(doubt), np.maximum(doubt, 0), 0).astype(np.float64)
    largest = float(doubt.max())
    # where nothing is known all rows are alike
    doubt = doubt / largest if largest > 0 else np.ones(len(doubt))
    odds = BLIND / len(doubt) + (1 - BLIND) * doubt / doubt.sum()
    return odds / odds.sum()


def _squares(
    head: Head, value: Array, rows: Array, dtype: Any, peak: float
) -> tuple[Array, float]:
    """Squared errors of rows in units of ``peak``, and the largest log-sum-exp."""
    truth, normalizer = (
        to_host(x).astype(np.float64) for x in head.with_rows(rows).attend(dtype)
    )
    exponents = np.abs(normalizer[np.isfinite(normalizer)])
    with np.errstate(over="ignore", invalid="ignore"):
        difference = (host_rows(value, rows).astype(np.float64) - truth) / (peak or 1.0)
        squares = np.sum(difference**2, axis=1)
    return squares, float(exponents.max(initial=0.0))


def scaled_frobenius(x: Array) -> tuple[float, float]:
    """Largest absolute value and Frobenius norm in units of it, a block at a time."""
    xp = array_namespace(x)
    blocks = [
        slice(s, min(s + _BLOCK, x.shape[0])) for s in range(0, x.shape[0], _BLOCK)
    ]
    peak = max(float(xp.max(xp.abs(x[rows, :]))) for rows in blocks)
    if peak == 0 or not math.isfinite(peak):
        return peak, 0.0
    dtype, total = compute_dtype(xp, x.dtype), 0.0
    for rows in blocks:
        block = xp.astype(x[rows, :], dtype, copy=False) / peak
        total += float(xp.sum(xp.vecdot(block, block), dtype=xp.float64))
    return peak, math.sqrt(total)


def lost_norm(
    xp: Any,
    dtype: Any,
    own: Any,
    sizes: tuple[int, int, int, int],
    values: float,
    peak: float,
) -> float:
    """Frobenius norm, in units of ``peak``, of what underflows in an exact answer.

    Weights of ``values`` at most are cut off in ``dtype``, answers in their ``own``.
    """
    n, m, _, p = sizes
    entry = 0.0
    if m and values:
        entry = cut_weights(xp, dtype, m) * values + smallest_number(xp, own) / 2
    if entry == 0:
        return 0.0
    return math.sqrt(n * p) * entry / peak if peak > 0 else math.inf


def judge(
    squares: Array,
    weights: Array | None,
    answer: float,
    n: int,
    rounding: float,
    margins: float,
    lost: float = 0.0,
) -> SampledError:
    """Turn the squared errors of sampled rows into the statement about ``n`` rows.

    Rows that were drawn with unequal odds, and with replacement, have ``weights``. An
    error of norm ``lost`` shows in no row.
    """
    count = len(squares)
    weighted = squares if weights is None else weights * squares
    mean = float(np.mean(weighted))
    spread = float(np.std(weighted, ddof=1)) if count > 1 else 0.0
    # without replacement: a sample of all the rows leaves nothing to chance
    left_out = math.sqrt(1 - count / n) if weights is None else 1.0
    margin = margins * spread / math.sqrt(count) * left_out
    estimate = relative(math.sqrt(n * mean), answer)
    upper = relative(math.sqrt(n * (mean + margin)) + lost, answer) + rounding
    share = 1.0 if count == n and weights is None else FAILURE ** (1 / count)
    # rows are drawn at least so many times as often as with equal odds
    share = share if weights is None else 1 - (1 - share) / BLIND
    return SampledError(
        estimate,
        upper,
        f"{count} of {n} rows computed exactly after the answer: estimated error "
        f"{estimate:.2e}; with confidence {1 - FAILURE:.0%} at least {share:.1%} of "
        f"them err by at most {math.sqrt(float(np.max(squares))):.2e} of the largest "
        "entry",
    )


def relative(error_norm: float, answer_norm: float) -> float:
    """Bound ``||error|| / ||truth||`` from the norms of the error and the answer."""
    if error_norm == 0:
        return 0.0
    left = answer_norm - error_norm
    return error_norm / left if left > 0 else math.inf
