"""The fastest method, over the number of rows and the bound on the entries."""

from functools import partial

import numpy as np

import fastattn
from benches.heads import Head
from benches.measure import Ratio, median_of, sdpa, spread
from benches.peers import times_over
from benches.progress import steps

_D, _TOL = 64, 1e-1
AUTO = "Auto()"


def methods() -> dict:
    """Methods by name, each at sizes given by hand."""
    hermite = partial(fastattn.Polynomial, basis="hermite")
    return {
        AUTO: None,
        "Exact()": fastattn.Exact(),
        "Polynomial, degree 2": hermite(degree=2),
        "Polynomial, rank 561": hermite(rank=561),
        "256 landmarks": hermite(rank=1, landmarks=256),
        "rank 256, 256 landmarks": hermite(rank=256, landmarks=256),
        "Multipole()": fastattn.Multipole(),
    }


def speed_map(*, quick):
    """Entries uniform in [-B, B], scale 1/d, d=64, tol 0.1: times faster than torch.

    The standard deviation of the logits is B^2 / 24. A method whose certificate or
    error exceeds the tolerance has no time. `Auto()` chooses for itself.
    """
    sizes = (2048, 4096) if quick else (4096, 8192, 16384, 32768)
    bounds = (2.0, 8.0) if quick else (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    rows = []
    with steps("map", len(sizes) * len(bounds)) as step:
        for n in sizes:
            for bound in bounds:
                rows += _cell(n, bound, rounds=3 if quick or n > 8192 else 5)
                step()
    return rows


def uniform(n: int, bound: float) -> Head:
    """Uniform entries of query and key up to a bound."""
    rng = np.random.default_rng(0)
    query, key = (
        rng.uniform(-bound, bound, (n, _D)).astype(np.float32) for _ in range(2)
    )
    value = rng.standard_normal((n, _D), dtype=np.float32)
    return Head(f"uniform up to {bound:g}", query, key, value, 1 / _D)


def _cell(n: int, bound: float, *, rounds: int) -> list[dict]:
    """All methods on one input: errors first, then times in turn."""
    head = uniform(n, bound)
    calls, rows = [], []
    for name, method in methods().items():
        call = partial(
            fastattn.approximate, *head.arrays,
            scale=head.scale, tol=_TOL, method=method, rng=0,
        )  # fmt: skip
        row = {"n": n, "entries": bound, "method": name, "ran": "", "error": None}
        rows.append(row | spread("times faster than torch", Ratio(*3 * [np.nan])))
        try:
            answer = call()
        except fastattn.RefusalError:
            rows[-1]["ran"] = "refused"
            continue
        rows[-1] |= {
            "ran": type(answer.plan.method).__name__,
            "error": head.error(answer.value),
        }
        if rows[-1]["error"] <= _TOL:
            calls.append((rows[-1], call))
    unit = sdpa(*head.arrays, scale=head.scale)
    times = times_over(unit, [call for _, call in calls], rounds)
    for (row, _), ratios in zip(calls, times, strict=True):
        row.update(spread("times faster than torch", median_of(ratios).inverse))
    return rows


def winners(rows: list[dict]) -> dict[tuple, dict]:
    """The fastest row of each cell within the tolerance, without Auto()."""
    best: dict[tuple, dict] = {}
    for row in rows:
        cell, speed = (row["n"], row["entries"]), row["times faster than torch"]
        if row["method"] == AUTO or not np.isfinite(speed or np.nan):
            continue
        if cell not in best or speed > best[cell]["times faster than torch"]:
            best[cell] = row
    return best
