"""The fast Walsh-Hadamard transform of rows."""

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.op import op


@op("cpu")
def hadamard(x: Array) -> Array:
    """Transform the rows of ``x``, ``(..., d)`` with ``d`` a power of two.

    The answer is ``x H`` with ``H[i, j] = (-1)^(number of common bits of i and j)``.
    """
    xp = array_namespace(x)
    shape, d = x.shape, x.shape[-1]
    step = 1
    while step < d:
        pairs = xp.reshape(x, (-1, d // (2 * step), 2, step))
        left, right = pairs[:, :, 0, :], pairs[:, :, 1, :]
        x = xp.stack([left + right, left - right], axis=2)
        step *= 2
    return xp.reshape(x, shape)
