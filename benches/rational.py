"""Softmax attention with exact logits, for inputs of any size; no code of the library.

Floating-point numbers are integers times a power of two. So logits, and their
differences from the largest, are computed without rounding, and only then rounded to
64 bits.
"""

import itertools

import numpy as np

LONG = np.longdouble
_WORD = 1 << 32


def attention(query, key, value, scale, seen):
    """Means ``(n, p)`` and log-sum-exps ``(n,)`` in long double.

    ``seen`` is boolean, ``(n, m)``; a row without keys gets zeros and minus infinity.
    """
    sides, powers = _aligned((query, key, np.array([[scale]])))
    logits = (sides[0] @ sides[1].T) * sides[2][0, 0]
    return _softmax(logits, sum(powers), value.astype(LONG), seen)


def tensor_attention(query, keys, values, scale, seen, form="product"):
    """Attention over all tuples of keys, in C order, of which a row sees some.

    ``form`` is that of the scores: sums of the products of all sides, or the sums over
    pairs of neighbours that are a "path", or in a ring a "cycle".
    """
    number = [range(len(x)) for x in keys]
    places = np.array(list(itertools.product(*number))).T
    product = np.prod(
        [x.astype(LONG)[at] for x, at in zip(values, places, strict=True)], axis=0
    )
    (query, *keys, factor), powers = _aligned((query, *keys, np.array([[scale]])))
    sides = [query[:, None, :]]
    sides += [x[at][None, :, :] for x, at in zip(keys, places, strict=True)]
    power = sum(powers)
    if form == "product":
        terms = sides[0]
        for side in sides[1:]:
            terms = terms * side
    else:
        ends = [(sides[-1], sides[0])] if form == "cycle" else []
        low = min(powers[:-1])
        # each side in one unit, so that sums of pairs have one
        sides = [
            side * (1 << (own - low))
            for side, own in zip(sides, powers[:-1], strict=True)
        ]
        ends = [(sides[-1], sides[0])] if form == "cycle" else []
        terms = sum(x * y for x, y in [*itertools.pairwise(sides), *ends])
        power = 2 * low + powers[-1]
    logits = terms.sum(axis=2) * factor[0, 0]
    return _softmax(logits, power, product, seen)


def _softmax(logits, power, value, seen):
    """Answer from integers times ``2 ** power``."""
    out = np.zeros((len(logits), value.shape[1]), LONG)
    normalizer = np.full(len(logits), -np.inf, LONG)
    for i, row in enumerate(logits):
        own = row[seen[i]]
        if not len(own):
            continue
        top = max(own)
        below = np.array([_rounded(top - x, power) for x in own])
        weights = np.exp(-below)
        total = weights.sum()
        out[i] = weights @ value[seen[i]] / total
        normalizer[i] = _rounded(top, power) + np.log(total)
    return out, normalizer


def _aligned(arrays):
    """Each array as integers times one power of two."""
    found = [_integers(np.asarray(x, np.float64)) for x in arrays]
    return [x for x, _ in found], [power for _, power in found]


def _integers(x):
    mantissa, exponent = np.frexp(x)
    exponent = exponent.astype(np.int64) - 53
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    power = int(exponent[whole != 0].min(initial=0 if not whole.any() else 1 << 20))
    found = np.empty(x.shape, object)
    for place in np.ndindex(*x.shape):
        number = int(whole[place])
        found[place] = number << (int(exponent[place]) - power) if number else 0
    return found, power


def _rounded(number, power):
    """``number * 2 ** power`` in long double, for an integer of any size."""
    number = int(number)
    cut = max(number.bit_length() - 64, 0)
    high, low = divmod(abs(number) >> cut, _WORD)
    size = np.ldexp(LONG(high) * _WORD + LONG(low), cut + power)
    return size if number >= 0 else -size
