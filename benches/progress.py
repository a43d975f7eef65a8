"""One progress display, shared by nested runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.progress import Progress

_display: ContextVar[Progress | None] = ContextVar("_display", default=None)


@contextmanager
def steps(name: str, total: int) -> Iterator[Callable]:
    """Show a progress bar, below that of the studies where they run.

    Yields a call: with ``name`` it names the current step, without it one step is done.
    """
    with _shared() as display:
        task = display.add_task(name, total=total)

        def step(name: str | None = None) -> None:
            if name is None:
                display.advance(task)
            else:
                display.update(task, description=name)

        try:
            yield step
        finally:
            display.remove_task(task)


@contextmanager
def _shared() -> Iterator[Progress]:
    """Yield the display that is shown; older versions of rich refuse a second one."""
    shown = _display.get()
    if shown is not None:
        yield shown
        return
    with Progress() as display:
        token = _display.set(display)
        try:
            yield display
        finally:
            _display.reset(token)
