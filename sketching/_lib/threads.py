"""Independent blocks of work on as many threads as BLAS would have used.

A block calls BLAS on small matrices, where BLAS's own threads help little. So
while blocks run, BLAS is limited to one thread and the blocks run in parallel. The
user's settings (``OPENBLAS_NUM_THREADS``, ``threadpoolctl``) say how many threads.

Blocks may run blocks: heads in parallel, each of which distributes its own. One crew of
threads serves all of them. It takes the oldest blocks, whole heads, first; when those
have run out, it helps with the blocks inside.

An interrupt ends everything: blocks that have not started never do, those that have end
the blocks inside. A process that forks while other threads compute leaves a child
without those threads: the child starts with a crew of its own.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from sketching._lib.arrays import Array, place_of

_T = TypeVar("_T")
_S = TypeVar("_S")

# a signal may come in while it is held, and whoever handles that may fork
_lock = threading.RLock()
_held = 0
# processes that this one was forked from
_forks = 0
_limiter: Any = None
_threads = 1
# seconds within which a thread begins that was started
_START = 1.0
_crew: Any = None


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
    global _crew, _held, _limiter, _threads  # noqa: PLW0603
    with _lock:
        if _held == 0:
            controller = _controller()
            info = controller.info()
            # a BLAS that was loaded after the user set a limit does not know of it
            _threads = min((int(pool["num_threads"]) for pool in info), default=1)
            _limiter = _limited(controller, info)
            _crew = _Crew(_threads - 1)
        _held += 1
        threads, forks = _threads, _forks
    done = None
    try:
        yield threads
    finally:
        with _lock:
            # a child that was forked within has released what its parent holds
            if forks == _forks:
                _held -= 1
                if _held == 0:
                    done, _crew = _crew, None
                    limiter, _limiter = _limiter, None
                    _restore(limiter)
        if done:
            done.dismiss()


def _limited(controller: Any, info: Any) -> Any:
    """Limit BLAS to one thread; an interrupt restores the limit before."""
    _release()
    try:
        return controller.limit(limits=1)
    except BaseException:
        for library, known in zip(controller.lib_controllers, info, strict=True):
            library.set_num_threads(known["num_threads"])
        raise


def _restore(limiter: Any) -> None:
    """Give BLAS its threads back, even if an interrupt comes in between."""
    try:
        _release()
        limiter.restore_original_limits()
        _release()
    except BaseException:
        limiter.restore_original_limits()
        raise


def _begin_as_child() -> None:
    """Release in the child what threads of the parent held, which it does not have."""
    global _crew, _forks, _held, _limiter, _lock  # noqa: PLW0603
    _lock = threading.RLock()
    limiter, is_held = _limiter, _held > 0
    _forks, _held, _limiter, _crew = _forks + 1, 0, None, None
    if is_held and limiter is not None:
        _restore(limiter)


# no other thread is between two of its states when the process is copied
os.register_at_fork(
    before=lambda: _lock.acquire(),  # noqa: PLW0108 (a child has a lock of its own)
    after_in_parent=lambda: _lock.release(),  # noqa: PLW0108
    after_in_child=_begin_as_child,
)


def run_blocks(work: Callable[[int], None], starts: range) -> None:
    """Call ``work(start)`` for every start, spread over threads.

    The calls must write to disjoint memory. They begin in order; the exception of the
    first that fails is raised, as it would be by a loop.
    """
    with single_threaded_blas() as threads:
        if threads == 1 or len(starts) <= 1:
            for start in starts:
                work(start)
            return
        _crew.run(_Work(work, starts))


def parallel_map(
    work: Callable[[_T], _S], items: Sequence[_T], like: Array
) -> list[_S]:
    """Apply ``work`` to every item, in parallel for arrays on the CPU such as ``like``.

    BLAS has one thread then, even for one item: results may differ in the last digit
    with the number of threads.
    """
    if place_of(like) != "cpu":
        return [work(item) for item in items]
    found: list[Any] = [None] * len(items)

    def one(number: int) -> None:
        found[number] = work(items[number])

    run_blocks(one, range(len(items)))
    return found


class _Work:
    """Calls that are handed out in order until there are no more, or one fails."""

    def __init__(self, call: Callable[[int], None], starts: range) -> None:
        self.call, self.starts = call, starts
        self.taken = self.running = 0
        self.interrupted = False
        self.errors: dict[int, BaseException] = {}
        self.parent = _current.get()
        # NumPy's settings for overflows (np.errstate) hold in every thread
        self.context = copy_context()
        self.context.run(_current.set, self)

    @property
    def is_open(self) -> bool:
        """Whether there is a call left to begin."""
        return self.taken < len(self.starts) and not self.errors and not self.is_stopped

    @property
    def is_stopped(self) -> bool:
        """Whether an interrupt ended this work, or that whose call opened it."""
        work: _Work | None = self
        while work is not None and not work.interrupted:
            work = work.parent
        return work is not None

    def is_within(self, other: "_Work | None") -> bool:
        """Whether a call of the other's, or of those within, opened this work."""
        work: _Work | None = self
        while work is not None and work is not other:
            work = work.parent
        return work is other

    def raise_first(self) -> None:
        """Raise what a loop would have raised; an interrupt before all else."""
        if self.errors:
            raise min(self.errors.items(), key=_rank)[1]
        if self.is_stopped:
            # the work whose call this is was interrupted, and raises what did that
            raise _Stopped


class _Stopped(BaseException):
    """Ends calls whose result is not needed any more."""


def _rank(one: tuple[int, BaseException]) -> tuple[int, int]:
    """Interrupts before other errors, those that they caused last."""
    number, error = one
    if isinstance(error, _Stopped):
        return 2, number
    return int(isinstance(error, Exception)), number


# whose call this thread, or the one that it works for, is in
_current: ContextVar[_Work | None] = ContextVar("_current", default=None)


class _Thread(threading.Thread):
    """A thread that says that it runs: only then can it be joined."""

    def __init__(self, target: Callable[[], None]) -> None:
        super().__init__(target=target)
        self.begun = threading.Event()

    def run(self) -> None:
        self.begun.set()
        super().run()


class _Crew:
    """Threads that live while BLAS is held, and the work that lies open to them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.threads: list[_Thread] = []
        self.works: list[_Work] = []
        self.dismissed = False
        self.changed = threading.Condition()

    def run(self, work: _Work) -> None:
        """Do the work together with the crew."""
        with self.changed:
            self.works.append(work)
            try:
                missing = min(self.size, len(work.starts) - 1) - len(self.threads)
                for _ in range(missing):
                    self.threads.append(_Thread(self._serve))
                    self.threads[-1].start()
                self.changed.notify_all()
                while work.is_open or work.running:
                    # a head that others compute may leave blocks to help with
                    if not (self._step(work) or self._step(within=work)):
                        self.changed.wait()
            except BaseException:
                # an interrupt, while others compute or start
                work.interrupted = True
                raise
            finally:
                self.works.remove(work)
                # its traceback refers to the work: without this, arrays of the calls
                # would stay in memory until the cycle collector runs
                work.context = Context()
        work.raise_first()

    def dismiss(self) -> None:
        """Let the threads end; their work is done."""
        with self.changed:
            self.dismissed = True
            self.changed.notify_all()
        for thread in self.threads:
            # one whose start was interrupted may never run
            if thread is not threading.current_thread() and thread.begun.wait(_START):
                thread.join()

    def _serve(self) -> None:
        with self.changed:
            while not self.dismissed:
                if not self._step():
                    self.changed.wait()

    def _step(self, work: _Work | None = None, within: _Work | None = None) -> bool:
        """Do one call, of the oldest work by default; False if there is none."""
        if work is None:
            open_ = (x for x in self.works if x.is_open and x.is_within(within))
            work = next(open_, None)
        if work is None or not work.is_open:
            return False
        number = work.taken
        work.taken += 1
        work.running += 1
        error = None
        try:
            self.changed.release()
            work.context.copy().run(work.call, work.starts[number])
        except BaseException as caught:
            error = caught
        finally:
            self.changed.acquire()
        work.running -= 1
        if error is not None:
            work.errors[number] = error
            # other errors may not be the first that a loop would meet
            work.interrupted |= not isinstance(error, Exception)
        if not (work.running or work.is_open):
            self.changed.notify_all()
        return True
