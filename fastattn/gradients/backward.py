"""What all approximate gradients share: exact parts, and an estimate of the error.

From log-sum-exps and deltas of all rows, gradients can be computed exactly for some
rows, or for some keys. Rows where an approximation fails are recomputed in this way,
and approximate gradients are compared with exact ones on sampled rows and keys. These
are drawn by importance sampling: few keys may have most of the squared norm.
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
from fastattn.problem.head import Head, gather_rows
from fastattn.problem.rows import row_mask, scatter_rows
from sketching._lib.arrays import Array, array_namespace, device_of, to_host

# allowed error of gradients, in units of the tolerance of the output
SLACK = 3.0
# rounding of a sum, in units of eps times the root of the sum of squares
_ROUNDING = 8.0
# standard errors that the first and the second sampling round add: twice the normal
# quantiles of .04 and .01. The sizes of the gradients are a reliable error profile
# (benches gradients)
FIRST, SECOND = Margin(3.5, 0.0), Margin(4.65, 0.0)
# rows of the second sampling round, in units of those of a single round
_SECOND = 2


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    r"""A head with the log-sum-exps and deltas of its rows.

    With them :math:`P_{ij} = e^{s\,q_i \cdot k_j - L_i}` and :math:`dS_{ij} = P_{ij}
    ((G V^\top)_{ij} - \delta_i)`, as in FlashAttention-2 (Dao, arXiv 2307.08691).

    Parameters
    ----------
    head : Head
    grad : array, shape (n, p)
        Gradient :math:`G` of the loss with respect to the output.
    normalizer, delta : array, shape (n,)
        Log-sum-exp :math:`L_i` of each row's logits, infinite for a row that is to
        contribute zero, and :math:`\delta_i`, the inner product of its output and
        :math:`G_i`.
    """

    head: Head
    grad: Array
    normalizer: Array
    delta: Array

    def with_exact(self, rows: Array) -> "Backward":
        """Give rows their exact log-sum-exps and deltas."""
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
        """Gradients over the given rows and keys; None means all.

        Key indices must not decrease.
        """
        head, dtype = self.head, self.grad.dtype
        query, grad, normalizer, delta = (
            gather_rows(x, rows)
            for x in (head.query, self.grad, self.normalizer, self.delta)
        )
        xp, prefix_lengths = head.xp, head.prefix_lengths
        if prefix_lengths is not None:
            prefix_lengths = _prefix_lengths(gather_rows(prefix_lengths, rows), keys)
            # rows that attend to no key: any finite number will do
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
        """Gradients over the given rows, from their own exact weights."""
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
        """Add the exact gradients of rows that contributed zero."""
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
        """Upper estimate of the relative error of each gradient; the largest of three.

        Parameters
        ----------
        gradients : tuple of array
            With respect to query, key and value.
        exact_rows : integer array
            Rows that were recomputed exactly, which are not sampled.
        rng : Generator
            Source of the samples.
        enough : float
            If the first sampling round shows a smaller error, there is no second.
        error_profile : tuple of array, optional
            The approximate part of the gradients, by whose size rows are drawn; by
            default the gradients.
        few : int
            Rows of the first sampling round.

        Notes
        -----
        Sampled queries are differentiated from their own exact weights. A sampled key
        needs log-sum-exps and deltas of all queries, and takes those of the
        approximation.
        """
        query, key, value = (
            _squares(x) for x in (gradients if error_profile is None else error_profile)
        )
        # recomputed rows have no error
        query[exact_rows] = 0
        sizes = [query, key + value]
        numbers = [np.delete(np.arange(len(query)), exact_rows), np.arange(len(key))]
        counts = [sampled_rows(len(x)) for x in numbers]
        if not (enough and max(counts) > few):
            return self._estimate_error(gradients, numbers, sizes, counts, FIRST, rng)
        found = self._estimate_error(gradients, numbers, sizes, [few, few], FIRST, rng)
        if found <= enough:
            return found
        # two sampling rounds share the failure probability: the second takes more rows
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
        """One sampling round: ``counts`` are the numbers of queries and of keys."""
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
        """Norms of gradients by rounding alone, where they should be zero."""
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
    """Rows of a gradient to compare with exact ones.

    Parameters
    ----------
    rows : integer array, shape (k,)
        All, or a sample.
    weights : array, shape (k,), or None
        Importance weights ``1 / (n p_i)``; None if all rows are compared.
    n : int
        Number of rows from which the sample is drawn.
    """

    rows: Array
    weights: Array | None
    n: int

    @staticmethod
    def of(
        others: Array, sizes: Array, count: int, rng: np.random.Generator
    ) -> "_Sample":
        """Draw ``count`` of the row numbers ``others``, with weights ``sizes``."""
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

        An error whose norm is at most ``floor`` is rounding, and counts as zero.
        """
        part = gather_rows(gradient, self.rows)
        part, truth = (to_host(x).astype(np.float64) for x in (part, truth))
        unit = float(np.abs(truth).max(initial=0.0)) or 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.sum(((part - truth) / unit) ** 2, axis=1)
            # the norm of the gradient is known: estimate only its difference from the
            # exact norm
            more = np.sum((truth / unit) ** 2, axis=1)
            more = more - np.sum((part / unit) ** 2, axis=1)
            whole = to_host(gradient).astype(np.float64) / unit
            known = float(np.sum(whole**2)) / self.n
            found = RatioEstimate(squares, self.n, self.weights, more, known)
            if self.n * found.mean <= (floor / unit) ** 2:
                return 0.0
            # a norm that overflows would make any error small
            ratio = found.upper_ratio(margin) if 0 < found.size < math.inf else math.inf
        return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


def _prefix_lengths(prefix_lengths: Array, keys: Array | None) -> Array:
    """Prefix lengths within a subset of the keys, with sorted indices ``keys``."""
    if keys is None:
        return prefix_lengths
    few = np.searchsorted(keys, to_host(prefix_lengths))
    xp = array_namespace(prefix_lengths)
    return xp.asarray(few, dtype=prefix_lengths.dtype, device=device_of(prefix_lengths))


def exact_vjp_work(head: Head) -> float:
    """Work of exact gradients, in multiply-adds of a matrix product."""
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
