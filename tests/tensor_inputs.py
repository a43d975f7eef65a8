"""Inputs of tensor attention that several test files draw."""

import numpy as np


def problem(lengths=(13, 9), n=11, d=5, p=3, seed=0, dtype=np.float64, size=1.0):
    """Query, keys and values of factors of the given lengths."""
    rng = np.random.default_rng(seed)
    query, *keys = (
        rng.uniform(-size, size, (m, d)).astype(dtype) for m in (n, *lengths)
    )
    values = tuple(rng.uniform(-1, 2, (m, p)).astype(dtype) for m in lengths)
    return query, tuple(keys), values
