"""What derivatives that are not exact have in common: exact parts, and the check.

A head whose rows have their log-sum-exps and drifts can be differentiated exactly for
some rows, or for some keys. That is what rows out of reach are mended by, and what
derivatives are compared with after the fact. Rows of large derivatives are compared
more often: a few keys may hold most of them.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from fastattn._ops.gradient import attend_vjp
from fastattn.certificates.ratio_estimate import (
    Margin,
    RatioEstimate,
    importance_probabilities,
)
from fastattn.certificates.sampled import ROWS, sampled_rows
from fastattn.costs.rates import rates
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head
from fastattn.problem.rows import gather_rows, row_mask, scatter_rows
from sketching._lib.arrays import Array, array_namespace, device_of, to_host

# derivatives may err by this many times the tolerance of the answer
SLACK = 3.0
# a method must be predicted to take at most this share of the exact time
TIME_SHARE = 0.8
# rounding of a sum, in units of eps times the root of the sum of squares
_ROUNDING = 8.0
# standard errors that a first and a second look add: twice the normal quantiles of .04
# and .01. Sizes of derivatives are known, and steer the draws well (benches gradients)
FIRST, SECOND = Margin(3.5, 0.0), Margin(4.65, 0.0)
# rows of a second look, in times of what one look takes
_SECOND = 2


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """A head with what its weights and their derivatives are made of.

    Parameters
    ----------
    head : Head
    grad : array, shape (n, p)
        Derivative by the answer.
    normalizer, delta : array, shape (n,)
        Log-sum-exp of each row's logits, infinite where the row is to add nothing,
        and the product of its answer and ``grad``.
    """

    head: Head
    grad: Array
    normalizer: Array
    delta: Array

    def with_exact(self, rows: Array) -> "Backward":
        """Give rows their exact log-sum-exps and drifts."""
        if not len(rows):
            return self
        xp, n, dtype = self.head.xp, self.head.sizes[0], self.grad.dtype
        value, normalizer = self.head.with_rows(rows).attend()
        value = xp.astype(value, dtype, copy=False)
        delta = xp.sum(gather_rows(self.grad, rows) * value, axis=1)
        mask = row_mask(rows, self.head.query)
        found = [
            xp.where(mask, scatter_rows(x[:, None], rows, n)[:, 0], old)
            for x, old in ((normalizer, self.normalizer), (delta, self.delta))
        ]
        return replace(self, normalizer=found[0], delta=found[1])

    def exact(self, rows: Array | None, keys: Array | None) -> Gradients:
        """Differentiate what the given rows make of the given keys; None means all.

        The numbers of the keys must not decrease.
        """
        head, dtype = self.head, self.grad.dtype
        query, grad, normalizer, delta = (
            gather_rows(x, rows)
            for x in (head.query, self.grad, self.normalizer, self.delta)
        )
        xp, prefix_lengths = head.xp, head.prefix_lengths
        if prefix_lengths is not None:
            prefix_lengths = _prefix_lengths(gather_rows(prefix_lengths, rows), keys)
            # of rows that see no key: any number does
            blind = normalizer == -xp.inf
            normalizer = xp.where(blind, xp.zeros_like(normalizer), normalizer)
        gradients: Gradients = attend_vjp(
            xp.astype(query, dtype, copy=False),
            gather_rows(head.key, keys),
            gather_rows(head.value, keys),
            grad,
            scale=head.scale,
            prefix_lengths=prefix_lengths,
            log_normalizer=normalizer,
            delta=delta,
        )
        return gradients

    def rows(self, rows: Array) -> Gradients:
        """Differentiate the given rows from their own exact weights."""
        some = self.head.with_rows(rows)
        gradients: Gradients = attend_vjp(
            some.xp.astype(some.query, self.grad.dtype, copy=False),
            some.key,
            some.value,
            gather_rows(self.grad, rows),
            scale=some.scale,
            prefix_lengths=some.prefix_lengths,
        )
        return gradients

    def with_recomputed(self, gradients: Gradients, rows: Array) -> Gradients:
        """Add the exact derivatives of rows that added nothing."""
        if not len(rows):
            return gradients
        query, key, value = self.rows(rows)
        n = self.head.sizes[0]
        return (
            gradients[0] + scatter_rows(query, rows, n),
            gradients[1] + key,
            gradients[2] + value,
        )

    def error(
        self,
        gradients: Gradients,
        exact_rows: Array,
        rng: np.random.Generator,
        enough: float = 0.0,
        error_profile: Gradients | None = None,
        few: int = ROWS,
    ) -> float:
        """Largest relative error on random queries, and on random keys.

        A query is differentiated from its own exact weights; a key needs the
        normalizers and drifts of all queries, which are taken as they are. A ``few``
        rows are looked at first, which may show an error that is small ``enough``. What
        of the derivatives is in ``error_profile``, all by default, says where to look
        more.
        """
        query, key, value = (
            _squares(x) for x in (gradients if error_profile is None else error_profile)
        )
        # settled rows are exact
        query[exact_rows] = 0
        sizes = [query, key + value]
        numbers = [np.delete(np.arange(len(query)), exact_rows), np.arange(len(key))]
        counts = [sampled_rows(len(x)) for x in numbers]
        if not (enough and max(counts) > few):
            return self._estimate_error(gradients, numbers, sizes, counts, FIRST, rng)
        found = self._estimate_error(gradients, numbers, sizes, [few, few], FIRST, rng)
        if found <= enough:
            return found
        # two looks share the chance of failure: the second takes more rows for that
        counts = [_SECOND * x for x in counts]
        return self._estimate_error(gradients, numbers, sizes, counts, SECOND, rng)

    def _estimate_error(
        self,
        gradients: Gradients,
        numbers: list[Array],
        sizes: list[Array],
        counts: list[int],
        margin: Margin,
        rng: np.random.Generator,
    ) -> float:
        """Largest relative error on so many queries, and on so many keys."""
        rows, keys = (
            _Sample.of(*x, rng) for x in zip(numbers, sizes, counts, strict=True)
        )
        query = self.rows(rows.rows)[0]
        _, key, value = self.exact(None, keys.rows)
        pairs = (rows, query), (keys, key), (keys, value)
        return max(
            sample.error(gradient, truth, floor, margin)
            for gradient, (sample, truth), floor in zip(
                gradients, pairs, self._roundings(), strict=True
            )
        )

    def _roundings(self) -> list[float]:
        """Norms that the derivatives may have by rounding where they should be zero."""
        head = self.head
        grad = float(np.linalg.norm(to_host(self.grad).astype(np.float64)))
        unit = _ROUNDING * float(head.xp.finfo(self.grad.dtype).eps) * grad
        query, key, value = (
            float(np.linalg.norm(to_host(x).astype(np.float64), axis=1).max())
            for x in (head.query, head.key, head.value)
        )
        pull = abs(head.scale) * value
        found = [unit * pull * key, unit * pull * query, unit]
        return [x if math.isfinite(x) else 0.0 for x in found]


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Rows of a derivative to compare: all, or some, each for so many."""

    rows: Array
    weights: Array | None
    n: int

    @staticmethod
    def of(
        others: Array, sizes: Array, count: int, rng: np.random.Generator
    ) -> "_Sample":
        """Draw so many of the others, those of a large size more often."""
        if len(others) <= count:
            return _Sample(others, None, len(others))
        probabilities = importance_probabilities(sizes[others], count)
        drawn = np.sort(rng.choice(len(others), count, p=probabilities))
        weights = 1 / (len(others) * probabilities[drawn])
        return _Sample(others[drawn], weights, len(others))

    def error(
        self, gradient: Array, truth: Array, floor: float, margin: Margin
    ) -> float:
        """Upper estimate of the relative Frobenius error of all rows.

        An error whose norm is no more than the floor is rounding, and none.
        """
        part = gather_rows(gradient, self.rows)
        part, truth = (to_host(x).astype(np.float64) for x in (part, truth))
        unit = float(np.abs(truth).max(initial=0.0)) or 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.sum(((part - truth) / unit) ** 2, axis=1)
            # the size of what was found is known: only the difference is estimated
            more = np.sum((truth / unit) ** 2, axis=1)
            more = more - np.sum((part / unit) ** 2, axis=1)
            whole = to_host(gradient).astype(np.float64) / unit
            known = float(np.sum(whole**2)) / self.n
            found = RatioEstimate(squares, self.n, self.weights, more, known)
            if self.n * found.mean <= (floor / unit) ** 2:
                return 0.0
            # a size that overflows would make any error small
            ratio = found.upper_ratio(margin) if 0 < found.size < math.inf else math.inf
        return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


def _prefix_lengths(prefix_lengths: Array, keys: Array | None) -> Array:
    """How many of the keys rows see that see so many first ones."""
    if keys is None:
        return prefix_lengths
    few = np.searchsorted(keys, to_host(prefix_lengths))
    xp = array_namespace(prefix_lengths)
    return xp.asarray(few, dtype=prefix_lengths.dtype, device=device_of(prefix_lengths))


def exact_vjp_work(head: Head) -> float:
    """Work of an exact derivative, in multiply-adds of a matrix product."""
    d, p = head.sizes[2:]
    return head.logits * (3 * d + 2 * p + rates().softmax)


def _squares(x: Array) -> Array:
    """Sums of squares of the rows, as shares of their sum."""
    x = to_host(x)
    unit = float(np.abs(x).max(initial=0.0))
    if not math.isfinite(unit) or unit == 0:
        return np.zeros(len(x))
    squares = np.sum((x / unit) ** 2, axis=1, dtype=np.float64)
    return squares / squares.sum()
