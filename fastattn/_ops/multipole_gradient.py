r"""The derivative of attention by near keys and clusters, block by block of queries.

In a block with the mean ``a``, far keys of a cluster have the weight ``u_j (1 + (q - a)
. (k_j - centre))`` times the cluster's, where ``u_j`` are their shares of it at ``a``.
The gradient of a query is the derivative of the output of
:mod:`fastattn._ops.multipole`. The gradients of far keys are summed over the queries
for their cluster, and for its group, and then distributed: with ``p_i`` the cluster's
weights, ``D_i`` the derivatives by its logits and ``G_i`` the rows of ``grad``, value
``j`` gets ``u_j sum p_i G_i``, and key ``j`` ``u_j (sum D_i (q_i - a) + a (sum D_i +
<sum p_i G_i, v_j - mean>))``. The first moments of the group add the terms of the
factor in brackets for first-order keys.
"""

from itertools import pairwise
from typing import Any

from fastattn._ops.multipole import FIRST_ORDER, BlockStatistics, _Field, _Keys
from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def multipole_vjp(
    query: Array,
    blocks: BlockStatistics,
    key: Array,
    value: Array,
    metric: Array,
    grad: Array,
    limit: Array,
    *,
    cuts: Any,
    start: Any,
    group: Any,
    threshold: float,
    all_first_order: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Derivatives of ``sum(grad * answer)`` by query, key and value.

    All but ``grad``, ``(n, p)``, and ``limit``, ``(n,)``, is as in ``multipole``; with
    ``all_first_order`` the first moments of all far keys are counted. A row whose
    estimated error exceeds its limit, or whose sums are not finite, adds nothing.
    Returns the derivatives, ``(n, d)``, ``(m, d)`` and ``(m, p)``, and of every row the
    log-sum-exp of its logits, infinite where it added nothing, and ``delta``, the
    product of its output and ``grad``, ``(n,)`` each.
    """
    xp = array_namespace(query, *blocks, key, value, metric, grad, limit)
    keys = _Keys(key, value, start, group)
    by_row = []
    by_key: list[Array] | None = None
    first_order = None if all_first_order else FIRST_ORDER
    for r, (lo, hi) in enumerate(pairwise(cuts)):
        described = blocks.mean[r, :], blocks.square[r, :], blocks.sampled[r, :, :]
        field = _Field(keys, *described, metric, threshold, first_order)
        rows = query[lo:hi, :], grad[lo:hi, :], limit[lo:hi]
        found, sums = _Block(field, described[0], *rows).slopes()
        by_row.append(found)
        by_key = sums if by_key is None else [by_key[i] + sums[i] for i in range(2)]
    slope, norm, delta = (xp.concat(x) for x in zip(*by_row, strict=True))
    assert by_key is not None
    return slope, by_key[0], by_key[1], norm, delta


class _Block:
    """One block of queries with the weights of the keys and clusters that it sees."""

    def __init__(
        self, field: _Field, mean: Array, query: Array, grad: Array, limit: Array
    ) -> None:
        xp = array_namespace(query)
        flip, keys = xp.matrix_transpose, field.keys
        self.field, self.mean, self.query, self.grad = field, mean, query, grad
        self.step = step = query - mean
        far = field.log_total + xp.matmul(step, flip(keys.centre + field.shift))
        far = far + xp.matmul(step**2, flip(field.variance)) / 2
        near = xp.matmul(query, flip(keys.key))
        near = xp.where(field.near[None, :], near, xp.full_like(near, -xp.inf))
        peak = xp.max(xp.concat([far, near], axis=1), axis=1, keepdims=True)
        far, near = xp.exp(far - peak), xp.exp(near - peak)
        total = xp.sum(far, axis=1, keepdims=True) + xp.sum(near, axis=1, keepdims=True)
        far, near = far / total, near / total
        error = xp.matmul(far**2, field.error)
        error = error * xp.matmul(step**2, field.distance) ** 2
        norm = (peak + xp.log(total))[:, 0]
        self.reliable = xp.logical_and(xp.isfinite(norm), error <= limit)
        self.norm = xp.where(self.reliable, norm, xp.full_like(norm, xp.inf))
        self.far, self.near = self._taken(far), self._taken(near)

    def _taken(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.where(self.reliable[:, None], x, xp.zeros_like(x))

    def slopes(self) -> tuple[list[Array], list[Array]]:
        """Gradients, log-sum-exps and deltas of the rows, and gradients of the keys."""
        xp = array_namespace(self.query)
        field, keys, flip = self.field, self.field.keys, xp.matrix_transpose
        factor = keys.group * field.factor  # (G, C)
        # a group's first moments, (G, d, p), are what values tilt by
        moment = xp.stack(field.moment)
        pull = xp.matmul(self.grad[None, :, :], flip(moment))  # (G, b, d)
        tilt = xp.sum(pull * self.step[None, :, :], axis=2)  # (G, b)
        far = xp.matmul(self.grad, flip(field.mean)) + xp.matmul(flip(tilt), factor)
        near = xp.matmul(self.grad, flip(keys.value))
        far, near = self._taken(far), self._taken(near)
        delta = xp.sum(self.far * far, axis=1) + xp.sum(self.near * near, axis=1)
        far = self.far * (far - delta[:, None])
        near = self.near * (near - delta[:, None])
        growth = xp.matmul(self.far, flip(factor))  # (b, G)
        slope = xp.matmul(near, keys.key) + xp.matmul(far, keys.centre + field.shift)
        slope = slope + self.step * xp.matmul(far, field.variance)
        slope = slope + self._taken(xp.sum(flip(growth)[:, :, None] * pull, axis=0))
        by_key, by_value = self._shared(far, growth)
        by_key = by_key + xp.matmul(flip(near), self.query)
        by_value = by_value + xp.matmul(flip(self.near), self.grad)
        return [slope, self.norm, delta], [by_key, by_value]

    def _shared(self, far: Array, growth: Array) -> tuple[Array, Array]:
        """Distribute the gradients of clusters and groups to their far keys."""
        xp = array_namespace(far)
        field, keys, flip = self.field, self.field.keys, xp.matrix_transpose
        grads = keys.spread(xp.matmul(flip(self.far), self.grad))  # (m, p)
        steps = keys.spread(xp.matmul(flip(far), self.step))  # (m, d)
        value = keys.value - keys.spread(field.mean)
        ones = keys.spread(xp.sum(far, axis=0)) + xp.sum(grads * value, axis=1)
        some = xp.where(field.total > 0, field.total, xp.ones_like(field.total))
        share = (field.weight / keys.spread(some))[:, None]
        by_key = share * (steps + ones[:, None] * self.mean)
        by_value = share * grads
        local = keys.local - keys.spread(field.shift)
        common = xp.exp(field.top - xp.max(field.top))
        weight = field.weight * keys.spread(common)
        weight = xp.where(field.first_order, weight, xp.zeros_like(weight))
        inside = xp.matmul(keys.group, keys.member)  # (G, m)
        for g in range(inside.shape[0]):
            own = (weight * inside[g, :])[:, None]
            tilt = xp.matmul(flip(growth[:, g, None] * self.step), self.grad)  # (d, p)
            back = xp.matmul(value, flip(tilt))
            along = xp.sum(local * back, axis=1, keepdims=True)
            by_key = by_key + own * (back + along * self.mean)
            by_value = by_value + own * xp.matmul(local, tilt)
        return by_key, by_value
