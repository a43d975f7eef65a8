"""All heads of a file in one call of the default method, against torch."""

from itertools import groupby

import numpy as np

import fastattn
from benches.heads import Head, file_heads, real_heads
from benches.measure import faster, sdpa


def sharp(*, quick, data):
    """Files of peaked heads at tol .05 and .01: times faster than torch by seed."""
    return [cell(heads, tol, quick) for heads in files(data) for tol in (5e-2, 1e-2)]


def diffuse(*, quick, data):
    """Files of diffuse heads at tol .1 and .05: times faster than torch by seed."""
    return [cell(heads, tol, quick) for heads in files(data) for tol in (1e-1, 5e-2)]


def files(data) -> list[list[Head]]:
    """Heads of each file, or of each packaged sample: of one size and one scale."""
    heads = file_heads(data) if data else real_heads([])
    found = groupby(heads, key=lambda head: head.name.partition("[")[0])
    return [list(heads) for _, heads in found]


def cell(heads: list[Head], tol: float, quick: bool) -> dict:
    """Measure one file at one tolerance: each seed is timed against torch in turn."""
    arrays = [np.stack(x) for x in zip(*(h.arrays for h in heads), strict=True)]
    theirs = sdpa(*(x[None] for x in arrays), scale=heads[0].scale)
    ratios, worst, methods = [], [], []
    for seed in range(1 if quick else 5):
        answer, ours = approximation(arrays, heads[0].scale, tol, seed)
        errors = [h.error(x) for h, x in zip(heads, answer.value, strict=True)]
        worst.append(max(errors))
        methods.append(kinds(answer.plan, len(heads)))
        ratios.append(faster(ours, theirs, pairs=1).median)
    return {
        "file": heads[0].name.partition("[")[0],
        "n": len(heads[0]),
        "heads": len(heads),
        "tol": tol,
        "times faster than torch": float(np.median(ratios)),
        "least": min(ratios),
        "most": max(ratios),
        "worst realised": max(worst),
        "within": sum(error <= tol for error in worst),
        "seeds": len(worst),
        "methods": "; ".join(dict.fromkeys(methods)),
    }


def approximation(arrays, scale: float, tol: float, seed: int) -> tuple:
    """Return an answer to all heads, and the call that made it."""

    def call() -> fastattn.Approximation:
        return fastattn.approximate(*arrays, scale=scale, tol=tol, rng=seed)

    return call(), call


def kinds(plan, count: int) -> str:
    """Name the method of each head."""
    plans = np.broadcast_to(np.asarray(plan, dtype=object), (count,))
    return ", ".join(type(x.method).__name__ for x in plans)
