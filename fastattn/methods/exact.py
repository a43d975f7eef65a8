"""Exact softmax attention, streamed over blocks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.certificates.log_errors import log_errors
from fastattn.certificates.ratio_estimate import FAILURE, relative
from fastattn.certificates.rounding import (
    EXP,
    cut_weights,
    gamma,
    largest_number,
    largest_row,
    mean_deviation,
    once_stored,
    row_norms,
    smallest_number,
    unit_roundoff,
    value_range,
)
from fastattn.certificates.sampled import SampledError, certify_rows, scaled_frobenius
from fastattn.costs.work import exact_work
from fastattn.problem.head import Head
from fastattn.problem.plan import Candidate, HeadAnswer, Plan
from fastattn.problem.row_statistics import SeenKeys, profile_errors, row_statistics
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_integer

# keys that the fast kernels sum before they add to the running sums: least and most
# (kernels with smaller tiles have no more terms in total)
_KEYS_A_BLOCK = (320, 1024)
# rows that are compared with float64 where no a-priori bound is small enough
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact softmax attention in blocks that stay in cache.

    Online softmax: each row is shifted by its largest logit so far, so that logits of
    any size are safe (Milakov and Gimelshein, 2018). No n x m array is stored.

    Parameters
    ----------
    block : int, optional
        Queries in a block; by default as many as keep a block of logits in cache and
        every thread busy.

    Notes
    -----
    ``guarantee="proven"`` bounds the rounding error; where the bound in float32 exceeds
    the tolerance, the head is computed in float64. ``"sampled"`` compares sampled rows
    with float64 where no a-priori bound meets the tolerance.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Exact, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 8, 4))
    >>> answer = approximate(query, key, value, method=Exact(), guarantee="proven")
    >>> answer.certificate.error < 1e-12, answer.certificate.failure
    (True, 0.0)

    References
    ----------
    Milakov and Gimelshein, Online normalizer calculation for softmax,
    arXiv 1805.02867.
    """

    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            check_integer("block", self.block, least=1)

    def plan(self, head: Head, reason: str = "requested") -> Plan:
        """Return the plan of exact attention for this head."""
        work = exact_work(*head.sizes, logits=head.logits)
        return Plan(self, 0.0, work, reason)

    def candidates(
        self,
        head: Head,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Iterator[Candidate]:
        """Yield the plan; exact attention is always accepted."""
        yield Candidate(self.plan(head), accepted=True)

    def solve(
        self,
        head: Head,
        tol: float,
        guarantee: str,
        rng: np.random.Generator,
        reason: str = "requested",
    ) -> HeadAnswer:
        """Compute the head and bound the rounding error."""
        if guarantee == "proven":
            return self._solve_proven(head, tol, reason)
        # the float64 rows of a sample have a rounding error, too
        own = 2 * _weights_bound(head, head.xp.float64)
        if own > tol and _bound_exceeds(head, tol):
            raise _refusal(head, tol, own)
        value, normalizer = head.finish(*head.attend(rows=self.block))
        size = scaled_frobenius(value)
        log_error = log_error_of(head, normalizer)
        error = _relative_bound(head, *size, tol)
        if error <= tol:
            return HeadAnswer(
                value,
                normalizer,
                error,
                0.0,
                "relative-frobenius",
                f"exact attention in {head.dtype}: a-priori rounding bound",
                self.plan(head, reason),
                log_error,
            )
        sampled = _sampled(head, value, normalizer, size, tol, rng)
        upper = sampled.upper + own
        if upper > tol:
            raise _refusal(head, tol, upper)
        return HeadAnswer(
            value,
            normalizer,
            upper,
            FAILURE,
            "relative-frobenius",
            f"exact attention; {sampled.source}",
            self.plan(head, reason),
            log_error,
        )

    def _solve_proven(self, head: Head, tol: float, reason: str) -> HeadAnswer:
        half = value_range(head).half if head.sizes[1] else 0.0
        for dtype in dict.fromkeys([head.dtype, head.xp.float64]):
            bound = rounding_bound(head, dtype)
            if bound <= tol * half or (half == 0 and math.isfinite(bound)):
                value, normalizer = head.finish(*head.attend(dtype, self.block))
                return HeadAnswer(
                    value,
                    normalizer,
                    bound,
                    0.0,
                    "max",
                    f"exact attention in {dtype}: a-priori rounding bound",
                    self.plan(head, reason),
                    log_error_of(head, normalizer, dtype),
                )
        raise RefusalError(
            f"tol={tol:g} cannot be proven: rounding in float64 is bounded by "
            f"{bound:.1e} where the half range of the values is {half:.1e}"
        )


def _bound_exceeds(head: Head, tol: float) -> bool:
    """Whether the rounding bound exceeds ``tol`` for an output of any size."""
    peak = value_range(head).peak if head.sizes[1] else 0.0
    # twice: outputs may exceed all values by their rounding error
    return rounding_bound(head, head.dtype) > 2 * tol * peak


def _refusal(head: Head, tol: float, error: float) -> RefusalError:
    if math.isinf(error):
        return RefusalError(
            f"tol={tol:g} cannot be met: logits or sums overflow {head.dtype}, or the "
            "output underflows; scale query, key or value or pass float64 arrays"
        )
    return RefusalError(
        f"tol={tol:g} is below what {head.dtype} holds for this head (error "
        f"{error:.1e}): pass float64 arrays or a larger tol"
    )


def _sampled(
    head: Head,
    value: Array,
    normalizer: Array,
    size: tuple[float, float],
    tol: float,
    rng: np.random.Generator,
) -> SampledError:
    """Compare rows with float64, drawn by an error profile of their rounding."""
    found = row_statistics(head, rng)
    with np.errstate(over="ignore", invalid="ignore"):
        # rounding of logits is proportional to the norms, that of exp and sums constant
        norms = abs(head.scale) * row_norms(head.query, head.query_squares)
        rounding = 1 + norms * _norms(head)[1]
    seen = SeenKeys.of(head, found, value, normalizer)
    error_profile = profile_errors(
        found, seen, rounding=np.nan_to_num(rounding, nan=np.inf)
    )
    return certify_rows(
        head,
        value,
        tol,
        rng,
        size=size,
        error_profile=error_profile.squares,
        first=_ROWS,
    )


def _relative_bound(head: Head, peak: float, norm: float, tol: float) -> float:
    """Bound the relative Frobenius error by the rounding bound of every entry.

    ``peak`` and ``norm`` are ``scaled_frobenius`` of the output. Infinite where the
    bound is certain to exceed ``tol``.
    """
    n, m, _, p = head.sizes
    if m == 0:
        return 0.0
    if not math.isfinite(peak):
        return math.inf
    if peak == 0:
        # a zero output is exact if all values are zero
        return 0.0 if head.largest_value == 0 else math.inf
    root = math.sqrt(n * p)
    most = tol / (1 + tol) * norm * peak / root
    bound = rounding_bound(head, head.dtype, most)
    return relative(bound / peak * root, norm)


def rounding_bound(head: Head, dtype: Any, most: float = math.inf) -> float:
    r"""Bound ``max |computed - exact|`` of streaming attention in ``dtype``.

    A logit has an error of at most :math:`(\gamma_{d+2} + 4u) L` with :math:`L = s
    \max\|q\| \max\|k\|` and the unit roundoff :math:`u`; exp, and every rescaling of
    the running sums, add a relative error of :math:`8u` to the weights. The weighted
    sums add :math:`\gamma` of the number of terms, relative to the largest value. An
    underflow adds the smallest number, an underflow of exp the least normal number.
    Rows whose logits could overflow are rescaled, so that weights are positive in any
    case, and the error of a mean is at most the range of the values. The bound is
    infinite if sums could overflow, or if the error of sums alone exceeds ``most``.
    """
    xp, m = head.xp, head.sizes[1]
    if m == 0:
        return 0.0
    u, tiny = unit_roundoff(xp, dtype), smallest_number(xp, dtype)
    value_bounds = value_range(head)
    sums = sums_error(m, u, is_fast=head.has_fast_kernel)
    if sums * value_bounds.peak > most:
        return math.inf
    if m * value_bounds.peak > largest_number(xp, dtype) / 4:
        return math.inf
    weights = _weights_bound(head, dtype)
    cut = cut_weights(xp, dtype, m)
    error = (
        mean_deviation(weights + cut, value_bounds.half)
        + (sums + cut) * value_bounds.peak
    )
    return once_stored(xp, head.query.dtype, value_bounds.peak, error + 2 * m * tiny)


def may_overflow(head: Head) -> bool:
    """Whether a logit may leave the range of the dtype of computation."""
    return not _is_held(*_norms(head), head.xp, head.dtype)


def _norms(head: Head) -> tuple[float, float]:
    """Largest norms of a query times the scale, and of a key."""
    query_norm = largest_row(head.query, head.query_squares)
    return abs(head.scale) * query_norm, largest_row(head.key, head.key_squares)


def _is_held(query_norm: float, key_norm: float, xp: Any, dtype: Any) -> bool:
    """Whether ``dtype`` holds scaled queries, and their products with keys."""
    most = largest_number(xp, dtype) / 4
    # false for NaN, from zero times infinity
    return query_norm < most and query_norm * key_norm < most


def log_error_of(head: Head, logarithm: Array, dtype: Any = None) -> Array:
    """Bound the error of each row's log-sum-exp of exact attention in ``dtype``.

    The dtype is by default that of the head. The bound, shape (n,), adds the errors of
    the logits, of their exps, and of the sum of these.
    """
    xp, (n, m, d, _) = head.xp, head.sizes
    dtype, is_fast = head.dtype if dtype is None else dtype, head.has_fast_kernel
    if m == 0:
        return np.zeros(n)
    query = abs(head.scale) * row_norms(head.query, head.query_squares)
    key = largest_row(head.key, head.key_squares)
    most = largest_number(xp, dtype) / 4
    sums = sums_error(m, unit_roundoff(xp, dtype), is_fast=is_fast)
    sums += cut_weights(xp, dtype, m)
    with np.errstate(over="ignore", invalid="ignore"):
        logit_bound = query * key
        error = _exponent_error(m, d, logit_bound, key, xp, dtype, is_fast=is_fast)
        error -= math.log1p(-sums) if sums < 1 else -math.inf
        # a bound that is NaN or overflowed is infinite
        error = np.where((logit_bound < most) & (query < most), error, np.inf)
    return log_errors(head, logarithm, error, dtype)


def _weights_bound(head: Head, dtype: Any) -> float:
    """Bound the relative error of all weights of a head in ``dtype``."""
    _, m, d, _ = head.sizes
    norms, is_fast = _norms(head), head.has_fast_kernel
    return weights_error(m, d, *norms, head.xp, dtype, is_fast=is_fast)


def _blocks(m: int, is_fast: bool) -> int:
    """Blocks of keys that are summed one after the other."""
    return -(-m // _KEYS_A_BLOCK[0]) if is_fast else 1


def sums_error(m: int, u: float, *, is_fast: bool) -> float:
    """Bound the error of the weighted sums over m keys, relative to the values."""
    terms = min(m, _KEYS_A_BLOCK[1]) + 2 * _blocks(m, is_fast) if is_fast else m
    return 2 * gamma(terms + 2, u) + 2 * u


def weights_error(
    m: int,
    d: int,
    query_norm: float,
    key_norm: float,
    xp: Any,
    dtype: Any,
    *,
    is_fast: bool,
) -> float:
    """Bound the relative error of weights; ``query_norm`` includes the scale."""
    logit_bound = query_norm * key_norm
    if not _is_held(query_norm, key_norm, xp, dtype):
        return math.inf
    exponent = _exponent_error(m, d, logit_bound, key_norm, xp, dtype, is_fast=is_fast)
    return math.expm1(exponent) if exponent < 1 else math.inf


def _exponent_error(
    m: int,
    d: int,
    logit_bound: Any,
    key_norm: float,
    xp: Any,
    dtype: Any,
    *,
    is_fast: bool,
) -> Any:
    """Bound the log of a weight's relative error, for logits up to ``logit_bound``."""
    u = unit_roundoff(xp, dtype)
    # scaling the query, summing the product, subtracting the maximum
    exponent = (gamma(d + 2, u) + 4 * u) * logit_bound
    exponent += EXP * (_blocks(m, is_fast) + 1) * u
    return exponent + d * smallest_number(xp, dtype) * (1 + key_norm)
