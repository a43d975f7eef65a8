r"""Attention of blocks of similar queries: near keys exactly, far keys by clusters.

In a block with the mean query ``a``, the weight of a key is
``exp(a . k) exp((q - a) . k)``. The first factor is exact for every key; the
second is expanded about the weighted centre of the key's cluster: mean and variance of
the exponent, and first moments with the values. A key's remainder grows with
``weight * growth * z exp(BEND z)``, where ``growth`` is the contribution of a unit of
weight in its cluster to the row sum, and ``z`` the mean square of
``(q - a) . (k - centre)``. Keys whose remainder exceeds the threshold are near, and
computed exactly; for keys beyond a smaller threshold the first moment is added
(first-order keys), by groups of clusters.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op

# fraction of the threshold beyond which the first moment of a key is added
FIRST_ORDER = 0.03
# E[(exp(x) - 1 - x)^2] of a normal x with variance z is about 3/4 (z exp(BEND z))^2,
# within a tenth up to z = 3; larger z are cut off
BEND, LARGEST = 0.7, 20.0
# signs of remainders in a cluster are taken as random but for this share of the square
ALIKE = 0.1


class BlockStatistics(NamedTuple):
    """What ``describe`` returns of each block of queries."""

    mean: Array
    square: Array
    sampled: Array


@op("cpu", "gpu")
def describe(query: Array, *, cuts: Any, rows: int) -> tuple[Array, Array, Array]:
    """Mean, mean square deviation, and deviations of a few rows, of each block.

    Block ``r`` is ``query[cuts[r] : cuts[r + 1]]``, its ``rows`` rows are evenly
    spread. The answers are ``(R, d)``, ``(R, d)`` and ``(R, rows, d)``.
    """
    xp = array_namespace(query)
    means, squares, chosen = [], [], []
    for lo, hi in pairwise(cuts):
        mean = xp.mean(query[lo:hi, :], axis=0)
        step = query[lo:hi, :] - mean
        some = np.arange(rows) * (hi - lo) // rows
        some = xp.asarray(some, device=device_of(query))
        means.append(mean)
        squares.append(xp.mean(step**2, axis=0))
        chosen.append(xp.take(step, some, axis=0))
    return xp.stack(means), xp.stack(squares), xp.stack(chosen)


@op("cpu", "gpu")
def multipole(
    query: Array,
    blocks: BlockStatistics,
    key: Array,
    value: Array,
    metric: Array,
    *,
    cuts: Any,
    start: Any,
    group: Any,
    threshold: float,
    low_precision: str = "",  # noqa: ARG001
) -> tuple[Array, Array, Array, Any]:
    """Softmax-weighted means of ``value`` and the log-sum-exp of ``query @ key^T``.

    Block ``r`` of the queries, ``(n, d)``, is ``cuts[r]`` to ``cuts[r + 1]``, cluster
    ``c`` of the keys, ``(m, d)``, and values, ``(m, p)``, is ``start[c]`` to ``start[c
    + 1]`` and belongs to ``group[c]``. ``blocks`` holds the results of ``describe`` for
    whole blocks; ``query`` may hold some of their rows.
    ``metric``, ``(d,)``, is the mean square of the keys, and defines the distance of a
    row from the mean. Returns the means, ``(n, p)``, the logarithms, ``(n,)``, an
    estimate of the squared errors of the rows up to a common factor, ``(n,)``, and on
    the host the numbers of near keys, first-order keys and clusters of each block,
    ``(R, 3)``. With ``low_precision``, "int8" or "bfloat16", a kernel may round the
    factors of products with near keys: values and weights to bfloat16, queries and keys
    to that or to integers, but for the logits of the mean of a block.
    """
    xp = array_namespace(query, *blocks, key, value, metric)
    keys = _Keys(key, value, start, group)
    outs, norms, errors, counts = [], [], [], []
    for r, (lo, hi) in enumerate(pairwise(cuts)):
        described = blocks.mean[r, :], blocks.square[r, :], blocks.sampled[r, :, :]
        field = _Field(keys, *described, metric, threshold)
        out, norm, error = field.answer(query[lo:hi, :], query[lo:hi, :] - described[0])
        outs.append(out)
        norms.append(norm)
        errors.append(error)
        counts.append(field.counts())
    out = xp.concat(outs, axis=0)
    return out, xp.concat(norms), xp.concat(errors), np.array(counts)


class _Keys:
    """The keys, the cluster of each key, and the group of each cluster."""

    def __init__(self, key: Array, value: Array, start: Any, group: Any) -> None:
        xp = array_namespace(key)
        label = np.repeat(np.arange(len(group)), np.diff(start))
        member = _one_hot(key, label)
        self.key, self.value, self.member = key, value, member
        self.group = _one_hot(key, group)
        self.size = xp.sum(member, axis=1)
        self.centre = xp.matmul(member, key) / self.size[:, None]
        self.local = key - self.spread(self.centre)

    def spread(self, x: Array) -> Array:
        """Give each key the row of its cluster: ``(C, c)`` to ``(m, c)``."""
        xp = array_namespace(x)
        return xp.matmul(xp.matrix_transpose(self.member), x)


class _Field:
    """Weights and moments of the keys for one block of queries."""

    def __init__(
        self,
        keys: _Keys,
        mean: Array,
        square: Array,
        sampled: Array,
        metric: Array,
        threshold: float,
        first_order: float | None = FIRST_ORDER,
    ) -> None:
        xp = array_namespace(mean)
        self.keys, member = keys, keys.member
        length = xp.sum(square * metric)
        tilt = xp.matmul(keys.key, mean)
        # relative to the largest of a cluster: those far from the block stay in range
        alone = xp.where(member > 0, tilt, xp.full_like(member, -xp.inf))
        self.top = xp.max(alone, axis=1)
        weight = xp.exp(tilt - keys.spread(self.top))
        growth = _growths(
            xp.matmul(sampled, xp.matrix_transpose(keys.centre)) + self.top,
            xp.matmul(member, weight),
            xp.matmul(sampled**2, metric),
        )
        square = xp.matmul(keys.local**2, square)
        square = xp.where(square < LARGEST, square, xp.full_like(square, LARGEST))
        rest = weight * square * xp.exp(BEND * square)
        remainder = keys.spread(growth) * rest
        self.near = remainder > threshold
        nothing = xp.zeros_like(weight)
        self.weight = xp.where(self.near, nothing, weight)
        self.first_order = ~self.near
        if first_order is not None:
            counted = remainder > first_order * threshold
            self.first_order = xp.logical_and(counted, self.first_order)
        self.total = xp.matmul(member, self.weight)
        total = xp.where(self.total > 0, self.total, xp.ones_like(self.total))
        # squares of the remainders of clusters
        rest = xp.where(self.near, nothing, rest) / keys.spread(total)
        self.error = xp.matmul(member, rest**2) + ALIKE * xp.matmul(member, rest) ** 2
        tiny = xp.finfo(mean.dtype).smallest_normal
        self.distance = metric / (length + tiny)
        self._sum_moments(total)

    def counts(self) -> list[int]:
        """Numbers of near keys, of first-order keys and of clusters."""
        xp = array_namespace(self.near)
        kinds = (self.near, self.first_order, self.total > 0)
        return [int(xp.count_nonzero(x)) for x in kinds]

    def answer(self, query: Array, step: Array) -> tuple[Array, Array, Array]:
        """Attend from queries of the block."""
        xp = array_namespace(query)
        keys, flip = self.keys, xp.matrix_transpose
        far = self.log_total + xp.matmul(step, flip(keys.centre + self.shift))
        far = far + xp.matmul(step**2, flip(self.variance)) / 2
        near = xp.matmul(query, flip(keys.key))
        near = xp.where(self.near[None, :], near, xp.full_like(near, -xp.inf))
        logits = xp.concat([far, near], axis=1)
        peak = xp.max(logits, axis=1, keepdims=True)
        weights = xp.exp(logits - peak)
        far, near = weights[:, : far.shape[1]], weights[:, far.shape[1] :]
        out = xp.matmul(far, self.mean) + xp.matmul(near, keys.value)
        growth = xp.matmul(far * self.factor, flip(keys.group))  # (b, G)
        for g in range(growth.shape[1]):
            out = out + growth[:, g, None] * xp.matmul(step, self.moment[g])
        total = xp.sum(weights, axis=1, keepdims=True)
        error = xp.matmul((far / total) ** 2, self.error)
        error = error * xp.matmul(step**2, self.distance) ** 2
        return out / total, (peak + xp.log(total))[:, 0], error

    def _sum_moments(self, total: Array) -> None:
        """Sum the moments of the far keys; ``total`` is not zero anywhere."""
        xp, keys, weight = array_namespace(total), self.keys, self.weight[:, None]
        nothing = xp.full_like(total, -xp.inf)
        self.log_total = xp.where(self.total > 0, xp.log(total) + self.top, nothing)
        self.shift = xp.matmul(keys.member, weight * keys.local) / total[:, None]
        square = xp.matmul(keys.member, weight * keys.local**2) / total[:, None]
        square = square - self.shift**2
        self.variance = xp.where(square > 0, square, xp.zeros_like(square))
        self.mean = xp.matmul(keys.member, weight * keys.value) / total[:, None]
        first_order = xp.where(
            self.first_order, self.weight, xp.zeros_like(self.weight)
        )
        own = xp.matmul(keys.member, first_order)
        # within a group, relative to one key
        common = xp.exp(self.top - xp.max(self.top))
        whole = xp.matmul(keys.group, own * common)  # (G,)
        whole = xp.where(whole > 0, whole, xp.ones_like(whole))
        self.factor = own / total / xp.matmul(xp.matrix_transpose(keys.group), whole)
        step = (first_order * keys.spread(common))[:, None]
        step = step * (keys.local - keys.spread(self.shift))
        value = keys.value - keys.spread(self.mean)
        inside = xp.matmul(keys.group, keys.member)  # (G, m)
        self.moment = [
            xp.matmul(xp.matrix_transpose(inside[g, :, None] * step), value)
            for g in range(inside.shape[0])
        ]


def _growths(logit: Array, mass: Array, distance: Array) -> Array:
    """Share of a row that a unit of weight in each cluster is: root mean squares.

    Rows count by their squared ``distance`` from the mean.
    """
    xp = array_namespace(logit)
    growth = xp.exp(logit - xp.max(logit, axis=1, keepdims=True))
    growth = growth / xp.sum(growth * mass, axis=1, keepdims=True)
    tiny = xp.finfo(logit.dtype).smallest_normal
    distance = distance / (xp.mean(distance) + tiny)
    return xp.sqrt(xp.mean(growth**2 * distance[:, None], axis=0))


def _one_hot(like: Array, label: Any) -> Array:
    """Rows of zeros and ones: which entries of ``label`` are 0, 1, ..."""
    xp = array_namespace(like)
    member = label[None, :] == np.arange(int(label.max()) + 1)[:, None]
    return xp.asarray(member, dtype=like.dtype, device=device_of(like))
