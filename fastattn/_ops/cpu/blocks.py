"""How passes over keys and queries are split into blocks, and blocks into tasks."""

from fastattn._ops.monomials import SUMMED_ROWS

# rows whose basis functions exist at once, on each thread: they stay in cache
ROWS = SUMMED_ROWS
# tasks: a number that does not depend on the threads, so that the answer does not
_TASKS = 16
# all partial sums of the tasks together stay below this many bytes
_LARGEST_PARTS = 1 << 26


def span_of(rows, part_bytes=0):
    """Rows of a task, a multiple of ``ROWS``; each task may use ``part_bytes``."""
    most = _LARGEST_PARTS // part_bytes if part_bytes else _TASKS
    tasks = min(_TASKS, max(1, most))
    return ROWS * -(-rows // (ROWS * tasks))
