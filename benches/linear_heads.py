"""Linear attention on real heads: the error of each map, and statistics of weights."""

import numpy as np

import fastattn
from benches.heads import real_heads

# rows that errors and weights are measured on
_ROWS = 1024


def linear_heads(*, quick, data):
    """Error of linear attentions against softmax, entropy and rank of the weights."""
    return [
        _row(head) for head in real_heads(data, each=1 if quick else None) if len(head)
    ]


def _maps(n):
    yield "linear", fastattn.Identity()
    yield "elu+1", fastattn.EluPlusOne()
    yield "relu", fastattn.Relu()
    yield "cosformer", fastattn.Cosformer(n)
    yield "Taylor", fastattn.Taylor()
    for size in (256, 1024):
        yield f"random features, m={size}", fastattn.RandomFeatures(size)
    yield "TensorSketch", fastattn.TensorSketch(2, 1024, constant=1.0)


def _row(head):
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(head), min(len(head), _ROWS), replace=False))
    weights = softmax(head.query[rows], head.key, head.scale)
    truth = weights @ head.value.astype(np.float64)
    found = {
        "head": head.name,
        "n": len(head),
        "keys of a row": float(np.exp(entropy(weights))),
        "rank at 10 %": numerical_rank(weights, 0.1),
        "mean of the values": _error(
            np.broadcast_to(head.value.mean(0), truth.shape), truth
        ),
    }
    for name, feature_map in _maps(len(head)):
        try:
            answer = fastattn.linear_attention(*head.arrays, feature_map=feature_map)
            found[name] = _error(answer[rows], truth)
        except fastattn.RefusalError:
            found[name] = float("nan")
    return found


def softmax(query, key, scale):
    """All weights of some rows, in float64."""
    logits = scale * query.astype(np.float64) @ key.T.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def entropy(weights):
    """Mean entropy of rows in nats: its exponential is a number of keys."""
    logs = np.log(np.where(weights > 0, weights, 1.0))
    return -float(np.mean(np.sum(weights * logs, axis=1)))


def numerical_rank(weights, error):
    """Least rank of a matrix with this relative Frobenius error."""
    squares = np.maximum(np.linalg.eigvalsh(weights @ weights.T)[::-1], 0)
    left = 1 - np.cumsum(squares) / np.sum(squares)
    return int(np.argmax(left <= error**2)) + 1


def _error(answer, truth):
    return float(np.linalg.norm(answer - truth) / np.linalg.norm(truth))
