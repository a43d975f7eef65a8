"""Logits and values of all tuples of keys, one key of each factor, in C order."""

import numpy as np

from sketching._lib.arrays import Array


def logits_of(query: Array, keys: tuple[Array, ...]) -> Array:
    """Inner products of every query with every tuple, ``(n, tuples)``."""
    left, d = query, query.shape[1]
    # the last factor is multiplied, those before it are expanded
    for key in keys[:-1]:
        left = (left[:, None, :] * key).reshape(-1, d)
    return (left @ keys[-1].T).reshape(len(query), -1)


def products_of(values: tuple[Array, ...]) -> Array:
    """The product of the values of every tuple, ``(tuples,)``."""
    product = values[0]
    for value in values[1:]:
        product = np.outer(product, value).ravel()
    return product
