"""The choices of Auto() for single heads: small, unsuitable, and growing ones."""

from functools import partial

import numpy as np

import fastattn
from benches.heads import Head, file_heads, real_heads
from benches.measure import exponent, faster, sdpa, seconds, spread

_ALONE = 5e-2, 3e-2
_GROWTH, _GROWING = 3e-2, (4096, 8192, 16384, 32768)
# shorter packaged heads are not extended
_LEAST = 2048


def alone(*, quick, data):
    """Each head by itself at tol .05 and .03: times faster than torch by seed."""
    heads = file_heads(data) if data else real_heads([])
    return [_alone(head, tol, quick) for head in heads for tol in _ALONE]


def _alone(head: Head, tol: float, quick: bool) -> dict:
    theirs, ratios, errors, methods = sdpa(*head.arrays, scale=head.scale), [], [], []
    for seed in range(1 if quick else 5):
        ours = partial(_answer, head, tol, seed)
        answer = ours()
        errors.append(head.error(answer.value))
        methods.append(type(answer.plan.method).__name__)
        ratios.append(faster(ours, theirs, pairs=1 if quick else 3).median)
    return {
        "head": head.name,
        "n": len(head),
        "tol": tol,
        "times faster than torch": float(np.median(ratios)),
        "least": min(ratios),
        "most": max(ratios),
        "worst realised": max(errors),
        "methods": ", ".join(methods),
    }


def nothing_fits(*, quick, data):
    """Random rows with logits of deviation 5: the whole call over exact attention."""
    sizes = (8192,) if quick else (8192, 16384, 32768)
    return [_hopeless(n, d, quick) for d in (64, 32) for n in sizes]


def _hopeless(n: int, d: int, quick: bool) -> dict:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, n, d)).astype(np.float32)
    head = Head(f"hopeless{n}", 5 * query, key, value, d**-0.5)
    planned = partial(_answer, head, 1e-2, 0)
    exact = partial(_answer, head, 1e-2, 0, fastattn.Exact())
    error, method = head.error(planned().value), planned().plan.method
    if error > 1e-5 or not isinstance(method, fastattn.Exact):
        raise AssertionError(f"{method} errs by {error:.1e} where nothing should fit")
    ratio = faster(planned, exact, pairs=2 if quick else 7).inverse
    return {"n": n, "d": d, **spread("time over Exact()", ratio), "error": error}


def clustered_growth(*, quick, data):
    """Time of peaked heads at tol .03 as they grow: the fitted exponent, and where."""
    heads = file_heads(data) if data else real_heads([], least=_LEAST)
    methods = (None, fastattn.Multipole())
    return [_grown(head, method, quick) for head in heads for method in methods]


def _grown(head: Head, method, quick: bool) -> dict:
    """A row of times, or the message of a method that refuses the head."""
    try:
        return _growth(head, method, quick)
    except fastattn.RefusalError as error:
        name = type(method).__name__
        return {"head": head.name, "method": name, "ran": f"refused: {error}"}


def _growth(head: Head, method, quick: bool) -> dict:
    whole = len(head)
    sizes = [n for n in _GROWING if n <= whole] or [whole // 4, whole // 2, whole]
    times, ran = [], []
    for n in sizes:
        part = Head(head.name, *(x[:n] for x in head.arrays), head.scale)
        call = partial(_answer, part, _GROWTH, 0, method)
        answer = call()
        if part.error(answer.value) > _GROWTH:
            raise AssertionError(f"{head.name} at n={n} misses tol={_GROWTH}")
        ran.append(type(answer.plan.method).__name__)
        times.append(np.median([seconds(call) for _ in range(1 if quick else 5)]))
    return {
        "head": head.name,
        "method": "Auto" if method is None else type(method).__name__,
        "sizes": ", ".join(map(str, sizes)),
        "exponent": exponent(sizes, times),
        "times the first": ", ".join(f"{t / times[0]:.3g}" for t in times),
        "ran": ", ".join(ran),
    }


def _answer(head: Head, tol: float, seed: int, method=None):
    return fastattn.approximate(
        *head.arrays, scale=head.scale, tol=tol, rng=seed, method=method
    )
