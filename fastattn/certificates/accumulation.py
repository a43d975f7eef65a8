"""Blocks of keys, and how many of their sums a proven bound allows to be added."""

from collections.abc import Iterator

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.certificate import RefusalError

# keys in a block: their sum is computed at once, and then added to earlier sums
ACCUMULATION_BLOCK = 4096
# the most block sums that are added: proven bounds include so many roundings
MAX_BLOCKS = 1 << 20
# proven bounds hold for later queries with entries up to so many times as large
_ROOM = 1.1


def accumulation_blocks(m: int) -> Iterator[slice]:
    """Yield the blocks of rows, ``ACCUMULATION_BLOCK`` each, that ``m`` rows form."""
    for start in range(0, m, ACCUMULATION_BLOCK):
        yield slice(start, min(start + ACCUMULATION_BLOCK, m))


def count_blocks(before: int, more: int, otherwise: str) -> int:
    """Add two numbers of blocks; raise ``RefusalError`` above ``MAX_BLOCKS``."""
    if before + more > MAX_BLOCKS:
        raise RefusalError(
            f"more than {MAX_BLOCKS} inserts: the rounding bound covers no more; "
            f"insert more keys at once, or use {otherwise}"
        )
    return before + more


def with_room(query: Array) -> Array:
    """Scale queries by ``_ROOM``: later queries may then be larger than these."""
    xp = array_namespace(query)
    fits = xp.abs(query) <= float(xp.finfo(query.dtype).max) / _ROOM
    # entries that would overflow stay as they are
    return xp.where(fits, xp.where(fits, query, xp.zeros_like(query)) * _ROOM, query)
