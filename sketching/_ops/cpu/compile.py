"""Compilation by numba, with the machine code cached in files where possible.

numba refuses to define a function whose code it cannot cache: no folder is writable in
a container of another user or on a read-only file system. It also fails on a truncated
cache file. Here such code is compiled again, and cached if possible; a checksum
precedes it in the file, since a processor runs whatever bytes it gets.
"""

import hashlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

# a fork is delayed until no thread compiles: the child would block on that thread's
# lock
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)
# what llvmlite has LLVM call
_CALLBACKS = ("_raw_object_cache_notify", "_raw_object_cache_getbuffer")
_DIGEST = hashlib.sha256().digest_size


def njit(*, cache: bool = False, **options: Any) -> Callable[[Any], Any]:
    """Compile a function as ``numba.njit`` does; ``cache`` is a wish, not a demand."""

    def decorate(function: Any) -> Any:
        made = numba.njit(**options)(function)
        if made is function:
            # numba is disabled
            return made
        compile_ = made.compile

        def compile_heard(signature: Any) -> Any:
            with _hearing_interrupts():
                return compile_(signature)

        made.compile = compile_heard
        if cache:
            try:
                made._cache = _Cache(function)
            except (RuntimeError, OSError):
                # no folder is writable: numba compiles without a cache
                return made
        return made

    return decorate


@contextmanager
def _hearing_interrupts() -> Iterator[None]:
    """Delay interrupts that LLVM would swallow until the code is compiled.

    LLVM calls back into Python when it has made code, or searches for some; exceptions
    raised there are printed and lost.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and callable(handler)):
        yield
        return
    missed = []

    def hear(number, frame):
        if _is_called_back(frame):
            missed.append(number)
        else:
            handler(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if missed:
            handler(missed[0], None)


def _is_called_back(frame: Any) -> bool:
    """Whether LLVM called the function of a stack frame, or one of its callers."""
    while frame is not None:
        if frame.f_code.co_name in _CALLBACKS:
            return True
        frame = frame.f_back
    return False


class _CheckedFile(IndexDataCacheFile):
    """Files of code that begin with a checksum."""

    def _load_data(self, name):
        data = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(data[_DIGEST:])

    def _save_data(self, name, data):
        code = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(code).digest())
            file.write(code)


class _Cache(FunctionCache):
    """A cache that works around damaged files and full disks."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = _CheckedFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            # damaged pickles raise anything; missing code is compiled
            return None

    def save_overload(self, sig, data):
        try:
            try:
                super().save_overload(sig, data)
            except OSError:
                raise
            except Exception:
                # the index is damaged: a new one is begun
                self.flush()
                super().save_overload(sig, data)
        except OSError:
            # the disk is full, or the folder became read-only
            self.disable()
