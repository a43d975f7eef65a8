"""Attention of single rows: near keys exactly, far keys by clusters and their leaves.

Clusters are cut into leaves of a few keys. For a query ``q`` the weight of a cluster is
``count * exp(q . centre + z / 2)``, with ``z`` the variance of ``q . key`` within it:
exact if these logits are normally distributed. ``z`` is computed from the leading
direction of the keys and the variances that remain in each coordinate. The error is
about the cluster's share of the row times ``z ** .5 * (spread + SKEW z apart)``:
``spread`` is the deviation of its values, and ``apart`` their distance from the mean of
all, which matters where the weight is wrong. Where the error exceeds a threshold the
leaves are examined, and where that of a leaf does, its keys.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from sketching._lib.arrays import Array, array_namespace, device_of, to_host
from sketching._lib.op import op

# largest variance for which the normal approximation is used: beyond it nothing is far
LARGEST = 4.0
# relative error of a weight by skewed logits, over the third power of their deviation
SKEW = 1 / 3
# steps of the power iteration that finds a leading direction
STEPS = 4
# largest exponent of a leaf's weight relative to the largest weight of the clusters
EXPONENT = 80.0


@op("cpu", "gpu")
def summarise(key: Array, value: Array, value_center: Array, *, start: Any) -> Array:
    """Summaries of parts of the keys for queries, ``(C, 3 d + p + 3)``.

    Part ``c`` is ``start[c]`` to ``start[c + 1]``. The columns are the mean of its
    keys, a direction in which they deviate most, as long as their deviation, the
    variances without it, the mean of its values, the root mean square distance of these
    from it, its distance from ``value_center``, and the logarithm of the number of
    keys.
    """
    xp = array_namespace(key, value, value_center)
    rows = []
    for lo, hi in pairwise(start):
        keys, values = key[lo:hi, :], value[lo:hi, :]
        centre, mean = xp.mean(keys, axis=0), xp.mean(values, axis=0)
        spread = xp.sqrt(xp.sum((values - mean) ** 2) / int(hi - lo))
        count = xp.full((1,), float(hi - lo), dtype=key.dtype, device=device_of(key))
        lead, rest = _deviations(keys - centre)
        apart = xp.sqrt(xp.sum((mean - value_center) ** 2))
        sizes = xp.stack([spread, apart])
        rows.append(xp.concat([centre, lead, rest, mean, sizes, xp.log(count)]))
    return xp.stack(rows)


@op("cpu")
def multipole_rows(
    query: Array,
    key: Array,
    value: Array,
    clusters: Array,
    leaves: Array,
    *,
    first: Any,
    start: Any,
    threshold: float,
) -> tuple[Array, Array, Array, Any]:
    """Softmax-weighted means of ``value`` and the log-sum-exp of ``query @ key^T``.

    Leaf ``b`` of the keys, ``(m, d)``, and values, ``(m, p)``, is ``start[b]`` to
    ``start[b + 1]``; cluster ``c`` has the leaves ``first[c]`` to ``first[c + 1]``.
    ``clusters`` and ``leaves`` are the results of ``summarise``. Returns the means,
    ``(n, p)``, the logarithms, ``(n,)``, an estimate of the squared errors of the rows
    up to a common factor, ``(n,)``, and on the host how many leaves each row examined
    and how many of its keys are near, ``(n, 2)``.
    """
    xp = array_namespace(query, key, value, clusters, leaves)
    n, d = query.shape
    device = device_of(query)

    def labels(cuts: Any) -> Array:
        every = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
        return xp.asarray(every, device=device)

    logits, size, wide = _weigh(query, clusters)
    peak = xp.max(logits, axis=1, keepdims=True)
    limit = threshold * xp.sum(xp.exp(logits - peak), axis=1, keepdims=True)

    def exceeds(logits: Array, size: Array, wide: Array) -> Array:
        weight = xp.exp(xp.clip(logits - peak, max=EXPONENT))
        return xp.logical_or(wide, weight * size > limit)

    opened = exceeds(logits, size, wide)
    seen = xp.take(opened, labels(first), axis=1)
    finer, small, wide = _weigh(query, leaves)
    near = xp.logical_and(seen, exceeds(finer, small, wide))
    far = xp.logical_and(seen, xp.logical_not(near))
    keys = xp.take(near, labels(start), axis=1)
    nothing = xp.full((1, 1), -xp.inf, dtype=query.dtype, device=device)
    terms = xp.concat(
        [
            xp.where(opened, nothing, logits),
            xp.where(far, finer, nothing),
            xp.where(keys, xp.matmul(query, xp.matrix_transpose(key)), nothing),
        ],
        axis=1,
    )
    top = xp.max(terms, axis=1, keepdims=True)
    weights = xp.exp(terms - top)
    total = xp.sum(weights, axis=1, keepdims=True)
    weights = weights / total
    means = [x[:, 3 * d : -3] for x in (clusters, leaves)]
    sizes = xp.concat([size, small], axis=1)
    error = xp.sum((weights[:, : sizes.shape[1]] * sizes) ** 2, axis=1)
    counts = [xp.sum(xp.astype(x, xp.int64), axis=1) for x in (seen, keys)]
    out = xp.matmul(weights, xp.concat([*means, value], axis=0))
    norm = xp.reshape(top + xp.log(total), (n,))
    return out, norm, error, np.stack([to_host(x) for x in counts], axis=1)


def _deviations(local: Array) -> tuple[Array, Array]:
    """The leading direction of rows by power iteration, and variances without it."""
    xp = array_namespace(local)
    variance = xp.mean(local**2, axis=0)
    along = xp.take(local, xp.reshape(xp.argmax(variance), (1,)), axis=1)[:, 0]
    tiny = xp.finfo(local.dtype).smallest_normal
    for _ in range(STEPS):
        lead = xp.matmul(xp.matrix_transpose(local), along)
        lead = lead / (xp.sqrt(xp.sum(lead**2)) + tiny)
        along = xp.matmul(local, lead)
    lead = lead * xp.sqrt(xp.mean(along**2))
    return lead, xp.clip(variance - lead**2, min=0.0)


def _weigh(query: Array, parts: Array) -> tuple[Array, Array, Array]:
    """Logarithms of weights, error of a unit weight, and whether it is too large."""
    xp, d = array_namespace(query), query.shape[1]
    lead, rest = (xp.matrix_transpose(parts[:, x : x + d]) for x in (d, 2 * d))
    variance = xp.matmul(query, lead) ** 2 + xp.matmul(query**2, rest)
    bend = xp.clip(variance, max=LARGEST)
    logits = xp.matmul(query, xp.matrix_transpose(parts[:, :d]))
    size = parts[None, :, -3] + SKEW * bend * parts[None, :, -2]
    logits = logits + bend / 2 + parts[None, :, -1]
    return logits, xp.sqrt(bend) * size, variance > LARGEST
