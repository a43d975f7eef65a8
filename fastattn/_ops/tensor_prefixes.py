"""Causal tensor attention by prefix sums.

A row sees the tuples of which every key is among the first few of its factor, so that
sums over these tuples are Hadamard products of prefix sums of the factors.
"""

from typing import Any

from fastattn._ops.monomials import monomials
from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op

_ROWS = 32


@op("cpu")
def prefix_means(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    maps: tuple[Array, ...],
    weights: Array,
    prefix_lengths: tuple[Array, ...],
    *,
    parent: Any,
    coordinate: Any,
) -> tuple[Array, Array]:
    """Weighted means of products of values over prefixes, and the sums of weights.

    The weight of a tuple for a row is the sum over monomials of ``weights`` times the
    monomials of the query and of all keys, whose coordinates are multiplied by
    ``maps``. Row ``i`` sees the first ``prefix_lengths[s][i]`` keys of factor ``s``,
    which do not decrease with ``i``. The mean is 0 where the sum is not positive and
    finite. The answers are ``(n, p)`` and ``(n,)``, in float64.
    """
    xp, n, p = array_namespace(query), query.shape[0], values[0].shape[1]
    index = {"parent": parent, "coordinate": coordinate}
    where = {"dtype": xp.float64, "device": device_of(query)}
    states = [xp.zeros((len(parent), p + 1), **where) for _ in keys]
    read = [0 for _ in keys]
    means, totals = [], []
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        features = monomials.reference(query[rows, :] * maps[0], **index)
        # one number for each row, monomial and column of values
        product = (xp.astype(features, xp.float64) * weights)[:, :, None]
        for s, (key, value) in enumerate(zip(keys, values, strict=True)):
            seen = prefix_lengths[s][rows]
            fresh = slice(read[s], int(seen[-1]))
            features = monomials.reference(key[fresh, :] * maps[s + 1], **index)
            ones = xp.ones(
                (features.shape[0], 1), dtype=value.dtype, device=where["device"]
            )
            extended = xp.concat([value[fresh, :], ones], axis=1)
            terms = xp.astype(features, xp.float64)[:, :, None] * extended[:, None, :]
            sums = xp.concat(
                [states[s][None, ...], states[s] + xp.cumulative_sum(terms, axis=0)]
            )
            product = product * xp.take(sums, seen - read[s], axis=0)
            states[s], read[s] = sums[-1, ...], fresh.stop
        both = xp.sum(product, axis=1)
        total = both[:, -1]
        reliable = xp.logical_and(total > 0, xp.isfinite(total))
        safe = xp.where(reliable, total, xp.ones_like(total))[:, None]
        mean = both[:, :-1] / safe
        means.append(xp.where(reliable[:, None], mean, xp.zeros_like(mean)))
        totals.append(total)
    return xp.concat(means), xp.concat(totals)
