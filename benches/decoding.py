"""Decoding with a prepared head: one key in, one query out, over and over."""

import numpy as np

import fastattn
from benches.heads import Head, file_heads
from benches.measure import (
    exact_rows,
    faster,
    median_of,
    sdpa,
    seconds,
    spread,
    torch_or_none,
)
from fastattn._ops.softmax import attend

# steps of one measurement: the tail is merged into the state twice
_STEPS = 512
_SCALE, _STD, _TOL = 64**-0.5, 0.3, 3e-2
# single queries of one measurement of clusters, rows that errors are measured on, and
# keys of the heads that are measured
_SINGLE, _CHECKED, _KEYS = 64, 256, 32768


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
    times = [[seconds(step) for step in steps] for _ in range(3 if quick else 11)]
    ratios = [late / early for early, late in times]
    return [
        {
            "tokens": many,
            "method": str(last.plan.method),
            "tol": _TOL,
            "certified": found.certificate.error,
            "error": error,
            **spread(f"step over that at {few}", median_of(ratios)),
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


def decoding_clusters(*, quick, data):
    """Single queries by clusters over exact ones, and what eightfold keys cost."""
    rows = []
    heads = [_clustered(), *(x for x in file_heads(data) if len(x) >= _KEYS)]
    for head in heads:
        for tol in (0.1,) if quick else (0.05, 0.1):
            few = _single(head, tol, quick)
            rows.append(few[0])
            if not quick:
                many = _single(_repeated(head), tol, quick)
                pairs = [(seconds(many[1]), seconds(few[1])) for _ in range(11)]
                growth = median_of([x / y for x, y in pairs])
                rows.append(many[0] | spread("time over that at an eighth", growth))
    return rows


def _single(head, tol, quick):
    """Measure single queries over one head: a row of the table, and the call."""
    order = np.random.default_rng(0).permutation(len(head.query))
    given, asked = (head.query[order[x]] for x in (slice(4096), slice(4096, None)))
    asked = np.ascontiguousarray(asked[:_CHECKED])
    method = fastattn.Multipole()
    prepared = fastattn.prepare(
        head.key, head.value, queries=given, scale=head.scale, tol=tol, method=method,
        rng=0,
    )  # fmt: skip

    def call():
        return [prepared.query(asked[i : i + 1]).value for i in range(_SINGLE)]

    def exact():
        for i in range(_SINGLE):
            attend(
                asked[None, i : i + 1], head.key[None], head.value[None],
                scale=head.scale, prefix_lengths=None,
            )  # fmt: skip

    answers = [prepared.query(asked[i : i + 1]) for i in range(_CHECKED)]
    value, answer = np.concatenate([x.value for x in answers]), answers[0]
    blocks = np.split(np.arange(_CHECKED), 8)
    truth = np.concatenate(
        [exact_rows(asked, head.key, head.value, x, scale=head.scale) for x in blocks]
    )
    error = float(np.linalg.norm(value - truth) / np.linalg.norm(truth))
    # a few rows are only a sample of those that the certificate covers
    assert error <= 1.2 * answer.certificate.error <= 1.2 * tol
    pairs = 3 if quick else 11
    return {
        "head": head.name,
        "keys": len(head.key),
        "tol": tol,
        "certified": answer.certificate.error,
        "realised": error,
        "by clusters": "held-out queries" in answer.certificate.source,
        **spread("times faster than the exact op", faster(call, exact, pairs=pairs)),
        **_over_sdpa(call, head, asked, pairs),
    }, call


def _over_sdpa(call, head, asked, pairs):
    """Times faster than torch over the same queries, one at a time."""
    if torch_or_none() is None:
        return {"times faster than SDPA": "torch is not installed"}
    every = [
        sdpa(asked[i : i + 1], head.key, head.value, scale=head.scale)
        for i in range(_SINGLE)
    ]
    ratio = faster(call, lambda: [one() for one in every], pairs=pairs)
    return spread("times faster than SDPA", ratio)


def _clustered():
    """A head whose keys are clustered, with queries near the centres."""
    rng, d = np.random.default_rng(0), 64
    centre, mean = rng.standard_normal((2, 512, d), dtype=np.float32)
    label, wanted = rng.integers(512, size=(2, _KEYS))
    noise = 0.5 * rng.standard_normal((3, _KEYS, d), dtype=np.float32)
    query, key, value = (x + y for x, y in zip(
        (centre[wanted], centre[label], mean[label]), noise, strict=True
    ))  # fmt: skip
    return Head("clustered", query, key, value, d**-0.5)


def _repeated(head):
    """The head with its keys and values eight times, each copy moved a little."""
    rng = np.random.default_rng(1)
    key, value = (
        np.concatenate(
            [
                x + 0.1 * x.std() * rng.standard_normal(x.shape, x.dtype)
                for _ in range(8)
            ]
        )
        for x in (head.key, head.value)
    )
    return Head(f"{head.name} x 8", head.query, key, value, head.scale)
