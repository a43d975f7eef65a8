"""Prefix sums of every factor, multiplied into the rows of one block at a time."""

import numpy as np

from fastattn._ops.monomials import monomials
from sketching._ops.cpu.compile import njit
from sketching._ops.cpu.elementary import REASSOCIATE

# rows whose products of prefix sums exist at once: they stay in cache
_ROWS = 32


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def prefix_means(
    query, keys, values, maps, weights, prefix_lengths, *, parent, coordinate
):
    n, p = len(query), values[0].shape[1]
    index = {"parent": parent, "coordinate": coordinate}
    states = [np.zeros((len(parent), p + 1)) for _ in keys]
    read = [0 for _ in keys]
    value = np.empty((n, p))
    totals = np.empty(n)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        features = monomials(query[rows] * maps[0], **index) * weights
        product = np.repeat(features[:, :, None], p + 1, axis=2).astype(np.float64)
        for s, key in enumerate(keys):
            seen = prefix_lengths[s][rows]
            fresh = slice(read[s], int(seen[-1]))
            features = monomials(key[fresh] * maps[s + 1], **index)
            _advance(product, features, values[s][fresh], seen - read[s], states[s])
            read[s] = fresh.stop
        both = product.sum(axis=1)
        total = totals[rows] = both[:, p]
        reliable = (total > 0) & np.isfinite(total)
        both[~reliable] = 0
        value[rows] = both[:, :p] / np.where(reliable, total, 1)[:, None]
    return value, totals


@njit(nogil=True, cache=True, error_model="numpy", fastmath=REASSOCIATE)
def _advance(product, features, values, seen, state):
    # adds the keys that each row sees anew, and multiplies the row by the sums so far
    done, p = 0, values.shape[1]
    for i in range(product.shape[0]):
        while done < seen[i]:
            for j in range(state.shape[0]):
                monomial = np.float64(features[done, j])
                for c in range(p):
                    state[j, c] += monomial * values[done, c]
                state[j, p] += monomial
            done += 1
        row = product[i]
        for j in range(state.shape[0]):
            for c in range(p + 1):
                row[j, c] *= state[j, c]
