"""Answers over some of the keys, merged by their log-sum-exps."""

import numpy as np

from sketching._lib.arrays import Array, array_namespace

Answer = tuple[Array, Array]


def merge_partials(one: Answer, other: Answer) -> Answer:
    """Merge answers ``(n, p)`` and log-sum-exps ``(n,)`` over disjoint keys."""
    xp = array_namespace(one[0])
    left, right = one[1], other[1]
    peak = xp.where(left > right, left, right)
    # where neither has seen a key
    base = xp.where(peak == -xp.inf, xp.zeros_like(peak), peak)
    left, right = xp.exp(left - base), xp.exp(right - base)
    total = left + right
    safe = xp.where(total > 0, total, xp.ones_like(total))
    value = (left / safe)[:, None] * one[0] + (right / safe)[:, None] * other[0]
    return value, xp.where(total > 0, xp.log(safe) + base, peak)


def empty_partial(n: int, p: int) -> Answer:
    """What queries are told by no keys, on the host."""
    return np.zeros((n, p)), np.full(n, -np.inf)
