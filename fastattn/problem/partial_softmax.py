"""Softmax attention over some of the keys, merged by log-sum-exps.

As in FlashAttention (Dao et al., arXiv 2205.14135) and ring attention.
"""

import numpy as np

from sketching._lib.arrays import Array, array_namespace

Answer = tuple[Array, Array]


def merge_partials(one: Answer, other: Answer) -> Answer:
    r"""Merge outputs ``(n, p)`` and log-sum-exps ``(n,)`` over disjoint keys.

    With log-sum-exps :math:`l_1, l_2` the output is :math:`(e^{l_1} o_1 + e^{l_2} o_2)
    / (e^{l_1} + e^{l_2})`.
    """
    xp = array_namespace(one[0])
    left, right = one[1], other[1]
    peak = xp.where(left > right, left, right)
    # rows that attend to no key at all
    base = xp.where(peak == -xp.inf, xp.zeros_like(peak), peak)
    left, right = xp.exp(left - base), xp.exp(right - base)
    total = left + right
    safe = xp.where(total > 0, total, xp.ones_like(total))
    value = (left / safe)[:, None] * one[0] + (right / safe)[:, None] * other[0]
    return value, xp.where(total > 0, xp.log(safe) + base, peak)


def empty_partial(n: int, p: int) -> Answer:
    """The output and log-sum-exps over no keys, on the host."""
    return np.zeros((n, p)), np.full(n, -np.inf)
