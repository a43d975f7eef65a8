"""A low-rank softmax prepared on keys and values: sums of monomials.

The structure holds one number for each monomial and value column, whatever the number
of keys, so that keys can be streamed in and two structures can be merged.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._ops.monomials import means, moments
from fastattn.methods.polynomial.expansions import IndexSet
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, mover


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Moments of keys and values under one index set.

    Parameters
    ----------
    transform : Transform
        Coordinates of queries and keys.
    index : IndexSet
        The monomials.
    value_center : array, shape (p,)
        What is subtracted from the values before they are summed.
    scale : float
        The factor of the logits.
    sums : array, shape (r, p + 1)
        Sum over keys of monomial times weight times ``[value - value_center, 1]``.
    """

    transform: Transform
    index: IndexSet
    value_center: Array
    scale: float
    sums: Array

    @staticmethod
    def of(
        key: Array,
        value: Array,
        transform: Transform,
        index: IndexSet,
        value_center: Array,
        scale: float,
        dtype: Any,
    ) -> "Moments":
        """Sum over all keys, in ``dtype``."""
        move = mover(key, dtype)
        sums = moments(
            key,
            value,
            move(transform.key_center),
            move(transform.key_map),
            move(transform.tilt),
            move(value_center),
            parent=index.parent,
            coordinate=index.coordinate,
        )
        return Moments(transform, index, value_center, scale, sums)

    def query(
        self, query: Array, coefficients: Array, *, centred: bool = False
    ) -> tuple[Array, Array, Array]:
        """Answer queries with the polynomial of the given coefficients.

        ``centred`` leaves the logit of the centre out of the log-sum-exps.

        Returns
        -------
        value : array, shape (n, p)
        log_normalizer : array, shape (n,)
            Of the true logits: centring is undone. NaN where the sum of weights is
            not positive.
        positive : boolean array, shape (n,)
            Rows whose sum of weights is positive and finite.
        """
        xp = array_namespace(query)
        move = mover(query, self.sums.dtype)
        weights = move(self.index.weights(coefficients))
        value, total = means(
            query,
            move(self.transform.query_center),
            move(self.transform.query_map),
            self.sums * weights[:, None],
            move(self.value_center),
            parent=self.index.parent,
            coordinate=self.index.coordinate,
        )
        positive = xp.logical_and(total > 0, xp.isfinite(total))
        logarithm = xp.log(xp.where(positive, total, xp.ones_like(total)))
        if not centred:
            logarithm = logarithm + self.center_logits(query)
        nothing = xp.full_like(total, xp.nan)
        return value, xp.where(positive, logarithm, nothing), positive

    def center_logits(self, query: Array) -> Array:
        """Return the logits of queries and the centre of the keys, none -infinity."""
        xp = array_namespace(query)
        center = self.scale * self.transform.key_center
        for dtype in (self.sums.dtype, xp.float64):
            with np.errstate(over="ignore", invalid="ignore"):
                move = mover(query, dtype)
                logits = xp.matmul(xp.astype(query, dtype, copy=False), move(center))
            if bool(xp.all(xp.isfinite(logits))):
                break
        # minus infinity would say that a row sees no key
        return xp.maximum(logits, xp.full_like(logits, float(xp.finfo(dtype).min)))
