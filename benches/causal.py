"""Causal attention against torch's own with is_causal=True."""

import numpy as np

import fastattn
from benches.cases import CASES, heads_of
from benches.measure import faster, sdpa, spread

_BLOCK = 512
# rows that a head of a file is repeated to, at least
_LEAST = 8192


def causal(*, quick, data):
    """Causal heads: realised error, method, times faster than torch with a mask."""
    sizes, rows = (8192,) if quick else (8192, 32768), []
    for n in sizes:
        case = CASES["bounded"]
        arrays = case.inputs(n, np.random.default_rng(0))
        exact = {"method": fastattn.Exact()}
        rows.append(_row(f"bounded@{n}", arrays, case.scale, case.tol, quick, **exact))
        rows.append(_row(f"bounded@{n}", arrays, case.scale, case.tol, quick))
    for path in data:
        for name, *arrays, scale in heads_of(path):
            times = -(-_LEAST // len(arrays[0]))
            repeated = [np.tile(x, (times, 1)) for x in arrays]
            rows.append(_row(name, repeated, scale, 1e-1, quick))
    return rows


def _row(name, arrays, scale, tol, quick, **options):
    """One line of the table; the answer must keep the tolerance."""

    def call():
        return fastattn.approximate(
            *arrays, scale=scale, tol=tol, is_causal=True, rng=0, **options
        )

    answer = call()
    error = _error(answer.value, *arrays, scale)
    assert error <= tol
    theirs = sdpa(*arrays, scale=scale, is_causal=True)
    ratio = faster(call, theirs, pairs=3 if quick else 5)
    return {
        "head": name,
        "n": len(arrays[0]),
        "tol": tol,
        "method": str(answer.plan.method),
        "realised": error,
        "certified": answer.certificate.error,
        **spread("times faster", ratio),
    }


def _error(answer, query, key, value, scale):
    """Relative error over all rows, from the definition in float64."""
    key, value = key.astype(np.float64), value.astype(np.float64)
    off = size = 0.0
    for start in range(0, len(query), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(query)))
        seen = min(rows[-1] + 1, len(key))
        logits = scale * query[rows].astype(np.float64) @ key[:seen].T
        logits[np.arange(seen) > rows[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        truth = weights @ value[:seen] / weights.sum(axis=1, keepdims=True)
        off += float(np.sum((answer[rows] - truth) ** 2))
        size += float(np.sum(truth**2))
    return (off / size) ** 0.5
