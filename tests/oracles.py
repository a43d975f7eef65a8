"""Answers from the definition, in NumPy alone; no library code is imported."""

import math

import numpy as np

_BLOCK = 2048


def attention(
    query, key, value, *, scale=None, is_causal=False, key_mask=None, dtype=np.float64
):
    """Softmax attention of any batch, and the log-sum-exp of each row's logits.

    A row that sees no key gets zeros and minus infinity.
    """
    query, key, value = (np.asarray(x).astype(dtype) for x in (query, key, value))
    n, m = query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lead = np.broadcast_shapes(
        *(x.shape[:-2] for x in (query, key, value)),
        () if key_mask is None else np.shape(key_mask)[:-1],
    )
    out = np.empty((*lead, n, value.shape[-1]), dtype)
    normalizer = np.empty((*lead, n), dtype)
    for start in range(0, n, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n))
        logits = dtype(scale) * (query[..., rows, :] @ np.swapaxes(key, -1, -2))
        seen = prefix_lengths(rows, m, is_causal, key_mask)
        logits = np.where(seen, logits, -np.inf)
        out[..., rows, :], normalizer[..., rows] = softmax_mean(logits, value)
    return out, normalizer


def prefix_lengths(rows, m, is_causal=False, key_mask=None):
    """Which keys the given rows see: boolean, ``(..., len(rows), m)``."""
    seen = np.ones((len(rows), m), bool)
    if is_causal:
        seen = np.arange(m) <= rows[:, None]
    return seen if key_mask is None else seen & np.asarray(key_mask)[..., None, :]


def softmax_mean(logits, value):
    """Softmax of the last axis times ``value``, and the log-sum-exp."""
    peak = logits.max(axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    safe = np.where(total == 0, 1, total)
    normalizer = np.where(total == 0, -np.inf, np.log(safe) + peak)
    return weights @ value / safe, normalizer[..., 0]


def polynomial(coefficients, x):
    """Horner's rule in long double: ``sum_g c_g x^g``."""
    total = np.zeros_like(np.asarray(x, np.longdouble))
    for c in np.asarray(coefficients)[::-1]:
        total = total * x + np.longdouble(c)
    return total


def relative_error_of_exp(coefficients, x):
    """``p(x) exp(-x) - 1`` in long double."""
    x = np.asarray(x, np.longdouble)
    return polynomial(coefficients, x) * np.exp(-x) - 1


def exponents(d, degree):
    """Every multi-index of ``d`` coordinates up to ``degree``, as a set of tuples."""
    if d == 0:
        return {()}
    return {
        (first, *rest)
        for first in range(degree + 1)
        for rest in exponents(d - 1, degree - first)
    }


def multinomial(alpha):
    """``|alpha|! / alpha!``."""
    bottom = math.prod(math.factorial(a) for a in alpha)
    return math.factorial(sum(alpha)) // bottom


def frobenius_error(answer, truth):
    """``||answer - truth||_F / ||truth||_F`` over the last two axes."""
    off = np.asarray(answer, np.float64) - truth
    return np.linalg.norm(off, axis=(-2, -1)) / np.linalg.norm(truth, axis=(-2, -1))


def largest_error(answer, truth):
    """Largest absolute difference over the last two axes."""
    off = np.asarray(answer).astype(truth.dtype) - truth
    return np.abs(off).max(axis=(-2, -1))


def error_in(norm, answer, truth):
    """Error of an answer in the norm that a certificate names."""
    measure = {"relative-frobenius": frobenius_error, "max": largest_error}[norm]
    return measure(answer, truth)


def tensor_attention(
    query, keys, values, *, scale=None, is_causal=False, key_mask=None, window=None
):
    """Softmax over all tuples of keys of one head, and the log-sum-exps.

    ``window`` has one length for each factor: the last so many keys up to the row's.
    """
    query, *keys = (np.asarray(x, np.float64) for x in (query, *keys))
    n, d = query.shape
    lengths = [len(key) for key in keys]
    product, value = np.ones((1, d)), np.ones((1, np.shape(values[0])[1]))
    seen = np.ones((n, 1), bool)
    for s, (key, m) in enumerate(zip(keys, lengths, strict=True)):
        mask = None if key_mask is None else key_mask[s]
        own = prefix_lengths(np.arange(n), m, is_causal, mask)
        if window is not None:
            own = own & (np.arange(m) > np.arange(n)[:, None] - window[s])
        product = (product[:, None] * key).reshape(-1, d)
        other = np.asarray(values[s], np.float64)
        value = (value[:, None] * other).reshape(-1, other.shape[1])
        seen = (seen[:, :, None] & own[:, None, :]).reshape(n, -1)
    logits = (1 / d if scale is None else scale) * (query @ product.T)
    return softmax_mean(np.where(seen, logits, -np.inf), value)
