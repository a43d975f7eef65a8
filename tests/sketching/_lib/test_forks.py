"""A process that forks while its threads compute: the child computes too."""

import os
import subprocess
import sys

import pytest

BEGIN = """
import faulthandler, os, signal, sys, threading, time
import numpy as np
import fastattn
from sketching._lib import op, threads

x = np.random.default_rng(0).standard_normal((3, 4, 200, 8)).astype(np.float32)

def child():
    signal.alarm(60)
    got = fastattn.attention(*x, rng=0)
    # exits without a word to those who wait for the parent
    os._exit(0 if np.array_equal(got, want) else 3)

def fork():
    pid = os.fork()
    if pid == 0:
        child()
    return os.waitpid(pid, 0)[1]

def held(lock, begun):
    with lock:
        begun.set()
        time.sleep(0.3)

def while_held(lock):
    begun = threading.Event()
    thread = threading.Thread(target=held, args=(lock, begun))
    thread.start()
    begun.wait()
    status = fork()
    thread.join()
    return status
"""
CASES = {
    "a thread computes": """
want = fastattn.attention(*x, rng=0)
stop = threading.Event()

def work():
    while not stop.is_set():
        fastattn.attention(*x, rng=0)

thread = threading.Thread(target=work)
thread.start()
found = [fork() for _ in range(60)]
stop.set()
thread.join()
assert not any(found), found
""",
    "locks": """
want = fastattn.attention(*x, rng=0)
from fastattn.costs import rates as _rates
from numba.core.compiler_lock import global_compiler_lock
for lock in (threads._lock, op._importing, global_compiler_lock, _rates._lock):
    assert while_held(lock) == 0, lock
assert (threads._held, threads._forks) == (0, 0)
want = fastattn.attention(*x, rng=0)
""",
    "blocks run": """
want = fastattn.attention(*x, rng=0)
from threadpoolctl import threadpool_info
count = lambda: max(x["num_threads"] for x in threadpool_info())
before = count()
# the child of a thread within: its BLAS is free, and it leaves the block in peace
with threads.single_threaded_blas():
    assert count() == 1
    pid = os.fork()
    if pid == 0:
        assert count() == before
if pid == 0:
    assert threads._held == 0
    child()
assert os.waitpid(pid, 0)[1] == 0
assert count() == before
# and of a thread beside one that is
begun, done = threading.Event(), threading.Event()

def hold():
    with threads.single_threaded_blas():
        begun.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
begun.wait()
assert fork() == 0
assert count() == 1
done.set()
thread.join()
assert count() == before
""",
    "the first call compiles": """
import fastattn._attention
from numba.core.compiler_lock import global_compiler_lock

thread = threading.Thread(target=lambda: fastattn.attention(*x, rng=0))
thread.start()
while global_compiler_lock._lock.acquire(blocking=False):
    global_compiler_lock._lock.release()
    time.sleep(0.001)
pid = os.fork()
if pid == 0:
    signal.alarm(100)
    fastattn.attention(*x, rng=0)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
thread.join()
""",
}


# sixty forks, and compiling all again, take long
LONG = "a thread computes", "the first call compiles"


@pytest.mark.parametrize("threads", [pytest.param("1", marks=pytest.mark.slow), "2"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] if x in LONG else []) for x in CASES],
)
def test_a_child_computes_whatever_other_threads_did(name, threads, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    environment |= {"OPENBLAS_NUM_THREADS": threads}
    if "compiles" in name:
        environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + CASES[name]], check=False,
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
