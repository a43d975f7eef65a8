"""Rows in spans, spread over threads only where there are several spans."""

from collections.abc import Callable

from sketching._lib.threads import run_blocks


def over_spans(work: Callable[[int, int], None], n: int, span: int) -> None:
    """Call ``work(start, end)`` for spans of ``n`` rows, in parallel."""
    if n <= span:
        work(0, n)
        return
    run_blocks(lambda start: work(start, min(start + span, n)), range(0, n, span))
