"""Queries and keys near a subspace of eight dimensions, against torch, by seed."""

import numpy as np

import fastattn
from benches.cases import low_dimensional
from benches.heads import Head
from benches.measure import faster, sdpa

# of a logit's largest size at scale 1 / 8
_LARGEST = 4.0
_SCALE = 1 / 8
_TOL = 1e-2


def lowdim(*, quick):
    """Near an 8-dimensional subspace at tol 1e-2: times faster than torch by seed."""
    noises = (0.05,) if quick else (0.05, 0.01)
    n = 8192 if quick else 32768
    return [cell(n, noise, seeds=2 if quick else 9) for noise in noises]


def cell(n: int, noise: float, *, seeds: int) -> dict:
    """Measure one size; answers beyond their tolerance are not timed."""
    rng = np.random.default_rng(0)
    arrays = low_dimensional(n, rng, largest=_LARGEST, noise=noise)
    head = Head(f"lowdim@{n}", *arrays, _SCALE)
    ratios, errors, functions = [], [], []
    for seed in range(seeds):

        def call(seed=seed):
            return fastattn.approximate(*arrays, scale=_SCALE, tol=_TOL, rng=seed)

        answer = call()
        errors.append(head.error(answer.value))
        assert errors[-1] <= _TOL, f"seed {seed} errs by {errors[-1]:.2e}"
        functions.append(size_of(answer.plan.method))
        ratios.append(faster(call, sdpa(*arrays, scale=_SCALE), pairs=1).median)
    return {
        "n": n,
        "noise": noise,
        "tol": _TOL,
        "seeds": seeds,
        "times faster than torch": float(np.median(ratios)),
        "least": min(ratios),
        "most": max(ratios),
        "worst realised": max(errors),
        "functions": ", ".join(functions),
    }


def size_of(method) -> str:
    """Name a method by its polynomials and landmarks."""
    if not isinstance(method, fastattn.Polynomial):
        return type(method).__name__
    return f"{method.rank}+{method.landmarks}"
