"""Bounds on the error of each row's log-sum-exp, from bounds on its weights.

Weights that are all off by a factor between ``exp(-e)`` and ``exp(e)`` have a sum that
is, and its logarithm is off by ``e``. What is added here is the rounding of the
logarithm, and of the logits that were left out of the weights.
"""

import math
from typing import Any

import numpy as np

from fastattn.certificates.rounding import (
    gamma,
    row_norms,
    smallest_number,
    unit_roundoff,
)
from fastattn.problem.head import Head
from sketching._lib.arrays import Array, to_host


def log_errors(
    head: Head,
    logarithm: Array,
    weights: Array | float,
    dtype: Any,
    left_out: float = 0,
) -> Array:
    """Bound the error of each row's log-sum-exp, on the host.

    Parameters
    ----------
    head : Head
        The inputs.
    logarithm : array, shape (n,)
        The log-sum-exps as they are returned.
    weights : float or array, shape (n,)
        Bound on the error of the logarithm of the sum of a row's weights.
    dtype : dtype
        The log-sum-exps were computed in it.
    left_out : float
        Norm of what a query was multiplied by to make the logit that the weights lack.
    """
    _, m, d, _ = head.sizes
    u, tiny = unit_roundoff(head.xp, dtype), smallest_number(head.xp, dtype)
    size = np.abs(to_host(logarithm).astype(np.float64))
    empty = np.asarray(to_host(logarithm)) == -np.inf
    size = np.where(empty, 0.0, size)
    # a logarithm, and sums with it, of terms up to that size; then it is stored
    error = weights + 8 * u * (size + math.log(max(m, 1)) + 1)
    own = logarithm.dtype
    error += unit_roundoff(head.xp, own) * size + smallest_number(head.xp, own)
    if left_out:
        norms = row_norms(head.query, head.query_squares)
        # no product with a row of zeros is lost
        error += (gamma(d + 6, u) * norms + d * tiny * (1 + norms)) * left_out
        error += 8 * u * norms * left_out + d * tiny * (1 + norms)
    most = float(head.xp.finfo(own).max)
    # what was cut off at the end of the range is unknown
    error = np.where((size < most) & ~np.isnan(error), error, np.inf)
    return np.where(empty, 0.0, error)
