"""Bounds on the error of each row's log-sum-exp, from bounds on its weights.

If every computed weight is within a factor ``exp(-e)`` to ``exp(e)`` of the exact one,
so is their sum, and the error of its logarithm is at most ``e``. This module adds the
rounding of the logarithm, and of logits that are added to it afterwards.
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
        Precision in which the log-sum-exps were computed.
    left_out : float
        Norm ``||c||`` where the weights are those of centred keys, and the logit ``q .
        c`` of the (scaled) center was added to the log-sum-exp.
    """
    _, m, d, _ = head.sizes
    u, tiny = unit_roundoff(head.xp, dtype), smallest_number(head.xp, dtype)
    size = np.abs(to_host(logarithm).astype(np.float64))
    empty = np.asarray(to_host(logarithm)) == -np.inf
    size = np.where(empty, 0.0, size)
    # rounding of the logarithm and of sums of terms of that size; then of the storage
    error = weights + 8 * u * (size + math.log(max(m, 1)) + 1)
    own = logarithm.dtype
    error += unit_roundoff(head.xp, own) * size + smallest_number(head.xp, own)
    if left_out:
        norms = row_norms(head.query, head.query_squares)
        # products with a zero row are exact, products with other rows may underflow
        error += (gamma(d + 6, u) * norms + d * tiny * (1 + norms)) * left_out
        error += 8 * u * norms * left_out + d * tiny * (1 + norms)
    most = float(head.xp.finfo(own).max)
    # a log-sum-exp at the end of the range may have been clipped
    error = np.where((size < most) & ~np.isnan(error), error, np.inf)
    return np.where(empty, 0.0, error)
