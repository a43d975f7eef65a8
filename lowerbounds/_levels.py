"""Attention over many keys with few different logits, by counts of keys.

The logits of a reduction are inner products of 0/1 vectors, which are whole numbers up
to d, and one of the padded key. Each row is given by its number of keys at each level;
the outputs at every entry bound and of every polynomial follow from the counts.
"""

from dataclasses import dataclass

import numpy as np

from lowerbounds._attention_instance import AttentionInstance
from lowerbounds._factored import expansion
from sketching._lib.arrays import Array

# inner products that exist at once
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The logits of an instance of order 2 with one padded key.

    Parameters
    ----------
    counts : array, shape (n, levels)
        The real keys of each query at each level that any has.
    logits : array, shape (levels,)
        The logit of each level.
    padded : float
        The logit of the padded key.
    """

    counts: Array
    logits: Array
    padded: float

    @classmethod
    def of(cls, made: AttentionInstance) -> "Levels":
        """Count the keys of a calibrated or direct reduction at each level."""
        if made.order > 2 or made.construction == "padded":
            raise ValueError(
                "made: expected order 2 and one padded key, got order "
                f"{made.order} and construction {made.construction!r}"
            )
        query, key = made.instance.vectors
        counts = _counts(query, key)
        step = made.scale * made.entry_bound**2
        if made.instance.seeks_orthogonal:
            step = -step
        padded = float(made.scale * made.query[0] @ made.key[-1])
        present = np.flatnonzero(counts.any(axis=0))
        return cls(counts[:, present], step * present, padded)

    def exact(self, factor: float) -> Array:
        """Outputs of exact attention with all logits times a factor."""
        # in units of the padded key, which every row has
        with np.errstate(over="ignore"):
            weights = np.exp(factor * (self.logits - self.padded))
        with np.errstate(invalid="ignore"):
            # zero keys of infinite weight add zero
            real = np.nan_to_num(self.counts * weights, posinf=np.inf).sum(axis=1)
            return np.where(np.isinf(real), 1.0, real / (1 + real))

    def polynomials(self, factor: float, degree: int) -> Array:
        """Outputs of the truncated expansions of exp, a row for each degree."""
        logits = factor * np.append(self.logits, self.padded)
        low, high = float(logits.min()), float(logits.max())
        terms = [c * term for c, term in expansion(logits, low, high, degree)]
        weights = np.cumsum(terms, axis=0)
        real = weights[:, :-1] @ self.counts.T
        # weights that sum to zero give no answer at this degree
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(real / (real + weights[:, -1:]))


def _counts(query: Array, key: Array) -> Array:
    """How many keys have each inner product with each query, as float64."""
    n, width = len(query), query.shape[1] + 1
    found = np.empty((n, width))
    right = key.T.astype(np.float32)
    step = max(1, _BLOCK // len(key))
    for start in range(0, n, step):
        # whole numbers this small are exact in float32
        products = (query[start : start + step].astype(np.float32) @ right).astype(int)
        products += width * np.arange(len(products))[:, None]
        counts = np.bincount(products.ravel(), minlength=width * len(products))
        found[start : start + step] = counts.reshape(-1, width)
    return found
