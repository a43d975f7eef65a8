"""Rows of a matrix: sample, gather, mask and scatter."""

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.problem.head import Head, host_rows
from sketching._lib.arrays import Array, array_namespace, device_of


def sample_rows(
    head: Head, rng: np.random.Generator, size: int | None = None
) -> tuple[Array, Array]:
    """Return up to ``size`` random queries, and keys, on the host."""
    n, m, _, _ = head.sizes
    size = POLICY.statistics.sample if size is None else size
    return (
        host_rows(head.query, _draw(n, size, rng)),
        host_rows(head.key, _draw(m, size, rng)),
    )


def _draw(count: int, size: int, rng: np.random.Generator) -> Array:
    """Sorted row indices of a sample without replacement."""
    if count <= size:
        return np.arange(count)
    return np.sort(rng.choice(count, size=size, replace=False))


def row_mask(rows: Array, x: Array) -> Array:
    """Boolean array over the rows of ``x``, true at the indices ``rows``."""
    mask = np.zeros(x.shape[0], dtype=bool)
    mask[rows] = True
    return array_namespace(x).asarray(mask, device=device_of(x))


def scatter_rows(part: Array, rows: Array, n: int) -> Array:
    """Put rows at the indices ``rows`` of a matrix of ``n`` rows; others are zero."""
    xp, (count, width) = array_namespace(part), part.shape
    # the array API has take but no portable assignment
    source = np.full(n, count)
    source[rows] = np.arange(count)
    device = device_of(part)
    zero = xp.zeros((1, width), dtype=part.dtype, device=device)
    source_rows = xp.asarray(source, device=device)
    return xp.take(xp.concat([part, zero]), source_rows, axis=0)
