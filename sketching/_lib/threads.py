"""Independent blocks of work on as many threads as BLAS would have used.

A block calls BLAS on small matrices, where BLAS's own threads help little. So
while blocks run, BLAS is held to one thread and the blocks are spread instead. The
user's settings (``OPENBLAS_NUM_THREADS``, ``threadpoolctl``) say how many.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_held = 0
_limiter: Any = None
_threads = 1


def _controller() -> Any:
    # an import since the last use may have loaded another BLAS, such as SciPy's own
    return _controller_of(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _controller_of(_modules: int) -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _release() -> None:
    """Let this thread set the limits, whichever thread has set them before.

    Where a BLAS has one pool for the process, newer versions of threadpoolctl ignore
    all threads but one; uses are counted here, so that they need not.
    """
    import threadpoolctl

    controller = threadpoolctl.OpenBLASController
    if hasattr(controller, "clear_controlling_thread"):
        controller.clear_controlling_thread(force=True)


@contextmanager
def single_threaded_blas() -> Iterator[int]:
    """Hold BLAS to one thread; yields the number of threads it had before.

    The setting is the process's, so nested and concurrent uses are counted: the
    first in changes it, the last out restores it.
    """
    global _held, _limiter, _threads  # noqa: PLW0603
    with _lock:
        if _held == 0:
            controller = _controller()
            info = controller.info()
            # a BLAS that was loaded after the user set a limit does not know of it
            _threads = min((int(pool["num_threads"]) for pool in info), default=1)
            _release()
            _limiter = controller.limit(limits=1)
        _held += 1
        threads = _threads
    try:
        yield threads
    finally:
        with _lock:
            _held -= 1
            if _held == 0:
                _release()
                _limiter.restore_original_limits()
                _limiter = None
                _release()


def run_blocks(work: Callable[[int], None], starts: range) -> None:
    """Call ``work(start)`` for every start, spread over threads.

    The calls must write to disjoint memory. An exception of any call is raised.
    """
    with single_threaded_blas() as threads:
        if threads == 1 or len(starts) <= 1:
            for start in starts:
                work(start)
            return
        with ThreadPoolExecutor(min(threads, len(starts))) as pool:
            for _ in pool.map(work, starts):
                pass
