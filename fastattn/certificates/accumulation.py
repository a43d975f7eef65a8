"""Pieces of keys whose sums are added up under a bound that was proven before them."""

from collections.abc import Iterator

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.certificate import RefusalError

# keys of a sum that is made at once, where several are added up
ACCUMULATION_BLOCK = 4096
# sums that may be added up: the bound allows for their rounding
MAX_BLOCKS = 1 << 20
# proven bounds leave room for queries that are so many times as large
_ROOM = 1.1


def accumulation_blocks(m: int) -> Iterator[slice]:
    """Cut ``m`` rows into pieces."""
    for start in range(0, m, ACCUMULATION_BLOCK):
        yield slice(start, min(start + ACCUMULATION_BLOCK, m))


def count_blocks(before: int, more: int, otherwise: str) -> int:
    """Add numbers of pieces; raise ``RefusalError`` where they are too many."""
    if before + more > MAX_BLOCKS:
        raise RefusalError(
            f"more than {MAX_BLOCKS} inserts: the bound allows for no more roundings; "
            f"insert more keys at once, or use {otherwise}"
        )
    return before + more


def with_room(query: Array) -> Array:
    """Queries that are larger than these, so that those to come may be, too."""
    xp = array_namespace(query)
    fits = xp.abs(query) <= float(xp.finfo(query.dtype).max) / _ROOM
    # those that nothing is larger than stay as they are
    return xp.where(fits, xp.where(fits, query, xp.zeros_like(query)) * _ROOM, query)
