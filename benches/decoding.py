"""Decoding with a prepared head: one key in, one query out, over and over."""

import statistics

import numpy as np

import fastattn
from benches.measure import exact_rows, seconds

# steps of one measurement: the tail is folded into the sums twice
_STEPS = 512
_SCALE, _STD, _TOL = 64**-0.5, 0.3, 3e-2


def decoding(*, quick):
    """Time of a step after few and after many tokens, and the bytes of the state."""
    rng = np.random.default_rng(0)
    few, many = 10_000, 100_000 if quick else 1_000_000
    query = _rows(rng, 4096)
    key, value = _rows(rng, many), _rows(rng, many)
    first = fastattn.prepare(
        key[:few], value[:few], queries=query[:2048], scale=_SCALE, tol=_TOL, rng=0
    )
    last = first.empty().insert(key, value)
    found = last.query(query[2048:])
    # few rows at once: their logits take 8 MB each
    some = np.split(np.arange(2048, 2048 + 128), 8)
    truth = np.concatenate(
        [exact_rows(query, key, value, rows, scale=_SCALE) for rows in some]
    )
    error = float(np.linalg.norm(found.value[:128] - truth) / np.linalg.norm(truth))
    assert found.certificate.error <= _TOL
    assert error <= 1.1 * _TOL
    nbytes = last.nbytes
    steps = [_stepper(x, query) for x in (first, last)]
    for step in steps:
        step()
    times = [[seconds(step) for step in steps] for _ in range(5 if quick else 11)]
    ratios = [late / early for early, late in times]
    return [
        {
            "tokens": many,
            "method": str(last.plan.method),
            "tol": _TOL,
            "certified": found.certificate.error,
            "error": error,
            f"step over that at {few}": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "bytes of keys and values": key.nbytes + value.nbytes,
            "bytes of the state": nbytes,
            "times smaller": (key.nbytes + value.nbytes) / nbytes,
        }
    ]


def _rows(rng, n):
    return np.float32(_STD) * rng.standard_normal((n, 64), dtype=np.float32)


def _stepper(prepared, query):
    """Many steps of decoding: a call without arguments."""
    rng = np.random.default_rng(1)
    key, value = _rows(rng, _STEPS), _rows(rng, _STEPS)

    def call():
        for i in range(_STEPS):
            prepared.insert(key[i : i + 1], value[i : i + 1])
            prepared.query(query[i : i + 1])

    return call
