"""Run a method without a proven bound, recompute outlier rows, certify the rest."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.apriori import apriori_certificate
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import (
    FLOAT64_BELOW,
    ROWS,
    SharedSampling,
    certify_rows,
    rounded_rows,
    sampled_rows,
    scaled_frobenius,
)
from fastattn.problem.causal_chunks import causal_error_profile
from fastattn.problem.head import Head, host_rows
from fastattn.problem.plan import ConfiguredMethod, HeadAnswer
from fastattn.problem.row_statistics import RowErrors, SeenKeys, profile_errors
from sketching._lib.arrays import Array, array_namespace, device_of, to_host
from sketching._lib.certificate import RefusalError

# share of rows that may be recomputed exactly because the method failed on them
_MOST_RECOMPUTED = 0.02
# rows that are folded into one long row to take minima and maxima; rows of a block
_FOLD = 16
_BLOCK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Repaired:
    """An output whose outlier rows were recomputed exactly.

    Parameters
    ----------
    value, log_normalizer : array, shapes (n, p) and (n,)
        Output in the dtype of the query, log-sum-exps in the dtype of computation.
    exact_rows : integer array
        Indices of the rows that were computed exactly.
    squares : array, shape (n,)
        Error profile: expected squared errors of the rows up to a common factor.
    has_own : bool
        Whether the method itself returned an error profile.
    """

    value: Array
    log_normalizer: Array
    exact_rows: Array
    squares: Array
    has_own: bool


def repaired(
    head: Head,
    configured: ConfiguredMethod,
    tol: float,
    shared: SharedSampling,
    rng: np.random.Generator,
) -> Repaired:
    """Run a configured method; recompute outlier rows and failed rows exactly.

    A row failed if the method reports it as unreliable, or if its output lies outside
    the range of the values, which contains every weighted mean of them.

    Raises
    ------
    RefusalError
        If more than two per cent of the rows failed.
    """
    return _repaired(head, configured, configured.run(head), tol, shared, rng)


def _repaired(
    head: Head,
    configured: ConfiguredMethod,
    answer: tuple[Array, ...],
    tol: float,
    shared: SharedSampling,
    rng: np.random.Generator,
) -> Repaired:
    profiled = _profiled(head, configured, answer, shared, rng)
    # outlier rows are not sampled: they need the precision of the exact rows that the
    # sample is compared with
    dtype = head.xp.float64 if tol < FLOAT64_BELOW else None
    recomputed = _recomputed(head, configured, answer, profiled.outlier_rows, dtype)
    return Repaired(*recomputed, profiled.squares, len(answer) > 3)


def certified(
    head: Head,
    configured: ConfiguredMethod,
    tol: float,
    rng: np.random.Generator,
    shared: SharedSampling | None = None,
) -> HeadAnswer:
    """Run a method without a proven bound and certify it on sampled rows.

    All methods that are run on one head share one ``shared``.
    """
    shared = SharedSampling() if shared is None else shared
    plan, answer = configured.plan, configured.run(head)
    if math.isfinite(configured.limit):
        known = _known(head, configured, answer, tol)
        if known is not None:
            return known
    found = _repaired(head, configured, answer, tol, shared, rng)
    sampled = certify_rows(
        head,
        found.value,
        tol,
        rng,
        exact_rows=found.exact_rows,
        error_profile=found.squares,
        first=_first_rows(head.sizes[0], configured, found.has_own),
        budget=shared.budget,
        limit=configured.limit * math.sqrt(head.sizes[3]),
        expected=plan.predicted_error,
    )
    if math.isnan(plan.predicted_error):
        plan = replace(plan, predicted_error=sampled.estimate)
    return HeadAnswer(
        found.value,
        found.log_normalizer,
        sampled.upper,
        FAILURE,
        "relative-frobenius",
        sampled.source,
        plan,
        configured.log_errors and configured.log_errors(head, found.log_normalizer),
    )


def run_proven(head: Head, configured: ConfiguredMethod) -> tuple[Array, Array]:
    """Run a configured method whose bound holds for every row; recompute no row."""
    value, normalizer, reliable, *_ = configured.run(head)
    if not bool(head.xp.all(reliable)):
        raise RefusalError(
            "a sum of weights is not positive, which the bound excludes: the inputs "
            "are too extreme for this precision; use Exact()"
        )
    return head.finish(value, normalizer)


def recompute_rows(
    head: Head, value: Array, normalizer: Array, rows: Array, dtype: Any = None
) -> tuple[Array, Array]:
    """Replace the rows with the given indices by exact ones, computed in ``dtype``."""
    xp, n = head.xp, head.sizes[0]
    # special tokens give many equal rows: compute each distinct row once
    first, copies = _distinct(head, rows)
    exact, logarithm = head.with_rows(first).attend(dtype)
    copies = xp.asarray(copies, device=device_of(value))
    exact, logarithm = (xp.take(x, copies, axis=0) for x in (exact, logarithm))
    exact = xp.astype(exact, value.dtype, copy=False)
    logarithm = xp.astype(logarithm, normalizer.dtype, copy=False)
    if head.has_fast_kernel:
        value[rows], normalizer[rows] = exact, logarithm
        return value, normalizer
    # the array API has take but no portable assignment: gather old and new rows
    source = np.arange(n)
    source[rows] = n + np.arange(len(rows))
    take = xp.asarray(source, device=device_of(value))
    return (
        xp.take(xp.concat([value, exact]), take, axis=0),
        xp.take(xp.concat([normalizer, logarithm]), take, axis=0),
    )


def _distinct(head: Head, rows: Array) -> tuple[Array, Array]:
    """Distinct rows among ``rows``, and for each row the position of its equal."""
    if head.prefix_lengths is not None:
        return rows, np.arange(len(rows))
    _, first, copies = np.unique(
        host_rows(head.query, rows), axis=0, return_index=True, return_inverse=True
    )
    return rows[first], copies.reshape(-1)


def _known(
    head: Head, configured: ConfiguredMethod, answer: tuple[Array, ...], tol: float
) -> HeadAnswer | None:
    """Certify by a proven bound where it meets the tolerance: no row is sampled."""
    value, normalizer, reliable, *_ = answer
    if not bool(head.xp.all(reliable)):
        return None
    value, normalizer = head.finish(value, normalizer)
    n, _, _, p = head.sizes
    source = f"remainder of {configured.plan.method} on the interval of all logits"
    size = scaled_frobenius(value)
    found = apriori_certificate(configured.limit, size, n * p, tol, source)
    if found is None:
        return None
    errors = configured.log_errors and configured.log_errors(head, normalizer)
    certain = HeadAnswer.under(found, value, normalizer, configured.plan)
    return replace(certain, log_error=errors)


def _first_rows(n: int, configured: ConfiguredMethod, has_own: bool) -> int:
    """Size of the first sample: larger where exact rows are cheap for the method."""
    if configured.rounding is not None:
        return rounded_rows(n)
    return sampled_rows(n) if has_own else ROWS


def _profiled(
    head: Head,
    configured: ConfiguredMethod,
    answer: tuple[Array, ...],
    shared: SharedSampling,
    rng: np.random.Generator,
) -> RowErrors:
    """Estimate the error profile of an output."""
    found = shared.statistics(head, rng)
    seen = SeenKeys.of(head, found, *answer[:2])
    if configured.rounding is None:
        own = to_host(answer[3]) if len(answer) > 3 else None
        return profile_errors(found, seen, own=own, factor=causal_error_profile(head))
    # errors of single weights average out over the keys that a row attends to
    keys = (
        1.0
        if head.prefix_lengths is None
        else np.maximum(to_host(head.prefix_lengths), 1)
    )
    return profile_errors(
        found, seen, rounding=configured.rounding(head), factor=1 / keys
    )


def _recomputed(
    head: Head,
    configured: ConfiguredMethod,
    answer: tuple[Array, ...],
    outlier_rows: Array,
    dtype: Any = None,
) -> tuple[Array, Array, Array]:
    xp, n = head.xp, head.sizes[0]
    value, normalizer, reliable, *_ = answer
    inside = _in_range(head, value)
    if head.prefix_lengths is not None:
        # rows that attend to no key are zero
        inside = xp.logical_or(inside, head.prefix_lengths == 0)
    reliable = xp.logical_and(reliable, inside)
    wrong = np.flatnonzero(~to_host(reliable))
    if len(wrong) > _MOST_RECOMPUTED * n + len(outlier_rows):
        raise RefusalError(
            f"{configured.plan.method} fails in {len(wrong)} of {n} rows, where its "
            "sum of weights is not positive or its output outside the range of the "
            "values: the logits are too large for it"
        )
    exact_rows = np.union1d(wrong, outlier_rows)
    if len(exact_rows):
        value, normalizer = recompute_rows(head, value, normalizer, exact_rows, dtype)
    return *head.finish(value, normalizer), exact_rows


def _in_range(head: Head, value: Array) -> Array:
    """Whether each row of an output is finite and within the range of the values."""
    xp = head.xp
    low, high = (xp.astype(x, value.dtype) for x in _column_min_max(head.value))
    slack = 16 * xp.finfo(value.dtype).eps * xp.max(xp.abs(xp.concat([low, high])))
    least, largest = _column_min_max(value)
    if bool(xp.all(least >= low - slack) and xp.all(largest <= high + slack)):
        return xp.ones(value.shape[0], dtype=xp.bool, device=device_of(value))
    inside = []
    for start in range(0, value.shape[0], _BLOCK):
        block = value[start : min(start + _BLOCK, value.shape[0]), :]
        within = xp.logical_and(block >= low - slack, block <= high + slack)
        inside.append(xp.all(within, axis=1))
    return xp.concat(inside)


def _column_min_max(x: Array) -> tuple[Array, Array]:
    """Minimum and maximum of every column; NaN if the column has one."""
    xp, (n, p) = array_namespace(x), x.shape
    # reductions over few long rows are faster than over many short ones
    folds = n // _FOLD
    if folds > 1:
        wide = xp.reshape(x[: folds * _FOLD, :], (folds, _FOLD * p))
        ends = (end(wide, axis=0) for end in (xp.min, xp.max))
        x = xp.concat(
            [*(xp.reshape(y, (_FOLD, p)) for y in ends), x[folds * _FOLD :, :]]
        )
    return xp.min(x, axis=0), xp.max(x, axis=0)
