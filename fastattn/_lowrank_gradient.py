"""The derivative of attention by a low rank: that of the low-rank sums themselves.

With the weights ``P`` written in functions of queries and keys, ``dS = P * (grad V^T -
drift)`` is never formed: one pass over queries, one over keys, and between them a sum
of one number for each function and value column. The derivative of a polynomial of
degree g has degree g - 1, so that derivatives by query and key err more than the answer
does. Queries that the low rank does not serve, and far keys, are exact.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from fastattn._costs import lowrank_work
from fastattn._frame import Frame, Sample
from fastattn._lowrank import LowRank
from fastattn._ops.gradient import attend_vjp
from fastattn._ops.lowrank_gradient import key_vjp, query_vjp
from fastattn._problem import Head
from fastattn._rates import rates
from fastattn._recipes import run_mended
from fastattn._sampling import MARGIN, ROWS, hardest_rows
from fastattn._sizes import predict
from fastattn.expansions import rank_of
from fastattn.polynomial import lowrank_attempt
from sketching._lib.arrays import Array, array_namespace, device_of, mover, to_host
from sketching._lib.certificate import RefusalError

# derivatives may err by this many times the tolerance of the answer
SLACK = 3.0
# heads with fewer logits than this are differentiated exactly: planning costs as much
_SMALL = 1 << 24
# a low rank must be predicted to take at most this share of the exact time
_WORTH = 0.8
# time of the passes of a derivative and its answer, in times of the answer alone
_PASSES = 3.5
# error of the answer over that of its derivatives, in standard deviations of a logit:
# 1/sqrt(g + 1) for Hermite polynomials up to degree g of normal logits, here g = 2
_LOST = 3.0**-0.5
# the share of what that allows which is aimed at: pilots show the answer's error only
_AIM = 0.7
# tries, how far the first may miss, and what is left to the second
_TRIES = 2
_HOPELESS, _TIGHTER = 3.0, 0.7
# derivatives by query, key and value
Slopes = tuple[Array, Array, Array]


@dataclass(frozen=True, slots=True, eq=False)
class _Backward:
    """A head with what its weights and their derivatives are made of.

    Parameters
    ----------
    head : Head
    grad : array, shape (n, p)
        Derivative by the answer.
    normalizer, drift : array, shape (n,)
        Log-sum-exp of each row's logits, infinite where the row is to add nothing,
        and the product of its answer and ``grad``.
    """

    head: Head
    grad: Array
    normalizer: Array
    drift: Array

    def without(self, rows: Array) -> "_Backward":
        """Let the given rows add nothing."""
        mask = np.zeros(self.head.sizes[0], dtype=bool)
        mask[rows] = True
        xp = self.head.xp
        mask = xp.asarray(mask, device=device_of(self.grad))
        normalizer = xp.where(mask, xp.inf, self.normalizer)
        return replace(self, normalizer=normalizer)

    def exact(self, rows: Array | None, keys: Array | None) -> Slopes:
        """Differentiate what the given rows make of the given keys; None means all."""
        head, dtype = self.head, self.grad.dtype
        query, grad, normalizer, drift = (
            _take(x, rows) for x in (head.query, self.grad, self.normalizer, self.drift)
        )
        xp = head.xp
        slopes: Slopes = attend_vjp(
            xp.astype(query, dtype, copy=False),
            _take(head.key, keys),
            _take(head.value, keys),
            grad,
            scale=head.scale,
            visible=None,
            log_normalizer=normalizer,
            drift=drift,
        )
        return slopes


def lowrank_slopes(
    head: Head, grad: Array, empty: LowRank, rng: np.random.Generator
) -> tuple[Slopes, float]:
    """Differentiate a head over the basis of an empty structure, and check.

    Returns
    -------
    slopes : tuple of array
        Derivatives by query, key and value.
    error : float
        The largest of their relative Frobenius errors on sampled rows.

    Raises
    ------
    RefusalError
        If the low rank fails in too many rows, or sums overflow.
    """
    xp, (n, m, _, _) = head.xp, head.sizes
    structure, far = empty.filled(head.key, head.value)
    attempt = lowrank_attempt(head, empty, math.nan, "derivative")
    attempt = replace(attempt, run=lambda some: structure.query(some.query))
    value, normalizer, settled = run_mended(head, attempt, hardest_rows(head, rng))
    drift = xp.sum(grad * xp.astype(value, grad.dtype, copy=False), axis=1)
    whole = _Backward(head, grad, normalizer, drift)
    rest = whole.without(settled)
    query, key, values = _near(rest, structure, far)
    if len(settled):
        extra = whole.exact(settled, None)
        query = query + spread(extra[0], settled, n)
        key, values = key + extra[1], values + extra[2]
    if bool(xp.any(far)):
        keys = np.flatnonzero(to_host(far))
        extra = rest.exact(None, keys)
        query, key = query + extra[0], key + spread(extra[1], keys, m)
        values = values + spread(extra[2], keys, m)
    slopes = query, key, values
    return slopes, _sampled_error(whole, slopes, settled, rng)


def slopes_if_they_pay(
    head: Head, grad: Array, tol: float, rng: np.random.Generator
) -> Slopes | None:
    """Differentiate by a low rank that pays and meets ``3 * tol``, if there is one."""
    aim = _AIM
    for _ in range(_TRIES):
        least = math.inf
        for empty in worth_a_try(head, tol, rng, aim):
            try:
                slopes, error = lowrank_slopes(head, grad, empty, rng)
            except RefusalError:
                return None
            if error <= SLACK * tol:
                return slopes
            least = min(least, error)
        if not least <= _HOPELESS * SLACK * tol:
            return None
        # what the derivatives lacked says how much more to ask for
        aim *= _TIGHTER * SLACK * tol / least
    return None


def worth_a_try(
    head: Head, tol: float, rng: np.random.Generator, aim: float = _AIM
) -> list[LowRank]:
    """List low ranks whose derivatives may meet ``3 * tol`` and should pay."""
    n, m, d, p = head.sizes
    if head.visible is not None or n * m < _SMALL:
        return []
    limit = _WORTH * n * m * (3 * d + 2 * p + rates().softmax)

    def cost(rank: int, landmarks: int) -> float:
        return _PASSES * lowrank_work(n, m, d, p, rank, landmarks)

    try:
        sample = Sample.of(head, rng)
        deviation = math.sqrt(float(Frame.of(sample).spread.sum()))
        wanted = aim * tol * min(1.0, SLACK * _LOST * deviation)
        found = predict(head, sample, wanted, rng, cost, limit)
        structures = [x.empty for x in found if x.accepted and x.empty is not None]
        if structures:
            return structures
        # a degree that the answer has in part may be what the derivatives lack
        found = predict(head, sample, tol, rng, cost, limit)
        ranks = [
            _whole_degree(d, x.rank) for x in found if x.accepted and not x.landmarks
        ]
        return [
            LowRank.plan(sample, rank=rank, landmarks=0, rng=rng)
            for rank in ranks
            if cost(rank, 0) <= limit
        ]
    except RefusalError:
        return []


def _whole_degree(d: int, rank: int) -> int:
    """The number of monomials of the least degree that has so many."""
    return next(size for g in range(rank + 1) if (size := rank_of(d, g)) >= rank)


def spread(part: Array, rows: Array, n: int) -> Array:
    """Put the rows of a matrix at the numbers ``rows`` of ``n``, zeros elsewhere."""
    xp, (count, width) = array_namespace(part), part.shape
    # array libraries agree on take, not on writing
    source = np.full(n, count)
    source[rows] = np.arange(count)
    device = device_of(part)
    zero = xp.zeros((1, width), dtype=part.dtype, device=device)
    take = xp.asarray(source, device=device)
    return xp.take(xp.concat([part, zero]), take, axis=0)


def _near(state: _Backward, structure: LowRank, far: Array) -> Slopes:
    """Differentiate what the rows make of the keys that are not far."""
    head, basis = state.head, structure.basis
    xp, frame, recipe = head.xp, basis.frame, basis.hermite.recipe
    move = mover(head.query, head.dtype)
    middle = move(structure.middle)
    query, sums = query_vjp(
        head.query,
        state.grad,
        # values are summed less their middle
        state.drift - xp.matmul(state.grad, middle),
        state.normalizer + frame.offset,
        move(frame.to_query),
        move(frame.origin),
        move(basis.landmarks),
        move(structure.weights),
        **recipe,
    )
    # the projection onto the basis is symmetric: it serves both sides
    key, value = key_vjp(
        head.key,
        head.value,
        far,
        move(frame.center),
        move(frame.to_key),
        move(basis.landmarks),
        middle,
        move(basis.project(to_host(sums))),
        offset=frame.offset,
        **recipe,
    )
    return query, key, value


def _sampled_error(
    state: _Backward, slopes: Slopes, settled: Array, rng: np.random.Generator
) -> float:
    """Largest relative error on random queries, and on random keys.

    A query is differentiated from its own exact weights; a key needs the normalizers
    and drifts of all queries, which are taken as they are.
    """
    n, m, _, _ = state.head.sizes
    others = np.delete(np.arange(n), settled)
    rows = np.sort(rng.choice(others, min(len(others), ROWS), replace=False))
    keys = np.sort(rng.choice(m, min(m, ROWS), replace=False))
    some = state.head.with_rows(rows)
    xp = some.xp
    query = attend_vjp(
        xp.astype(some.query, state.grad.dtype, copy=False),
        some.key,
        some.value,
        _take(state.grad, rows),
        scale=some.scale,
        visible=None,
    )[0]
    _, key, value = state.exact(None, keys)
    pairs = [(slopes[0], rows, query), (slopes[1], keys, key), (slopes[2], keys, value)]
    return max(_relative_error(_take(x, at), truth) for x, at, truth in pairs)


def _relative_error(part: Array, truth: Array) -> float:
    """Upper estimate of a relative Frobenius error from sampled rows."""
    part, truth = (to_host(x).astype(np.float64) for x in (part, truth))
    unit = float(np.abs(truth).max(initial=0.0)) or 1.0
    squares = np.sum(((part - truth) / unit) ** 2, axis=1)
    if not squares.any():
        return 0.0
    margin = MARGIN * float(squares.std()) / math.sqrt(len(squares))
    size = float(np.mean(np.sum((truth / unit) ** 2, axis=1)))
    error = math.sqrt((float(squares.mean()) + margin) / size) if size else math.inf
    return error if math.isfinite(error) else math.inf


def _take(x: Array, rows: Array | None) -> Array:
    """Rows of an array; None means all."""
    if rows is None:
        return x
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(rows, device=device_of(x)), axis=0)
