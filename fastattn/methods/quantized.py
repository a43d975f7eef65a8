"""Exact softmax attention but for products of eight bits, which take half the time."""

import math
from collections.abc import Iterator
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
from fastattn.costs.work import quantized_work, seconds
from fastattn.problem.head import Head, host_rows
from fastattn.problem.plan import (
    Candidate,
    ConfiguredMethod,
    HeadAnswer,
    Plan,
    candidate_of,
)
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_choice

# the coarsest first
_LOGITS = "int8", "bfloat16"
# rows and keys whose logits are looked at first; logits that err by this share of the
# tolerance need no pilot, since errors of weights average out, and those that err by so
# many times it have no use for one
_ROWS, _KEYS = 128, 1024
_SAFE, _HOPELESS = 0.75, 4.5
# rows that tell the error of all, and the share of the tolerance that they may err by
_PILOT = 32
_SURE = 0.6
# relative deviation of a product of two numbers that are rounded to bfloat16
_ROUNDED = 0.6 * 2.0**-8
# largest relative error of a weight: its exp, and its rounding to bfloat16
_WEIGHT = 7.5e-5 + 1.01 * 2.0**-8
# a column of keys that are all alike
_LEAST = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Softmax attention over all keys with products of eight bits.

    Queries, keys and values are centred and rounded to eight bits, and so are the
    weights; what is added up, and the part of the logits that the mean query has, is
    not. On real heads, sharp or diffuse, it errs by .1 to .4 per cent with factors of
    the logits in bfloat16 and by .2 to 1.6 per cent with integers, in about half and a
    third of the time of exact attention.

    Parameters
    ----------
    logits : {"int8", "bfloat16"}, optional
        What the factors of the logits are rounded to; by default the coarsest that a
        few rows say meets the tolerance. Values and weights are bfloat16.

    Notes
    -----
    It needs NumPy arrays in float32 or float16 and a processor with AVX-512 BF16 and
    VNNI; elsewhere it would take longer than :class:`Exact` and is refused. Nothing is
    proven: ``guarantee="proven"`` is refused, too.

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

    def candidates(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[Candidate]:
        """Say what would run, or why it would be refused."""
        yield candidate_of(self, lambda: self.configure(head, tol, guarantee, rng).plan)

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
        """Choose what is coarse enough for one head."""
        if guarantee == "proven":
            raise RefusalError(
                "Quantized() has no proven bound: use guarantee='sampled', or Exact()"
            )
        reason = why_not(head)
        if reason:
            raise RefusalError(reason)
        if self.logits is not None:
            return _configured(self, head, math.nan, "asked for")
        return configured_quantized(head, tol, rng, "asked for")


def why_not(head: Head) -> str:
    """Say why a head is not multiplied in eight bits; nothing if it may be."""
    if head.dtype != head.xp.float32:
        return f"eight bits are too coarse for {head.dtype}: use Exact() or Auto()"
    if head.sizes[1] == 0:
        return "there is no key to multiply with: use Exact() or Auto()"
    if not multiplies_quantized(head.query):
        return (
            "products of eight bits need NumPy arrays and a processor with AVX-512 "
            "BF16 and VNNI: use Exact() or Auto()"
        )
    return ""


def configured_quantized(
    head: Head, tol: float, rng: np.random.Generator, reason: str
) -> ConfiguredMethod:
    """Choose the coarsest products that a few logits, or rows, say meet a tolerance.

    Parameters
    ----------
    head : Head
        One head, of which ``why_not`` says nothing.
    tol : float
        Relative Frobenius error that is allowed.
    rng : Generator
        Draws the rows.
    reason : str
        Goes into the plan.

    Raises
    ------
    RefusalError
        If none is predicted to.
    """
    n, truth, error = head.sizes[0], None, math.inf
    few = head.with_rows(np.sort(rng.choice(n, min(n, _PILOT), replace=False)))
    off = dict(zip(_LOGITS, _logit_errors(head, rng), strict=True))
    for logits in _LOGITS:
        error, most = off[logits], _SAFE
        if not error <= _HOPELESS * tol:
            continue
        if not error <= most * tol:
            truth = few.attend()[0] if truth is None else truth
            error, most = _relative(_run(few, logits=logits)[0], truth), _SURE
        if error <= most * tol:
            return _configured(Quantized(logits), head, error, reason)
    raise RefusalError(f"products of eight bits err by {error:.1e} in a few rows")


def _logit_errors(head: Head, rng: np.random.Generator) -> list[float]:
    """Root mean squares of the errors of some logits, for either rounding."""
    query, key = (
        host_rows(x, rng.choice(x.shape[0], min(x.shape[0], size), replace=False))
        for x, size in ((head.query, _ROWS), (head.key, _KEYS))
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
    plan = Plan(method, error, seconds(work), reason)
    return ConfiguredMethod(
        plan,
        partial(_run, logits=logits),
        math.inf,
        rounding=partial(_logit_deviation, logits=logits),
        log_errors=partial(_log_errors, logits=logits),
    )


def _logit_deviation(head: Head, *, logits: str) -> Array:
    """Deviation of the rounding error of each row's logits, and of its weights.

    A number rounded to steps of one has a variance of a twelfth; the errors of the
    factors are taken to be independent of one another. Weights and values are rounded
    to bfloat16, which is as if logits erred by as much.
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
    """Bound the error of each row's log-sum-exp by those of its logits and weights.

    A factor is off by half a step at most. What float32 adds on the way is of the size
    of the logits; a weight is off by the rounding to bfloat16 and that of its exp.
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
    # what float32 rounded here is much less than this
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
    """Relative Frobenius error; infinite where something overflows."""
    answer, truth = (to_host(x).astype(np.float64) for x in (answer, truth))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        error = np.linalg.norm(answer - truth)
        error = error / np.linalg.norm(truth) if error else error
    return float(error) if np.isfinite(error) else math.inf
