"""The key-value state of the polynomial method: sums of monomials over keys.

The state has shape ``(r, p + 1)`` with ``r`` monomials, whatever the number of keys:
keys can be streamed in, and states add.
"""

from dataclasses import dataclass

import numpy as np

from fastattn._ops.monomials import means
from fastattn.methods.polynomial.expansions import IndexSet
from fastattn.problem.transforms import Transform
from sketching._lib.arrays import Array, array_namespace, mover


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums of monomials of the keys times their values, for one index set.

    Parameters
    ----------
    transform : Transform
        Coordinates ``u`` of queries and ``v`` of keys.
    index : IndexSet
        The monomials.
    value_center : array, shape (p,)
        Subtracted from the values before they are summed.
    scale : float
        The factor of the logits.
    sums : array, shape (r, p + 1)
        ``sum_j v_j^alpha exp(t . (k_j - c)) [value_j - value_center, 1]``, with the
        tilt ``t`` and key center ``c`` of the transform.
    """

    transform: Transform
    index: IndexSet
    value_center: Array
    scale: float
    sums: Array

    def query(
        self, query: Array, coefficients: Array, *, centred: bool = False
    ) -> tuple[Array, Array, Array]:
        """Compute the output of queries, with the coefficients of a polynomial.

        With ``centred``, log-sum-exps are those of centred keys.

        Returns
        -------
        value : array, shape (n, p)
        log_normalizer : array, shape (n,)
            Log-sum-exps of the logits, centring undone unless ``centred``. NaN where
            the sum of weights is not positive.
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
        nan = xp.full_like(total, xp.nan)
        return value, xp.where(positive, logarithm, nan), positive

    def center_logits(self, query: Array) -> Array:
        """Return the logits of queries with the mean key, none minus infinity."""
        xp = array_namespace(query)
        center = self.scale * self.transform.key_center
        for dtype in (self.sums.dtype, xp.float64):
            with np.errstate(over="ignore", invalid="ignore"):
                move = mover(query, dtype)
                logits = xp.matmul(xp.astype(query, dtype, copy=False), move(center))
            if bool(xp.all(xp.isfinite(logits))):
                break
        # minus infinity is reserved for rows that attend to no key
        return xp.maximum(logits, xp.full_like(logits, float(xp.finfo(dtype).min)))
