"""Inner products of vectors of bits, packed into bytes."""

from sketching._lib.arrays import Array, array_namespace, device_of
from sketching._lib.op import op

# pairs whose bytes exist at once
_BLOCK = 1 << 16


@op("cpu")
def extremes(left: Array, right: Array) -> Array:
    """Find the least and the largest inner product between two sets of rows.

    ``left`` is ``(n, w)`` and ``right`` ``(m, w)``, packed bits of dtype uint8 with
    ``w`` a multiple of eight. The answer is an int64 array ``(2, 3)``: the product,
    its row of ``left`` and its row of ``right``, for the first least pair and then
    for the first largest.
    """
    xp = array_namespace(left, right)
    n, step = left.shape[0], max(1, _BLOCK // right.shape[0])
    found = [
        _extremes_of_block(left[start : min(start + step, n), :], right, start)
        for start in range(0, n, step)
    ]
    least = min((x[0] for x in found), key=lambda x: x[0])
    largest = max((x[1] for x in found), key=lambda x: x[0])
    return xp.asarray([least, largest], dtype=xp.int64, device=device_of(left))


def _extremes_of_block(
    left: Array, right: Array, start: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Products of all pairs of one block, whose first row is ``start``."""
    xp = array_namespace(left, right)
    ones = _ones(xp.bitwise_and(left[:, None, :], right[None, :, :]))
    flat = xp.reshape(xp.sum(ones, axis=2, dtype=xp.int64), (-1,))
    least, largest = int(xp.argmin(flat)), int(xp.argmax(flat))
    a, b = divmod(least, right.shape[0])
    c, e = divmod(largest, right.shape[0])
    return (int(flat[least]), start + a, b), (int(flat[largest]), start + c, e)


def _ones(x: Array) -> Array:
    """Count the ones of every byte, halves of the byte at a time."""
    xp = array_namespace(x)
    for shift, low in ((1, 0x55), (2, 0x33), (4, 0x0F)):
        mask = xp.full_like(x, low)
        high = xp.bitwise_right_shift(x, xp.full_like(x, shift))
        x = xp.bitwise_and(x, mask) + xp.bitwise_and(high, mask)
    return x
