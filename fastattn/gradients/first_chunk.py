r"""The length of the exact first chunk in the gradients of causal low-rank attention.

Landmarks approximate :math:`e^{s\,q \cdot k}` as a function of the query. The gradient
with respect to a key needs the derivative of this approximation in :math:`k`, whose
relative error :math:`\epsilon` stays near one half however many landmarks there are
(an observation, not a theorem). Row :math:`i` of a causal head has weights
:math:`P_{ij}` of the order of :math:`1 / i`, so that early rows contribute most of

.. math:: dK_j = s \sum_i P_{ij} \left((G V^\top)_{ij} - \delta_i\right) q_i.

If rows of the first chunk, of :math:`f` keys, are differentiated exactly, and later
rows contribute the share :math:`\sigma(f)` of the squared norm of the gradient, then
the relative Frobenius error of the gradient is about :math:`\epsilon
\sqrt{\sigma(f)}`.
``first_chunk`` estimates :math:`\epsilon` by a pilot run and :math:`\sigma` by
stratified sampling of rows, and returns the smallest :math:`f` that meets a tolerance.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastattn._ops.gradient import softmax
from fastattn.costs.policy import POLICY
from fastattn.gradients.exact import exact_vjp
from fastattn.gradients.lowrank_passes import whole_vjp
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.causal_chunks import cuts_of
from fastattn.problem.head import Head, gather_rows
from fastattn.problem.rows import row_mask
from sketching._lib.arrays import Array, device_of, to_host


def first_chunk(
    head: Head, grad: Array, empty: LowRank, wanted: float, rng: np.random.Generator
) -> int | None:
    """Return the shortest first chunk that is predicted to meet an error, or None.

    Parameters
    ----------
    head : Head
        A causal head.
    grad : array, shape (n, p)
        Gradient of the loss with respect to the output.
    empty : LowRank
        The basis that later chunks use, without keys.
    wanted : float
        Relative Frobenius error that each gradient may have.
    rng : Generator
        Source of the samples.
    """
    prefix_lengths = to_host(head.prefix_lengths)
    seen = int(prefix_lengths[-1])
    parts = [
        cuts_of(seen)[1],
        *(int(part * seen) for part in POLICY.gradients.first_chunks),
    ]
    firsts = sorted({x for x in parts if x < seen})
    starts = np.searchsorted(prefix_lengths, firsts)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        shares = _shares(head, grad, starts, rng)
        lacking = _lacking(head, grad, empty, rng)
    met = (
        first
        for first, share in zip(firsts, shares, strict=True)
        if lacking * math.sqrt(share) <= wanted
    )
    return next(met, None)


def _lacking(
    head: Head, grad: Array, empty: LowRank, rng: np.random.Generator
) -> float:
    """The largest relative error of the low-rank gradients on some rows and keys.

    It is the error of the module's docstring, of a pilot run without a causal mask.
    """
    policy = POLICY.gradients
    n, m, _, _ = head.sizes
    rows, keys = (
        np.sort(rng.choice(count, min(count, most), replace=False))
        for count, most in ((n, policy.chunk_rows), (m, policy.chunk_keys))
    )
    few = replace(
        head.with_rows(rows),
        key=gather_rows(head.key, keys),
        value=gather_rows(head.value, keys),
        prefix_lengths=None,
    )
    some, no_row = gather_rows(grad, rows), row_mask(rows[:0], few.query)
    found, state = whole_vjp(few, some, empty, no_row)
    exact_rows = np.flatnonzero(to_host(state.normalizer) == math.inf)
    found = state.with_exact(exact_rows).with_recomputed(found, exact_rows)
    truth = exact_vjp(few, some)
    errors = [
        float(np.linalg.norm(to_host(x) - to_host(y)) / np.linalg.norm(to_host(y)))
        for x, y in zip(found, truth, strict=True)
    ]
    # NaN and infinities are infinite errors
    return max(x if math.isfinite(x) else math.inf for x in errors)


def _shares(
    head: Head, grad: Array, starts: Array, rng: np.random.Generator
) -> list[float]:
    """Shares of the squared norm of ``dK`` from the rows at and after each start."""
    policy = POLICY.gradients
    n = head.sizes[0]
    edges = np.geomspace(min(policy.early, n), n, policy.strata).astype(int)
    edges = np.unique([0, *edges, *starts])
    means = [_mean_square(head, grad, lo, hi, rng) for lo, hi in pairwise(edges)]
    sizes = np.diff(edges) * means
    total = float(sizes.sum())
    if not (total > 0 and math.isfinite(total)):
        return [math.inf] * len(starts)
    return [float(sizes[edges[:-1] >= start].sum()) / total for start in starts]


def _mean_square(
    head: Head, grad: Array, lo: int, hi: int, rng: np.random.Generator
) -> float:
    """Mean over rows ``lo <= i < hi`` of ``sum_j |dS_ij q_i|^2``, by a sample."""
    policy = POLICY.gradients
    xp, prefix_lengths = head.xp, to_host(head.prefix_lengths)
    each = max(
        1,
        min(
            policy.stratum_rows,
            policy.stratum_logits // max(int(prefix_lengths[hi - 1]), 1),
        ),
    )
    rows = np.sort(rng.integers(lo, hi, each))
    seen = max(int(prefix_lengths[rows[-1]]), 1)
    query, grad = (
        xp.astype(gather_rows(x, rows), grad.dtype) for x in (head.query, grad)
    )
    key, value = (xp.astype(x[:seen, :], grad.dtype) for x in (head.key, head.value))
    counts = xp.asarray(prefix_lengths[rows], device=device_of(query))
    number = xp.arange(seen, device=device_of(query))
    logits = head.scale * xp.matmul(query, xp.matrix_transpose(key))
    logits = xp.where(number[None, :] < counts[:, None], logits, -xp.inf)
    weights, _ = softmax(logits)
    change = xp.matmul(grad, xp.matrix_transpose(value))
    change = change - xp.sum(weights * change, axis=1, keepdims=True)
    squares = xp.sum((weights * change) ** 2, axis=1) * xp.sum(query**2, axis=1)
    return float(xp.mean(squares))
