"""Linear attention from the definition: all weights, one by one; no library code."""

import itertools

import numpy as np

from tests import oracles


def linear_attention(
    query,
    key,
    value,
    kernel,
    *,
    is_causal=False,
    key_mask=None,
    decay=None,
    normalize=True,
    offset=0.0,
):
    """Weighted means, or sums, of values; ``kernel(query, key)`` gives the weights."""
    query, key, value = (np.asarray(x).astype(float) for x in (query, key, value))
    n, m = query.shape[-2], key.shape[-2]
    weights = kernel(query, key)
    seen = oracles.prefix_lengths(np.arange(n), m, is_causal, key_mask)
    weights = np.where(seen, weights, 0.0)
    if decay is not None:
        gap = np.maximum(np.arange(n)[:, None] - np.arange(m), 0)
        weights = weights * np.asarray(decay, float)[..., None, None] ** gap
    sums = weights @ value
    if not normalize:
        return sums
    total = weights.sum(axis=-1, keepdims=True) + offset
    return np.where(total == 0, 0.0, sums / np.where(total == 0, 1.0, total))


def products(features):
    """Kernel of a feature map of one argument."""
    return lambda query, key: features(query) @ np.swapaxes(features(key), -1, -2)


def logits(query, key):
    return query @ np.swapaxes(key, -1, -2)


def elu_plus_one(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1


def relu(x):
    return np.maximum(x, 0)


def cosformer(length):
    def kernel(query, key):
        gap = np.arange(query.shape[-2])[:, None] - np.arange(key.shape[-2])
        return logits(relu(query), relu(key)) * np.cos(np.pi * gap / 2 / length)

    return kernel


def taylor(query, key):
    t = logits(query, key)
    return 1 + t + t**2 / 2


def random_features(directions, kind):
    """Kernel of the given directions, (d, size), with no factor taken out."""

    def features(x):
        along = x @ directions
        half = np.sum(x**2, axis=-1, keepdims=True) / 2
        size = directions.shape[1]
        if kind == "positive":
            return np.exp(along - half) / np.sqrt(size)
        if kind == "hyperbolic":
            both = np.concatenate([along, -along], axis=-1)
            return np.exp(both - half) / np.sqrt(2 * size)
        both = np.concatenate([np.cos(along), np.sin(along)], axis=-1)
        return both * np.exp(half) / np.sqrt(size)

    return products(features)


def random_maclaurin(factor, *signs):
    """Kernel of products of signs; the first features have most of them."""

    def features(x):
        columns = []
        for j, f in enumerate(factor):
            product = np.full(x.shape[:-1], f)
            for omega in signs:
                if j < omega.shape[1]:
                    product = product * (x @ omega[:, j])
            columns.append(product)
        return np.stack(columns, axis=-1)

    return products(features)


def tensor_sketch(matrices, constant=0.0):
    """Kernel of convolved count sketches, by the sum over all tuples of places."""

    def features(x):
        if constant:
            last = np.full((*x.shape[:-1], 1), np.sqrt(constant))
            x = np.concatenate([x, last], axis=-1)
        sketches = [x @ matrix for matrix in matrices]
        size = matrices[0].shape[1]
        out = np.zeros((*x.shape[:-1], size))
        for places in itertools.product(range(size), repeat=len(matrices)):
            term = 1.0
            for sketch, place in zip(sketches, places, strict=True):
                term = term * sketch[..., place]
            out[..., sum(places) % size] += term
        return out

    return products(features)


def poly_sketch(matrices):
    """Kernel of squared sketches; the matrices hold the factor of their size."""

    def sketch(x):
        for left, right in zip(matrices[::2], matrices[1::2], strict=True):
            x = (x @ left) * (x @ right)
        return x

    return lambda query, key: logits(sketch(query), sketch(key)) ** 2
