"""What rows drawn at random say about the error of an answer.

A fresh sample of rows is computed exactly after the answer exists. From it follow an
upper estimate of the relative Frobenius error of the head and the distribution-free
statement of Wilks (1941): with confidence ``1 - f``, at least a share ``f ** (1/m)``
of all rows has an error no larger than the largest of ``m`` sampled ones.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._problem import Head, host_rows
from sketching._lib.arrays import Array, to_host

# the probability with which a sampled certificate is allowed to be wrong
FAILURE = 0.05
# standard errors added to the sampled mean square: twice the normal quantile of
# FAILURE, because squared errors are skewed to the right
_MARGIN = 3.3
# below this tolerance float32 rows are no longer a truth to compare with
_FLOAT64_BELOW = 1e-4

# rows of a sample
ROWS = 128
# rows that confirm what exact attention rounded
_EXACT_ROWS = 16


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


def certify_rows(
    head: Head,
    value: Array,
    tol: float,
    rng: np.random.Generator,
    *,
    exact: bool = False,
) -> SampledError:
    """Compare ``value`` with exact attention on a fresh sample of rows.

    An answer that is ``exact`` up to rounding is compared with float64 on few rows:
    the same arithmetic again would show no error at all.
    """
    n = head.sizes[0]
    count = min(n, _EXACT_ROWS if exact else ROWS)
    rows = np.sort(rng.choice(n, size=count, replace=False))
    xp = head.xp
    dtype = xp.float64 if exact or tol < _FLOAT64_BELOW else head.dtype
    truth = to_host(head.with_rows(rows).attend(dtype)[0]).astype(np.float64)
    squares = np.sum((host_rows(value, rows) - truth) ** 2, axis=1)
    return _judge(squares, frobenius(xp, value), n)


def frobenius(xp: Any, x: Array) -> float:
    """Frobenius norm summed in float64, a block of rows at a time."""
    total = 0.0
    for start in range(0, x.shape[0], 8192):
        rows = slice(start, min(start + 8192, x.shape[0]))
        total += float(xp.sum(xp.astype(x[rows, :], xp.float64) ** 2))
    return math.sqrt(total)


def _judge(squares: Array, answer_norm: float, n: int) -> SampledError:
    """Turn the squared errors of sampled rows into the statement about all rows."""
    count = len(squares)
    mean = float(np.mean(squares))
    spread = float(np.std(squares, ddof=1)) if count > 1 else 0.0
    # without replacement: a sample of all the rows leaves nothing to chance
    left_out = math.sqrt(1 - count / n)
    margin = _MARGIN * spread / math.sqrt(count) * left_out
    estimate = relative(math.sqrt(n * mean), answer_norm)
    upper = relative(math.sqrt(n * (mean + margin)), answer_norm)
    if not math.isfinite(upper):
        return SampledError(math.inf, math.inf, "sampled rows: not finite")
    share = 1.0 if count == n else FAILURE ** (1 / count)
    return SampledError(
        estimate,
        upper,
        f"{count} of {n} rows computed exactly after the answer: estimated error "
        f"{estimate:.2e}; with confidence {1 - FAILURE:.0%} at least {share:.1%} of "
        f"the rows err by at most {math.sqrt(float(np.max(squares))):.2e}",
    )


def relative(error_norm: float, answer_norm: float) -> float:
    """Bound ``||error|| / ||truth||`` from the norms of the error and the answer."""
    if error_norm == 0:
        return 0.0
    left = answer_norm - error_norm
    return error_norm / left if left > 0 else math.inf
