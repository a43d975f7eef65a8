"""A sample of queries and keys from which the error of a method is predicted.

A method that turns the weight ``a_ij`` of a row into ``a_ij (1 + delta_ij)`` changes
the output by ``sum_j a_ij delta_ij (v_j - out_i)`` to first order. A few rows, computed
exactly, and a sample of the keys estimate the mean square of that sum without bias.
"""

from dataclasses import dataclass

import numpy as np

from fastattn._problem import Head, host_rows
from sketching._lib.arrays import Array, to_host

_ROWS = 64
_KEYS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Sampled rows with their exact answers, and sampled keys.

    Parameters
    ----------
    rows : integer array, shape (b,)
        Numbers of the sampled queries.
    query : array, shape (b, d)
    exact : array, shape (b, p)
        Exact outputs over all keys.
    key, value : array, shapes (c, d), (c, p)
        The sampled keys and their values.
    weights : array, shape (b, c)
        Exact softmax weights of the sampled keys, among all ``m``.
    spread : array, shape (b, c)
        Squared distances from the exact outputs to the sampled values.
    m : int
        Number of keys that the sample stands for.
    """

    rows: Array
    query: Array
    exact: Array
    key: Array
    value: Array
    weights: Array
    spread: Array
    m: int

    @staticmethod
    def of(head: Head, rng: np.random.Generator) -> "Probe":
        """Draw a probe; costs ``64 / n`` of exact attention."""
        n, m, _, _ = head.sizes
        rows = np.sort(rng.choice(n, size=min(n, _ROWS), replace=False))
        keys = np.sort(rng.choice(m, size=min(m, _KEYS), replace=False))
        exact, normalizer = head.with_rows(rows).attend()
        query, key = host_rows(head.query, rows), host_rows(head.key, keys)
        value, exact = host_rows(head.value, keys), to_host(exact)
        logits = head.scale * (query @ key.T) - to_host(normalizer)[:, None]
        spread = (
            np.sum(value**2, axis=1)[None, :]
            - 2 * exact @ value.T
            + np.sum(exact**2, axis=1)[:, None]
        )
        weights = np.exp(np.minimum(logits, 0.0))
        return Probe(
            rows, query, exact, key, value, weights, np.maximum(spread, 0.0), m
        )

    def error(self, delta: Array) -> float:
        """Estimate the relative Frobenius error if weights are off by ``delta``.

        The square of a sum over sampled keys estimates the square of the whole sum
        with a bias by the terms' own squares, which is taken out.
        """
        share = self.m / len(self.key)
        off = self.weights * delta
        sums = off @ self.value - off.sum(axis=1)[:, None] * self.exact
        own = float(np.sum(off**2 * self.spread))
        square = share**2 * (float(np.sum(sums**2)) - own) + share * own
        # noise may drive the unbiased estimate below what independent keys would give
        square = max(square, 0.25 * share * own)
        return float(np.sqrt(square / max(float(np.sum(self.exact**2)), 1e-300)))
