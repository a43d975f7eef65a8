"""Tasks that softmax attention solves and linear attention does not.

The two-class data and models are a reconstruction of those of Deng, Song, Yuan and
Zhou, Why Softmax Attention Outperforms Linear Attention, arXiv 2310.11685: their
text was recalled, not read, and the constant ``C`` was found by experiment.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import fastattn

# queries of the recall task
_ASKED = 256
# factors of the logits: every method gets the best of them
_SCALES = (1.0, 4.0, 16.0, 64.0)


@dataclass(frozen=True)
class Setting:
    """Data of both classes and a model.

    ``n`` tokens of ``d`` entries, one of which stands out by ``a0`` in class 0 and by
    ``a1`` in class 1; ``b`` is the size of the entries that identify tokens, ``c`` of
    the one that all share. The model has logits ``C A A^T`` and ``m`` random signs.
    """

    n: int = 1024
    d: int = 34
    m: int = 20
    a0: float = 0.05
    a1: float = 0.7
    b: float = 0.1
    c: float = 0.9
    C: float = 2.0


# parameters of a sweep and their values; b and c add up to one
SWEEPS = {
    "C": [{"C": x} for x in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)],
    "m": [{"m": x} for x in (1, 2, 4, 8, 16, 32)],
    "a1": [{"a1": x} for x in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)],
    "c": [{"c": x, "b": 1 - x} for x in (0.1, 0.3, 0.5, 0.7, 0.9)],
    "d": [{"d": x} for x in (10, 18, 34, 66, 130, 258)],
    "n": [{"n": x} for x in (256, 512, 1024, 2048)],
}


def exact(tokens, scale):
    """Softmax self-attention of tokens."""
    method = fastattn.Exact()
    return fastattn.attention(
        tokens, tokens, tokens, scale=scale, method=method, tol=1e-9, rng=0
    )


def by_map(tokens, scale, *, feature_map):
    """Linear self-attention of tokens."""
    return fastattn.linear_attention(
        tokens, tokens, tokens, scale=scale, feature_map=feature_map
    )


MODELS = {
    "softmax": exact,
    "linear": partial(by_map, feature_map=fastattn.Identity()),
    "elu+1": partial(by_map, feature_map=fastattn.EluPlusOne()),
}


def softmax_vs_linear(*, quick):
    """Share of draws in which each model distinguishes the two classes, by sweeps."""
    rows = []
    for sweep, changes in {"centre": [{}], **SWEEPS}.items():
        draws = 5 if quick else 60 if sweep in SWEEPS else 500
        for change in changes:
            setting = replace(Setting(), **change)
            found = success(setting, draws, np.random.default_rng([3, len(rows)]))
            at = float(getattr(setting, sweep)) if change else math.nan
            rows.append({"sweep": sweep, "at": at, "draws": draws, **found})
    centre = rows[0]
    assert centre["softmax"] > 0.9
    assert centre["linear"] == 0
    return rows


def success(setting, draws, rng):
    """Share of draws with ``F(D_0) = 0`` and ``F(D_1) > 0``, for each model."""
    count = dict.fromkeys(MODELS, 0)
    for stream in rng.spawn(draws):
        low, high = (tokens(setting, a, stream) for a in (setting.a0, setting.a1))
        signs = stream.choice([-1.0, 1.0], (setting.m, setting.d))
        threshold = (setting.c + 0.1) * math.sqrt(math.log(len(low)))
        for name, model in MODELS.items():
            first, second = (
                activation(model(x, setting.C), signs, threshold) for x in (low, high)
            )
            count[name] += first == 0 and second > 0
    return {name: found / draws for name, found in count.items()}


def tokens(setting, a, rng):
    """Tokens of one class: one that stands out, the identity many times, a constant."""
    width = setting.d - 2
    n = setting.n // width * width
    root = math.sqrt(math.log(n))
    found = np.zeros((n, setting.d))
    found[rng.integers(n), 0] = a * root
    found[np.arange(n), 1 + np.arange(n) % width] = setting.b * root
    found[:, -1] = setting.c * root
    return found


def activation(output, signs, threshold):
    """Sum of the second layer: products with random signs above a threshold."""
    z = output @ signs.T
    return float(np.sum(z[z > threshold]))


def recall_methods():
    """Yield maps and the numbers that their states store for each value column."""
    yield "softmax", None, None
    yield "linear", fastattn.Identity(), 64
    yield "elu+1", fastattn.EluPlusOne(), 64
    yield "relu", fastattn.Relu(), 64
    for size in (64, 512, 4096):
        name = f"random features, m={size}"
        yield name, fastattn.RandomFeatures(size), size
    for degree in (2, 4):
        feature_map = fastattn.PolySketch(degree, 64)
        yield f"polynomial of degree {degree}", feature_map, 64 * 65 // 2
    yield "Taylor", fastattn.Taylor(), 1 + 64 + 64 * 65 // 2


def recall(*, quick):
    """Share of values recalled for their keys, by number of pairs over state."""
    counts = (16, 64, 256, 1024) if quick else (16, 64, 256, 1024, 4096, 16384)
    rows = []
    for pairs in counts:
        for name, feature_map, state in recall_methods():
            found = {scale: recalled(pairs, feature_map, scale) for scale in _SCALES}
            best = max(found, key=found.get)
            rows.append(
                {
                    "method": name,
                    "pairs": pairs,
                    "state": state or pairs,
                    "pairs over state": pairs / (state or pairs),
                    "accuracy": found[best],
                    "scale": best,
                }
            )
    return rows


def recalled(pairs, feature_map, scale, d=64):
    """Share of random keys for which the nearest value is their own."""
    rng = np.random.default_rng(5)
    key = rng.standard_normal((pairs, d)).astype(np.float32)
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    value = rng.choice(np.array([-1, 1], np.float32), (pairs, d))
    asked = rng.permutation(pairs)[:_ASKED]
    try:
        if feature_map is None:
            answer = fastattn.attention(
                key[asked], key, value, scale=scale, method=fastattn.Exact(), rng=0
            )
        else:
            answer = fastattn.linear_attention(
                key[asked], key, value, scale=scale, feature_map=feature_map
            )
    except fastattn.RefusalError:
        return 0.0
    nearest = np.argmax((answer - value.mean(axis=0)) @ value.T, axis=1)
    return float(np.mean(nearest == asked))
