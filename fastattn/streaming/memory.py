"""The memory that this process may use: of the machine, a container, or a limit."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# files with the limits of the two versions of Linux control groups
_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
}


def usable_memory(root: Path = Path("/")) -> int:
    """Return the least of the machine's memory and the limits on this process."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, *_limits_of_process(), *_limits_of_groups(root))


def _limits_of_process() -> Iterator[int]:
    """Yield the limits by ``ulimit -v`` and batch systems."""
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        yield soft if soft != resource.RLIM_INFINITY else 1 << 62


def _limits_of_groups(root: Path) -> Iterator[int]:
    """Yield the limits of the container, and of its parent groups."""
    yield 1 << 62
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _GROUPS:
                continue
            mount, name = _GROUPS[controller]
            # a container may see its own group as the root
            place = root / mount / path.lstrip("/")
            for folder in (place, *place.parents):
                if not folder.is_relative_to(root / mount):
                    break
                with suppress(OSError, ValueError):
                    yield int((folder / name).read_text(encoding="ascii"))
