"""Exact softmax attention, streamed over blocks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._costs import exact_work, seconds
from fastattn._problem import Candidate, Head, HeadAnswer, Plan
from fastattn._ratio_estimate import FAILURE, relative
from fastattn._rounding import (
    EXP,
    cut_weights,
    deviation,
    gamma,
    largest_number,
    largest_row,
    smallest_number,
    unit_roundoff,
    value_range,
)
from fastattn._row_statistics import SeenKeys, guess_errors, row_statistics
from fastattn._sampling import SampledError, certify_rows, scaled_frobenius
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_integer

# keys that the fast bodies sum before they add to the running sums: least and most,
# or, in tiles, few enough that there are no more terms in all
_KEYS_A_BLOCK = (320, 1024)
# rows that are compared with float64 where no bound is small enough
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact softmax attention in blocks that stay in cache.

    Logits of any size are right: each row is shifted by the largest logit seen so
    far (Milakov and Gimelshein, 2018). Nothing of size n x m is stored.

    Parameters
    ----------
    block : int, optional
        Queries in a block; by default what keeps a block of logits in cache and
        every thread busy.

    Notes
    -----
    ``guarantee="proven"`` bounds the rounding; where float32 cannot promise the
    tolerance, the head is computed in float64. ``"sampled"`` checks rows.

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

    def plan(self, head: Head, reason: str = "asked for") -> Plan:
        """Say what exact attention costs for this head."""
        work = exact_work(*head.sizes, logits=head.logits)
        return Plan(self, 0.0, seconds(work), reason)

    def candidates(
        self,
        head: Head,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Iterator[Candidate]:
        """Exact attention is always accepted."""
        yield Candidate(self.plan(head), accepted=True)

    def solve(
        self,
        head: Head,
        tol: float,
        guarantee: str,
        rng: np.random.Generator,
        reason: str = "asked for",
    ) -> HeadAnswer:
        """Compute the head and bound the rounding."""
        if guarantee == "proven":
            return self._solve_proven(head, tol, reason)
        value, normalizer = head.finish(*head.attend(rows=self.block))
        size = scaled_frobenius(value)
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
            )
        sampled = _sampled(head, value, normalizer, size, tol, rng)
        if math.isinf(sampled.upper):
            raise RefusalError(
                f"tol={tol:g} cannot be met: logits or sums overflow {head.dtype}, or "
                "the answer underflows; scale query, key or value or pass float64 "
                "arrays"
            )
        if sampled.upper > tol:
            raise RefusalError(
                f"tol={tol:g} is below what {head.dtype} holds for this head "
                f"({sampled.upper:.1e}): pass float64 arrays or a larger tol"
            )
        return HeadAnswer(
            value,
            normalizer,
            sampled.upper,
            FAILURE,
            "relative-frobenius",
            f"exact attention; {sampled.source}",
            self.plan(head, reason),
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
                )
        raise RefusalError(
            f"tol={tol:g} cannot be proven: rounding in float64 is bounded by "
            f"{bound:.1e} where the half range of the values is {half:.1e}"
        )


def _sampled(
    head: Head,
    value: Array,
    normalizer: Array,
    size: tuple[float, float],
    tol: float,
    rng: np.random.Generator,
) -> SampledError:
    """Compare rows with float64, those of large exponents and values more often."""
    found = row_statistics(head, rng)
    query = to_host(head.query).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        # a product is off in proportion to the norms, an exp and a sum by a little
        norms = np.sqrt(np.sum((head.scale * query) ** 2, axis=1))
        rounding = 1 + norms * largest_row(head.key)
    seen = SeenKeys.of(head, found, value, normalizer)
    guess = guess_errors(found, seen, rounding=np.nan_to_num(rounding, nan=np.inf))
    return certify_rows(
        head, value, tol, rng, size=size, guess=guess.squares, first=_ROWS
    )


def _relative_bound(head: Head, peak: float, norm: float, tol: float) -> float:
    """Rounding bound of the head over the norm of its answer, in units of ``peak``.

    Infinite where it is sure to exceed ``tol``.
    """
    n, m, _, p = head.sizes
    if m == 0:
        return 0.0
    if not math.isfinite(peak):
        return math.inf
    if peak == 0:
        return rounding_bound(head, head.dtype)
    root = math.sqrt(n * p)
    bound = rounding_bound(head, head.dtype, tol / (1 + tol) * norm * peak / root)
    return relative(bound / peak * root, norm)


def rounding_bound(head: Head, dtype: Any, most: float = math.inf) -> float:
    r"""Bound ``max |computed - exact|`` of streaming attention in ``dtype``.

    A logit is off by at most :math:`(\gamma_{d+2} + 4u) L` with
    :math:`L = s \max\|q\| \max\|k\|`, an exp by 8u, and every rescaling of the running
    sums by another 8u: a relative error of the weights. The weighted sums add
    :math:`\gamma` of the number of terms, relative to the largest value. What
    underflows adds the smallest number, an exp the least normal one; what could
    overflow makes the bound infinite, and so do sums that alone exceed ``most``.
    """
    xp, (_, m, d, _) = head.xp, head.sizes
    if m == 0:
        return 0.0
    u, tiny = unit_roundoff(xp, dtype), smallest_number(xp, dtype)
    extent = value_range(head)
    sums = sums_error(m, u, is_fast=head.has_fast_body)
    if sums * extent.peak > most:
        return math.inf
    norms = abs(head.scale) * largest_row(head.query), largest_row(head.key)
    if m * extent.peak > largest_number(xp, dtype) / 4:
        return math.inf
    weights = weights_error(m, d, *norms, xp, dtype, is_fast=head.has_fast_body)
    own = head.query.dtype
    out = unit_roundoff(xp, own) * extent.peak + smallest_number(xp, own)
    cut = cut_weights(xp, dtype, m)
    return (
        deviation(weights + cut, extent.half)
        + (sums + cut) * extent.peak
        + 2 * m * tiny
        + out
    )


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
    """Bound the relative error of weights; ``query_norm`` is that times the scale."""
    u, reach = unit_roundoff(xp, dtype), query_norm * key_norm
    if max(reach, query_norm) > largest_number(xp, dtype) / 4:
        return math.inf
    # the query is scaled, the product summed, the peak subtracted
    exponent = (gamma(d + 2, u) + 4 * u) * reach
    exponent += EXP * (_blocks(m, is_fast) + 1) * u
    exponent += d * smallest_number(xp, dtype) * (1 + key_norm)
    return math.expm1(exponent) if exponent < 1 else math.inf
