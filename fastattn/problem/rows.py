"""Some rows of a matrix: drawn, taken, marked, and put back."""

import numpy as np

from fastattn.problem.head import Head, host_rows
from sketching._lib.arrays import Array, array_namespace, device_of

# rows that transforms and statistics are made from
SAMPLE = 4096


def sample_rows(
    head: Head, rng: np.random.Generator, size: int = SAMPLE
) -> tuple[Array, Array]:
    """Return up to so many random queries and keys on the host."""
    n, m, _, _ = head.sizes
    return (
        host_rows(head.query, _draw(n, size, rng)),
        host_rows(head.key, _draw(m, size, rng)),
    )


def _draw(count: int, size: int, rng: np.random.Generator) -> Array:
    """Row numbers of a sample without replacement, in order."""
    if count <= size:
        return np.arange(count)
    return np.sort(rng.choice(count, size=size, replace=False))


def row_mask(rows: Array, x: Array) -> Array:
    """Boolean array, true at the numbers of some of the rows of ``x``."""
    mask = np.zeros(x.shape[0], dtype=bool)
    mask[rows] = True
    return array_namespace(x).asarray(mask, device=device_of(x))


def scatter_rows(part: Array, rows: Array, n: int) -> Array:
    """Put the rows of a matrix at the numbers ``rows`` of ``n``, zeros elsewhere."""
    xp, (count, width) = array_namespace(part), part.shape
    # array libraries agree on take, not on writing
    source = np.full(n, count)
    source[rows] = np.arange(count)
    device = device_of(part)
    zero = xp.zeros((1, width), dtype=part.dtype, device=device)
    source_rows = xp.asarray(source, device=device)
    return xp.take(xp.concat([part, zero]), source_rows, axis=0)


def gather_rows(x: Array, rows: Array | None) -> Array:
    """Rows of an array; None means all."""
    if rows is None:
        return x
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(rows, device=device_of(x)), axis=0)
