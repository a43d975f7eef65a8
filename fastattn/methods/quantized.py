"""Attention over all keys with int8/bfloat16 matmuls, at about half the time."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastattn._ops.quantized import (
    STEPS,
    attend_quantized,
    factors,
    multiplies_quantized,
)
from fastattn.certificates.certify import certified
from fastattn.certificates.log_errors import log_errors
from fastattn.certificates.rounding import gamma, largest_row, row_norms, unit_roundoff
from fastattn.costs.policy import POLICY
from fastattn.costs.work import quantized_work
from fastattn.problem.head import Head, host_rows
from fastattn.problem.plan import Configurable, ConfiguredMethod, HeadAnswer, Plan
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_choice

# formats of the logits' factors, the fastest (least precise) first
_LOGITS = "int8", "bfloat16"
# relative standard deviation of a product of two numbers rounded to bfloat16
_ROUNDED = 0.6 * 2.0**-8
# largest relative error of a weight: that of exp, and of rounding to bfloat16
_WEIGHT = 7.5e-5 + 1.01 * 2.0**-8
# least int8 step, for columns in which all keys are equal
_LEAST = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class Quantized(Configurable):
    """Softmax attention over all keys with int8/bfloat16 matmuls.

    Queries, keys and values are centred and rounded, and so are the weights; sums, and
    the logits of the mean query, stay in float32. On transformer heads, peaked or
    diffuse, the relative error is .1 to .4 per cent with logits in bfloat16 and .2 to
    1.6 per cent with logits in int8, at about half and a third of the time of exact
    attention.

    Parameters
    ----------
    logits : {"int8", "bfloat16"}, optional
        Format of the factors of the logits; by default int8 if that meets the tolerance
        on a few rows, else bfloat16. Values and weights are bfloat16.

    Notes
    -----
    The method needs NumPy arrays in float32 or float16 and a processor with AVX-512
    BF16 and VNNI; on others it would be slower than :class:`Exact` and is refused.
    Nothing is proven: ``guarantee="proven"`` is refused, too.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Quantized, RefusalError, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 64, 8), dtype=np.float32)
    >>> try:
    ...     answer = approximate(query, key, value, method=Quantized(), rng=0)
    ...     small = bool(answer.certificate.error <= 1e-2)
    ... except RefusalError as error:
    ...     small = "AVX-512" in str(error)
    >>> small
    True

    References
    ----------
    Zhang et al., SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference
    Acceleration, arXiv 2410.02367.
    """

    logits: str | None = None

    def __post_init__(self) -> None:
        if self.logits is not None:
            check_choice("logits", self.logits, _LOGITS)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or refuse."""
        configured = self.configure(head, tol, guarantee, rng)
        answer = certified(head, configured, tol, rng)
        if not answer.error <= tol:
            raise RefusalError(
                f"{configured.plan.method} misses tol={tol:g}: {answer.error:.2e} on "
                "sampled rows; raise tol, or use Exact() or Auto()"
            )
        return answer

    def configure(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> ConfiguredMethod:
        """Choose the format of the logits for one head."""
        if guarantee == "proven":
            raise RefusalError(
                "Quantized() has no proven bound: use guarantee='sampled', or Exact()"
            )
        reason = why_not(head)
        if reason:
            raise RefusalError(reason)
        if self.logits is not None:
            return _configured(self, head, math.nan, "requested")
        return configured_quantized(head, tol, rng, "requested")


def why_not(head: Head) -> str:
    """Return why int8/bfloat16 matmuls are refused for a head, or an empty string."""
    if head.dtype != head.xp.float32:
        return (
            f"8-bit matmuls are too inaccurate for {head.dtype}: use Exact() or Auto()"
        )
    if head.sizes[1] == 0:
        return "there are no keys: use Exact() or Auto()"
    if not multiplies_quantized(head.query):
        return (
            "int8/bfloat16 matmuls need NumPy arrays and a processor with AVX-512 BF16 "
            "and VNNI: use Exact() or Auto()"
        )
    return ""


def configured_quantized(
    head: Head, tol: float, rng: np.random.Generator, reason: str
) -> ConfiguredMethod:
    """Choose int8 or bfloat16 by the errors of some logits, or by a pilot run.

    Parameters
    ----------
    head : Head
        One head for which ``why_not`` returns an empty string.
    tol : float
        Tolerance, the relative Frobenius error.
    rng : Generator
        Draws the rows.
    reason : str
        Reason of the plan.

    Raises
    ------
    RefusalError
        If neither is predicted to meet the tolerance.
    """
    policy = POLICY.quantized
    n, truth, error = head.sizes[0], None, math.inf
    few = head.with_rows(
        np.sort(rng.choice(n, min(n, policy.pilot_rows), replace=False))
    )
    off = dict(zip(_LOGITS, _logit_errors(head, rng), strict=True))
    for logits in _LOGITS:
        error, most = off[logits], policy.safe
        if not error <= policy.hopeless * tol:
            continue
        if not error <= most * tol:
            truth = few.attend()[0] if truth is None else truth
            error, most = _relative(_run(few, logits=logits)[0], truth), policy.sure
        if error <= most * tol:
            return _configured(Quantized(logits), head, error, reason)
    raise RefusalError(f"int8/bfloat16 matmuls err by {error:.1e} in a few rows")


def _logit_errors(head: Head, rng: np.random.Generator) -> list[float]:
    """Root mean square rounding errors of some logits, in int8 and in bfloat16."""
    policy = POLICY.quantized
    query, key = (
        host_rows(x, rng.choice(x.shape[0], min(x.shape[0], size), replace=False))
        for x, size in ((head.query, policy.rows), (head.key, policy.keys))
    )
    with np.errstate(over="ignore", invalid="ignore"):
        query, key = head.scale * (query - query.mean(axis=0)), key - key.mean(axis=0)
        query = query.astype(np.float32)
        exact, errors = query @ key.T, []
        for logits in _LOGITS:
            left, right = factors(query, key, integers=logits == "int8")
            errors.append(float(np.sqrt(np.mean((left @ right.T - exact) ** 2))))
    return errors


def _configured(
    method: Quantized, head: Head, error: float, reason: str
) -> ConfiguredMethod:
    logits = method.logits or _LOGITS[-1]
    work = quantized_work(*head.sizes, integers=logits == "int8", logits=head.logits)
    plan = Plan(method, error, work, reason)
    return ConfiguredMethod(
        plan,
        partial(_run, logits=logits),
        math.inf,
        rounding=partial(_logit_deviation, logits=logits),
        log_errors=partial(_log_errors, logits=logits),
    )


def _logit_deviation(head: Head, *, logits: str) -> Array:
    """Standard deviation of the rounding error of each row's logits, shape (n,).

    Rounding to multiples of a step has the variance step^2 / 12; the errors of factors
    are assumed to be independent. The rounding of weights and values to bfloat16 counts
    as an equally large error of the logits.
    """
    query, key = (to_host(x).astype(np.float32) for x in (head.query, head.key))
    with np.errstate(over="ignore", invalid="ignore"):
        query, key = head.scale * (query - query.mean(axis=0)), key - key.mean(axis=0)
        squares = np.mean(key**2, axis=0)
        if logits == "bfloat16":
            return _ROUNDED * np.sqrt(1 + query**2 @ squares)
        column = np.maximum(np.abs(key).max(axis=0) / STEPS, _LEAST)
        query = query * column
        row = np.abs(query).max(axis=1) / STEPS
        own = np.sum(query**2, axis=1) + row**2 * float(np.sum(squares / column**2))
        return np.sqrt(_ROUNDED**2 + own / 12)


def _log_errors(head: Head, logarithm: Array, *, logits: str) -> Array:
    """Bound the error of each row's log-sum-exp by the errors of logits and weights.

    A factor has an error of half a step at most. The rounding in float32 is relative to
    the norms of query and key; a weight adds the errors of bfloat16 and of exp.
    """
    _, m, d, _ = head.sizes
    query, key = (to_host(x).astype(np.float32) for x in (head.query, head.key))
    u, norms = unit_roundoff(np, np.float32), row_norms(query)
    logit_rounding = gamma(d + 12, u) * abs(head.scale) * norms * (2 * largest_row(key))
    with np.errstate(over="ignore", invalid="ignore"):
        query = np.abs(head.scale * (query - query.mean(axis=0)))
        key = np.abs(key - key.mean(axis=0))
        if logits == "bfloat16":
            half = 2.0**-8
            off = (2 * half + half**2) * largest_row(key)
            off = off * row_norms(query)
        else:
            column = np.maximum(key.max(axis=0) / STEPS, _LEAST)
            query *= column
            steps = float(np.max(key @ (1 / column))) + d / 2
            off = (query.sum(axis=1) + query.max(axis=1) / STEPS * steps) / 2
    # 2^-10 covers the float32 rounding of this bound itself
    weights = off * (1 + 2.0**-10) + logit_rounding + _WEIGHT + 2 * gamma(m, u)
    return log_errors(head, logarithm, weights, np.float32)


def _run(head: Head, *, logits: str) -> tuple[Array, Array, Array]:
    value, normalizer = attend_quantized(
        head.query,
        head.key,
        head.value,
        scale=head.scale,
        prefix_lengths=head.prefix_lengths,
        integers=logits == "int8",
    )
    return value, normalizer, head.xp.logical_not(head.xp.isnan(normalizer))


def _relative(answer: Array, truth: Array) -> float:
    """Relative Frobenius error; infinite if it overflows."""
    answer, truth = (to_host(x).astype(np.float64) for x in (answer, truth))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        error = np.linalg.norm(answer - truth)
        error = error / np.linalg.norm(truth) if error else error
    return float(error) if np.isfinite(error) else math.inf
