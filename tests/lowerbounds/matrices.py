"""Factors of random entries, and their softmax matrices from the definition."""

import numpy as np

from lowerbounds._factored import Factors


def factors(order, n, d, seed=0):
    """Factors of random entries, with random signs for values."""
    rng = np.random.default_rng(seed)
    query, *keys = rng.uniform(-1, 1, (order, n, d))
    values = tuple(rng.choice([-1.0, 1.0], n) for _ in keys)
    return Factors(query, tuple(keys), values, 1 / d)


def softmax_matrix(given, exponent):
    """The softmax matrix from the definition, (n, tuples)."""
    letters = "abc"[: len(given.keys)]
    formula = "nd," + ",".join(f"{x}d" for x in letters) + "->n" + letters
    logits = given.scale * exponent * np.einsum(formula, given.query, *given.keys)
    logits = logits.reshape(len(given.query), -1)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
