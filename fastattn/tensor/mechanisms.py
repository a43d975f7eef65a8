"""Exact methods for tuples in windows, and for logits that are sums over pairs."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastattn._ops.tensor_mechanisms import attend_path, attend_strassen, attend_windows
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.problem.plan import Candidate, HeadAnswer, Plan
from fastattn.tensor.exact import rounding, solve_bounded, solve_exact
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, array_namespace, device_of, to_host
from sketching._lib.validation import check_integer

# underflow is negligible in sums larger than the smallest normal number by this factor
_MARGIN = 2.0**30


class TensorMethod:
    """A method for heads of tensor attention only."""

    __slots__ = ()
    needs_tuples: ClassVar[bool] = True

    def solve(
        self, head: Any, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer the head within ``tol``."""
        if head.sizes[1] == 0:
            plan = Plan(self, 0.0, 0.0, "no tuple to attend to")
            return solve_exact(head, tol, guarantee, rng, plan)
        return self.answer(head, tol, guarantee)

    def candidates(
        self,
        head: Any,
        tol: float,  # noqa: ARG002
        guarantee: str,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Iterator[Candidate]:
        """Yield the plan; the method is always accepted."""
        yield Candidate(self.plan(head), accepted=True)

    def plan(self, head: TensorHead) -> Plan:
        """Check the head against the method, and predict the cost."""
        raise NotImplementedError

    def answer(self, head: TensorHead, tol: float, guarantee: str) -> HeadAnswer:
        """Answer a head with at least one tuple."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TensorWindow(TensorMethod):
    r"""Exact tensor attention over causal windows of each factor.

    Query ``i`` attends to keys ``i - w < j <= i`` of a factor with window ``w``. With
    two factors this is 2-simplicial attention. It costs ``n`` times the product of the
    windows.

    Parameters
    ----------
    sizes : tuple of int
        The window of each factor.

    Notes
    -----
    The published kernel scales by ``d ** -0.5`` and adds ``1 / d`` to the second keys
    and 1 to the second values, so that it contains ordinary attention: pass
    ``scale=d**-0.5``, ``keys=(k1, k2 + 1 / d)`` and ``values=(v1, v2 + 1)``. Masked
    keys count as positions of the window.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import TensorWindow, tensor_attention
    >>> rng = np.random.default_rng(0)
    >>> query, k1, k2, v1, v2 = rng.standard_normal((5, 100, 8))
    >>> keys, values = (k1, k2 + 1 / 8), (v1, v2 + 1)
    >>> method = TensorWindow((32, 16))
    >>> tensor_attention(query, keys, values, scale=8**-0.5, method=method).shape
    (100, 8)

    References
    ----------
    Fast and Simplex: 2-Simplicial Attention in Triton, arXiv 2507.02754.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, tuple):
            raise TypeError(
                "sizes: expected a tuple, one window for each factor, got "
                f"{type(self.sizes).__name__}"
            )
        if not self.sizes:
            raise ValueError("sizes: expected at least one window, got none")
        for s, size in enumerate(self.sizes):
            check_integer(f"sizes[{s}]", size, least=1)

    def plan(self, head: TensorHead) -> Plan:
        """Check the number of windows; count their tuples."""
        if len(self.sizes) != len(head.keys):
            raise ValueError(
                f"sizes: expected {len(head.keys)} windows, one for each factor, got "
                f"{len(self.sizes)}"
            )
        n, _, d, p = head.sizes
        tuples = math.prod(self.sizes)
        work = exact_work(n, tuples, d, p, logits=n * tuples)
        return Plan(self, 0.0, work, "requested")

    def answer(self, head: TensorHead, tol: float, guarantee: str) -> HeadAnswer:
        """Compute the windows of a head."""
        plan = self.plan(head)
        # the longest window last: the others are expanded
        order = np.argsort(self.sizes, kind="stable")
        sizes = tuple(min(self.sizes[s], head.lengths[s]) for s in order)

        def compute(dtype: Any) -> tuple[Array, Array]:
            cast = head.xp.astype
            ends = [_window_bounds(head, int(s), self.sizes[s]) for s in order]
            value, logarithm = attend_windows(
                cast(head.query, dtype, copy=False),
                tuple(cast(head.keys[s], dtype, copy=False) for s in order),
                tuple(cast(head.values[s], dtype, copy=False) for s in order),
                tuple(start for start, _ in ends),
                tuple(stop for _, stop in ends),
                sizes=sizes,
                scale=head.scale,
            )
            return value, logarithm

        def bound(dtype: Any) -> float:
            return rounding(head, dtype, sizes[-1])

        return solve_bounded(head, tol, guarantee, plan, compute, bound)


def _window_bounds(head: TensorHead, s: int, size: int) -> tuple[Array, Array]:
    """Start and stop of the window of each row, as indices of keys."""
    n, m = head.sizes[0], head.lengths[s]
    places = np.arange(m) if head.places is None else to_host(head.places[s])
    number = np.arange(n)
    ends = (
        np.minimum(np.searchsorted(places, number + shift, side="right"), m)
        for shift in (-size, 0)
    )
    start, stop = (head.xp.asarray(x, device=device_of(head.query)) for x in ends)
    return start, stop


@dataclass(frozen=True, slots=True)
class StrassenAttention(TensorMethod):
    r"""Exact attention over pairs of keys by matrix products.

    The logits are :math:`s(f_i \cdot g_j + g_j \cdot h_l + h_l \cdot f_i)` in place of
    :math:`s\langle f_i, g_j \circ h_l\rangle`, for queries :math:`f` and two factors of
    keys :math:`g` and :math:`h`. Sums over pairs are products of three matrices, with
    :math:`O(n^\omega)` operations, where :math:`\omega` is the exponent of matrix
    multiplication.

    Notes
    -----
    Each of the three terms of the logits is shifted by its maximum. Rows whose sum of
    weights is then so small that underflow may matter are recomputed pair by pair.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import StrassenAttention, tensor_attention
    >>> rng = np.random.default_rng(0)
    >>> query, k1, k2, v1, v2 = rng.standard_normal((5, 100, 8))
    >>> method = StrassenAttention()
    >>> tensor_attention(query, (k1, k2), (v1, v2), method=method).shape
    (100, 8)

    References
    ----------
    Strassen Attention: Unlocking Compositional Abilities in
    Transformers, arXiv 2501.19215.
    """

    def plan(self, head: TensorHead) -> Plan:
        """Check the number of factors; count the products of three matrices."""
        if len(head.keys) != 2:
            raise ValueError(
                f"StrassenAttention: expected two factors, got {len(head.keys)}"
            )
        n, tuples, _, p = head.sizes
        return Plan(self, 0.0, float(n) * tuples * (p + 1), "requested")

    def answer(self, head: TensorHead, tol: float, guarantee: str) -> HeadAnswer:
        """Compute a head by matrix products, in float64 if many rows underflow."""
        plan = self.plan(head)
        whole = _contained(self, head, ((0, 1), (1, 2), (2, 0)))
        xp, (n, tuples, _, _) = head.xp, head.sizes

        def compute(dtype: Any) -> tuple[Array, Array]:
            sides = (head.query, *head.keys, *head.values)
            value, logarithm, total = attend_strassen(
                *(xp.astype(x, dtype, copy=False) for x in sides), scale=head.scale
            )
            least = tuples * float(xp.finfo(dtype).smallest_normal) * _MARGIN
            rows = np.flatnonzero(to_host(total) <= least)
            if len(rows) > POLICY.tensor.most_recomputed * n and dtype != xp.float64:
                return compute(xp.float64)
            if len(rows) == 0:
                return value, logarithm
            exact = whole.with_rows(rows).attend(dtype)
            return _replaced(value, rows, exact[0]), _replaced(
                logarithm, rows, exact[1]
            )

        def bound(dtype: Any) -> float:
            return rounding(whole, dtype, sum(head.lengths) + 8)

        return solve_bounded(whole, tol, guarantee, plan, compute, bound)


@dataclass(frozen=True, slots=True)
class PathAttention(TensorMethod):
    r"""Exact attention over tuples with logits along a path of factors.

    The logits are :math:`s(f_i \cdot g_j + g_j \cdot h_l + \dots)`: poly-attention with
    the polynomial :math:`x_1 x_2 + x_2 x_3 + \dots`. It is a sequence of pairwise
    softmax attentions, which cost :math:`O(k n^2 d)` for order :math:`k`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import PathAttention, tensor_attention
    >>> rng = np.random.default_rng(0)
    >>> query, k1, k2, v1, v2 = rng.standard_normal((5, 100, 8))
    >>> method = PathAttention()
    >>> tensor_attention(query, (k1, k2), (v1, v2), method=method).shape
    (100, 8)

    References
    ----------
    Poly-attention: a general scheme for higher-order
    self-attention, arXiv 2602.02422.
    """

    def plan(self, head: TensorHead) -> Plan:
        """Count the pairs of neighbours on the path."""
        lengths = (head.sizes[0], *head.lengths)
        work = sum(
            exact_work(n, m, head.sizes[2] + 1, head.sizes[3])
            for n, m in itertools.pairwise(lengths)
        )
        return Plan(self, 0.0, work, "requested")

    def answer(self, head: TensorHead, tol: float, guarantee: str) -> HeadAnswer:
        """Compute a head by one pairwise attention for each factor."""
        plan, sides = self.plan(head), range(head.order)
        whole = _contained(self, head, tuple(itertools.pairwise(sides)))
        xp = head.xp

        def compute(dtype: Any) -> tuple[Array, Array]:
            return attend_path(
                xp.astype(head.query, dtype, copy=False),
                tuple(xp.astype(x, dtype, copy=False) for x in head.keys),
                tuple(xp.astype(x, dtype, copy=False) for x in head.values),
                scale=head.scale,
            )

        def bound(dtype: Any) -> float:
            # log-sum-exps of inner attentions are one more coordinate of the logits
            return rounding(whole, dtype, extra=math.log(head.sizes[1]))

        return solve_bounded(whole, tol, guarantee, plan, compute, bound)


def _replaced(x: Array, rows: Array, other: Array) -> Array:
    """Return ``x`` with the numbered rows replaced by those of ``other``, in order."""
    xp = array_namespace(x)
    # the array API has take, but no writing in place
    source = np.arange(x.shape[0])
    source[rows] = x.shape[0] + np.arange(len(rows))
    take = xp.asarray(source, device=device_of(x))
    return xp.take(xp.concat([x, other]), take, axis=0)


def _contained(
    method: TensorMethod, head: TensorHead, pairs: tuple[tuple[int, int], ...]
) -> TensorHead:
    """The head of tensor attention whose logits are sums over pairs of sides.

    Each pair has its own coordinates, in which all sides outside of it are one.
    """
    if head.prefix_lengths is not None:
        raise ValueError(
            f"{method}: is_causal is not supported, since logits have terms of two keys"
        )
    xp = head.xp
    query, *keys = (
        xp.concat([x if s in pair else xp.ones_like(x) for pair in pairs], axis=1)
        for s, x in enumerate((head.query, *head.keys))
    )
    return TensorHead(query, tuple(keys), head.values, head.scale)
