"""Progress of long fits, by rich where it is installed, else in lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that counts a step; ``total`` steps are the most."""
    if not shown:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ImportError:
        yield _lines(what, total)
        return
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _lines(what: str, total: int) -> Callable[[], None]:
    """Count steps in lines on the standard error."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        sys.stderr.write(f"{what}: step {done} of at most {total}\n")

    return advance
