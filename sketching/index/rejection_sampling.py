"""Points drawn with probability proportional to their distance, from estimates."""

from collections.abc import Callable

import numpy as np

from sketching._lib.arrays import Array


def sample_exact(
    estimates: Array,
    error: float,
    exact: Callable[[Array], Array],
    size: int,
    power: int,
    rng: np.random.Generator,
) -> Array:
    """Draw ``size`` positions with probability proportional to a power of the distance.

    Estimates, whose relative error is at most ``error``, propose; a proposal is
    accepted with the ratio of the exact distance to the largest that the estimate
    allows. If an estimate has a larger error, all distances are computed.
    """
    largest = (estimates.astype(np.float64) / (1 - error)) ** power
    total = largest.sum()
    if not total > 0:
        raise ValueError("q: every point is at distance 0 from it")
    kept: list[Array] = []
    count = 0
    while count < size:
        # acceptance is at least (1 - error) / (1 + error), to the power
        tries = 16 + 2 * (size - count)
        proposed = rng.choice(len(largest), tries, p=largest / total)
        distances = exact(proposed).astype(np.float64) ** power
        # estimates are rounded to their dtype
        if (distances > largest[proposed] * (1 + 1e-5)).any():
            largest = exact(np.arange(len(largest))).astype(np.float64) ** power
            total, kept, count = largest.sum(), [], 0
            continue
        accepted = proposed[rng.random(tries) * largest[proposed] < distances]
        kept.append(accepted)
        count += len(accepted)
    return np.concatenate(kept)[:size]
