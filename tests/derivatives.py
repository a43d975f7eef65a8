"""Derivatives of attention from the definition, in NumPy alone."""

import numpy as np

from tests import oracles


def problem(n=12, m=15, d=4, p=3, seed=0, dtype=np.float64, spread=1.0, lead=()):
    """Query, key, value, and a derivative by the output."""
    rng = np.random.default_rng(seed)
    shapes = (*lead, n, d), (*lead, m, d), (*lead, m, p), (*lead, n, p)
    query, key, value, grad = (rng.standard_normal(x) for x in shapes)
    return [x.astype(dtype) for x in (spread * query, spread * key, value, grad)]


def softmax_vjp(query, key, value, grad, *, scale=None, is_causal=False, key_mask=None):
    """Derivatives from the definition, by the Jacobian of softmax, in float64."""
    query, key, value, grad = (
        np.asarray(x).astype(float) for x in (query, key, value, grad)
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * query @ np.swapaxes(key, -1, -2)
    rows, m = np.arange(query.shape[-2]), key.shape[-2]
    seen = oracles.prefix_lengths(rows, m, is_causal, key_mask)
    logits = np.where(seen, logits, -np.inf)
    weights, _ = oracles.softmax_mean(logits, np.eye(m))
    change = grad @ np.swapaxes(value, -1, -2)
    slope = weights * (change - np.sum(weights * change, axis=-1, keepdims=True))
    whole = (
        scale * slope @ key,
        scale * np.swapaxes(slope, -1, -2) @ query,
        np.swapaxes(weights, -1, -2) @ grad,
    )
    return tuple(
        unbroadcast(x, y.shape) for x, y in zip(whole, (query, key, value), strict=True)
    )


def unbroadcast(x, shape):
    """Sum over the dimensions that broadcasting made."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    ones = tuple(i for i, size in enumerate(shape) if size < x.shape[i])
    return x.sum(axis=ones, keepdims=True)


def slack_of(query, key, value, grad, scale=None):
    """Largest difference of derivatives between two orders of summation.

    The error of a weight is the rounding of its logit, of ``dS`` that of a sum over
    values; every entry of the answers adds up rows, or keys, of weight one.
    """
    eps = float(np.finfo(query.dtype).eps)
    d, (m, p) = query.shape[-1], value.shape[-2:]
    scale = d**-0.5 if scale is None else scale
    norm = [np.linalg.norm(x.astype(float), axis=-1).max() for x in (query, key)]
    logit = abs(scale) * norm[0] * norm[1]
    peaks = [float(np.abs(x).max()) for x in (query, key, grad, value)]
    change = 2 * p * peaks[2] * peaks[3]
    sides = abs(scale) * max(peaks[0] * query.shape[-2], peaks[1])
    entry = max(change * sides, peaks[2] * query.shape[-2])
    return 2 * eps * ((d + 4) * logit + p + min(m, 1024) + 40) * entry
