r"""Merging answers over disjoint sets of keys, with a certificate from those of parts.

For each row, the answer over the union of the keys is the mean of the parts' answers
with weights ``exp(log_normalizer)``. Each part has an error of its answer, which its
certificate bounds, and an error of its weight. If all log-sum-exps have errors of at
most :math:`\eta`, the ratio of the weights of two groups of parts changes by a factor
of at most :math:`e^{2 \eta}`, so that a mean of numbers within a range :math:`R`
changes by at most :math:`R \tanh(\eta / 2)`. Where errors of log-sum-exps are unknown,
:math:`\eta` is infinite, and this bound is :math:`R`, the range of the parts' answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import relative
from fastattn.certificates.rounding import smallest_number, unit_roundoff
from fastattn.certificates.sampled import scaled_frobenius
from fastattn.methods.exact import Exact
from fastattn.problem.head import gather_rows
from sketching._lib.arrays import Array, array_namespace, mover, to_host
from sketching._lib.certificate import Approximation, Certificate

# bound on the logarithm of a number of keys
_LOG_COUNT = 50.0
# rounding errors of one weight and its share in the sums, in float64: the error of an
# exponent x <= 0 counts |x| exp(x), less than one
_ROUNDINGS = 32


@dataclass(frozen=True, slots=True)
class Merged:
    """The plan of a merged answer.

    Parameters
    ----------
    parts : tuple
        The plans of the parts.
    log_error : float
        Bound on the error of every log-sum-exp; infinite where one is unknown.
    """

    parts: tuple[Any, ...]
    log_error: float


def merge_answers(answers: Sequence[Approximation]) -> Approximation:
    r"""Merge answers to the same queries over disjoint sets of keys.

    With answers :math:`o_i` and log-sum-exps :math:`L_i` of the parts, the answer over
    all keys is :math:`\sum_i e^{L_i - L} o_i` with :math:`L = \log \sum_i e^{L_i}`.

    Parameters
    ----------
    answers : sequence of Approximation
        Results of :func:`approximate` for each set of keys. Their values, and their
        log-normalizers, must have one shape, dtype and library.

    Returns
    -------
    Approximation
        ``value`` and ``log_normalizer`` over all keys, with ``log_normalizer_error``
        for rows in which every part has one. The certificate has norm "max" if all
        parts do, else "relative-frobenius"; ``failure`` is at most the sum of those of
        the parts. ``plan`` has the plans of the parts.

    Raises
    ------
    TypeError
        If an answer is no Approximation, or the parts differ in library or dtype.
    ValueError
        If there is no answer, shapes differ, or an answer has no log-normalizers or
        NaN among them.

    Notes
    -----
    The error bound follows from the certificates of the parts alone. These bound the
    errors of the parts' answers; those of the weights are bounded by
    ``log_normalizer_error`` of each part. Where a part has none, the bound includes the
    distance between the parts' answers and can be large. An exception are parts by
    ``Exact()`` with ``failure=0``: their certificate is the relative error of weights
    times half the range of the values, and the differences between rows of the answer
    are a lower bound on that range.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import approximate, merge_answers
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 100, 4))
    >>> halves = slice(0, 50), slice(50, 100)
    >>> parts = [approximate(query, key[x], value[x]) for x in halves]
    >>> merged = merge_answers(parts)
    >>> whole = approximate(query, key, value)
    >>> np.allclose(merged.value, whole.value, rtol=0, atol=1e-14)
    True
    >>> bool(merged.certificate.error < 1e-11)
    True

    References
    ----------
    Milakov and Gimelshein, Online normalizer calculation for softmax,
    arXiv 1805.02867.
    """
    answers = _checked(answers)
    first = answers[0]
    normalizer: Any = first.log_normalizer
    xp = array_namespace(first.value)
    logs = xp.stack([xp.astype(x.log_normalizer, xp.float64) for x in answers])
    values = xp.stack([xp.astype(x.value, xp.float64) for x in answers])
    seen = logs > -xp.inf
    # a part without keys has weight zero; if no part has keys, the answer is zero
    values = xp.where(seen[..., None], values, xp.zeros_like(values))
    peak = xp.max(logs, axis=0)
    weights = xp.exp(logs - xp.where(peak > -xp.inf, peak, xp.zeros_like(peak)))
    total = xp.sum(weights, axis=0)
    some = total > 0
    total = xp.where(some, total, xp.ones_like(total))
    value = xp.sum((weights / total)[..., None] * values, axis=0)
    logarithm = xp.where(some, xp.log(total) + peak, xp.full_like(peak, -xp.inf))
    low = xp.min(xp.where(seen[..., None], values, xp.inf), axis=0)
    high = xp.max(xp.where(seen[..., None], values, -xp.inf), axis=0)
    spread = xp.where(some[..., None], high - low, xp.zeros_like(value))
    merged = Approximation(
        xp.astype(value, first.value.dtype),
        first.certificate,
        None,
        xp.astype(logarithm, normalizer.dtype),
    )
    certificate, plan, errors = _certified(merged, answers, spread)
    known = None
    if np.isfinite(errors).any():
        known = mover(first.value, xp.float64)(errors)
    return replace(
        merged, certificate=certificate, plan=plan, log_normalizer_error=known
    )


def _checked(given: Any) -> list[Approximation]:
    """Return the answers as a list; raise unless they fit together."""
    answers: list[Approximation] = list(given)
    if not answers:
        raise ValueError("answers: expected at least one answer, got none")
    for i, x in enumerate(answers):
        if not isinstance(x, Approximation):
            raise TypeError(
                f"answers: expected results of approximate(), got {type(x).__name__} "
                f"at {i}"
            )
        if x.log_normalizer is None:
            raise ValueError(f"answers: the answer at {i} has no log_normalizer")
    first = answers[0]
    for name in ("value", "log_normalizer"):
        arrays = [getattr(x, name) for x in answers]
        xp = array_namespace(*arrays)
        for i, x in enumerate(arrays):
            if x.shape != arrays[0].shape:
                raise ValueError(
                    f"answers: {name} has shape {tuple(x.shape)} at {i}, but "
                    f"{tuple(arrays[0].shape)} at 0"
                )
            if x.dtype != arrays[0].dtype:
                raise TypeError(
                    f"answers: {name} is {x.dtype} at {i}, but {arrays[0].dtype} at 0"
                )
            # minus infinity means that a row attends to no key
            bad = xp.logical_not(xp.isfinite(x))
            if name == "log_normalizer":
                bad = xp.logical_and(bad, x != -xp.inf)
            if bool(xp.any(bad)):
                raise ValueError(f"answers: {name} has NaN or infinities at {i}")
    wanted, got = first.value.shape[:-1], arrays[0].shape
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"answers: expected log_normalizer of shape {tuple(wanted)}, got "
            f"{tuple(got)}"
        )
    return answers


def _certified(
    merged: Approximation, answers: list[Approximation], spread: Array
) -> tuple[Certificate, Any, Array]:
    """The certificate and plan of each head, and error bounds of the log-sum-exps."""
    lead = tuple(spread.shape[:-2])
    largest = all(x.certificate.norm == "max" for x in answers)
    normalizer: Any = merged.log_normalizer
    error, failure = np.empty(lead), np.empty(lead)
    log_errors = np.empty(tuple(spread.shape[:-1]))
    source, plan = np.empty(lead, dtype=object), np.empty(lead, dtype=object)
    for place in np.ndindex(*lead):
        parts = [_Part.of(x, place) for x in answers]
        # the largest error of the parts, for each row
        etas = np.max([x.log_error for x in parts], axis=0)
        value, eta = merged.value[(*place, ...)], float(etas.max())
        error[place] = _bound(value, parts, spread[(*place, ...)], etas, largest)
        failure[place] = min(1.0, sum(x.failure for x in parts))
        rounded = _log_rounding(normalizer[(*place, ...)])
        rounded += _ROUNDINGS * len(parts) * unit_roundoff(np, np.float64)
        log_errors[place] = etas + rounded
        plan[place] = Merged(tuple(x.plan for x in parts), eta + rounded)
        known = "not known for all rows" if np.isfinite(etas).any() else "not known"
        known = f"at most {eta:.1e}" if math.isfinite(eta) else known
        source[place] = (
            f"merge of {len(parts)} answers: their error bounds and the distance "
            f"between them, with errors of log-sum-exps {known}"
        )
    norm = "max" if largest else "relative-frobenius"
    if lead:
        return Certificate(error, failure, norm, source), plan, log_errors
    certificate = Certificate(float(error[()]), float(failure[()]), norm, source[()])
    return certificate, plan[()], log_errors


@dataclass(frozen=True, slots=True)
class _Part:
    """The certificate of one answer for one head.

    Parameters
    ----------
    largest, frobenius : float
        Bounds on the error of the answer: of each entry, and in Frobenius norm;
        infinite if unknown.
    log_error : array, shape (n,)
        Bound on the error of its log-sum-exps; infinite if unknown.
    failure : float
        The failure probability.
    plan : object
        Its plan.
    """

    largest: float
    frobenius: float
    log_error: Array
    failure: float
    plan: Any

    @staticmethod
    def of(answer: Approximation, place: tuple[int, ...]) -> "_Part":
        """Take the head at index ``place`` of an answer."""
        certificate = answer.certificate
        value = answer.value[(*place, ...)]
        plan = answer.plan[place] if place else answer.plan
        error, failure = (
            float(np.asarray(x)[place])
            for x in (certificate.error, certificate.failure)
        )
        root = math.sqrt(math.prod(value.shape))
        if certificate.norm == "max":
            largest, frobenius, entry = error, error * root, error
        else:
            peak, norm = scaled_frobenius(value)
            size = peak * norm
            # a relative bound of Exact() is a bound on all entries in other units
            largest, entry = math.inf, error * size / root
            frobenius = error / (1 - error) * size if error < 1 else math.inf
        normalizer: Any = answer.log_normalizer
        if answer.log_normalizer_error is not None:
            known = to_host(answer.log_normalizer_error[(*place, ...)])
            return _Part(largest, frobenius, known, failure, plan)
        method, logarithm = getattr(plan, "method", plan), normalizer[(*place, ...)]
        log_error = _log_error(method, failure, value, logarithm, entry)
        errors = np.full(value.shape[0], log_error)
        return _Part(largest, frobenius, errors, failure, plan)


@singledispatch
def _log_error(_method: Any, *_: Any) -> float:
    """Bound on the error of the log-sum-exps of an answer without bounds of its own."""
    return math.inf


@_log_error.register
def _merged_log_error(plan: Merged, *_: Any) -> float:
    return plan.log_error


@_log_error.register
def _exact_log_error(
    _method: Exact, failure: float, value: Array, logarithm: Array, error: float
) -> float:
    """Bound on the error of the log-sum-exps of exact attention.

    The certificate of its answers is at least the relative error of weights and sums
    times half the range of the values, and all true answers are within that range.
    """
    if failure > 0:
        return math.inf
    xp = array_namespace(value)
    rows = np.flatnonzero(to_host(xp.isfinite(logarithm)))
    if len(rows) == 0:
        return 0.0
    value = gather_rows(value, rows)
    value = xp.astype(value, xp.float64)
    half = float(xp.max(xp.max(value, axis=0) - xp.min(value, axis=0))) / 2 - error
    return error / half + _log_rounding(logarithm) if half > 0 else math.inf


def _log_rounding(logarithm: Array) -> float:
    """Bound on the rounding error of the last operations of a log-sum-exp."""
    xp = array_namespace(logarithm)
    finite = xp.isfinite(logarithm)
    size = xp.abs(xp.where(finite, logarithm, xp.zeros_like(logarithm)))
    return 4 * unit_roundoff(xp, logarithm.dtype) * (float(xp.max(size)) + _LOG_COUNT)


def _bound(
    value: Array, parts: list[_Part], spread: Array, etas: Array, largest: bool
) -> float:
    """Bound on the error of a merged head: of an entry, or relative Frobenius."""
    xp = array_namespace(value)
    peak = float(xp.max(xp.abs(value)))
    # if a range overflows, the bound is infinite, also for eta = 0
    moved = mover(value, xp.float64)(np.tanh(etas / 2)[:, None])
    moved = xp.where(spread < xp.inf, moved * spread, spread)
    rounding = 2 * unit_roundoff(xp, value.dtype)
    rounding += _ROUNDINGS * len(parts) * unit_roundoff(xp, xp.float64)
    # parts may be larger than their mean
    largest_value = peak + float(xp.max(spread))
    # a weight that underflows loses the smallest number of float64
    rounding += len(parts) * smallest_number(xp, xp.float64)
    rounded = rounding * largest_value + smallest_number(xp, value.dtype)
    if largest:
        own = max(x.largest for x in parts)
        return own + float(xp.max(moved)) + rounded
    sizes = [scaled_frobenius(x) for x in (moved, value)]
    between, whole = (unit * norm for unit, norm in sizes)
    own = math.sqrt(sum(x.frobenius**2 for x in parts))
    total = own + between + rounded * math.sqrt(math.prod(value.shape))
    return relative(total, whole) if whole else (total and math.inf)
