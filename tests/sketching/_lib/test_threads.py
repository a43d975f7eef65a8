"""BLAS is limited to one thread while blocks run, and restored in all cases."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from sketching._lib.threads import parallel_map, run_blocks, single_threaded_blas


def blas_threads():
    """Most threads of any BLAS; NumPy and SciPy may each have loaded their own."""
    return max(x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    before = blas_threads()
    yield
    assert blas_threads() == before


def test_blas_has_one_thread_inside_and_its_own_after():
    before = blas_threads()
    with single_threaded_blas() as threads:
        assert threads == before
        assert blas_threads() == 1
    assert blas_threads() == before


def test_limits_come_back_after_an_exception():
    before = blas_threads()
    with pytest.raises(KeyError), single_threaded_blas():
        raise KeyError
    assert blas_threads() == before


def test_nested_uses_know_the_outer_number():
    before = blas_threads()
    with single_threaded_blas() as outer, single_threaded_blas() as inner:
        assert outer == inner == before
        assert blas_threads() == 1


def test_the_last_of_concurrent_uses_restores():
    before = blas_threads()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with single_threaded_blas() as threads:
            first_in.set()
            assert second_in.wait(10)
        first_out.set()
        return threads

    def second():
        assert first_in.wait(10)
        with single_threaded_blas() as threads:
            second_in.set()
            assert first_out.wait(10)
            held = blas_threads()
        return threads, held

    with ThreadPoolExecutor(2) as pool:
        uses = [pool.submit(first), pool.submit(second)]
        assert [x.result(20) for x in uses] == [before, (before, 1)]
    assert blas_threads() == before


def test_the_user_sets_the_number():
    with threadpool_limits(1, user_api="blas"), single_threaded_blas() as threads:
        assert threads == 1


@pytest.mark.parametrize("count", [0, 1, 2, 17])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_block_runs_once(count, threads):
    done = np.zeros(count, int)

    def work(i):
        done[i] += 1

    with threadpool_limits(threads, user_api="blas"):
        run_blocks(work, range(count))
    np.testing.assert_array_equal(done, 1)


@pytest.mark.parametrize("count", [1, 8])
def test_the_exception_of_a_block_is_raised(count):
    def work(i):
        if i == count - 1:
            raise ZeroDivisionError("block")

    with pytest.raises(ZeroDivisionError, match="block"):
        run_blocks(work, range(count))


@pytest.mark.parametrize("like", [np.zeros(1), None], ids=["kernels", "none"])
def test_a_parallel_map_keeps_the_order(like):
    found = parallel_map(lambda x: (x, threading.current_thread()), "abc", like)
    assert [x for x, _ in found] == list("abc")
    # without kernels it is a loop
    alone = {thread for _, thread in found} == {threading.current_thread()}
    assert alone or like is not None


def test_blocks_may_run_blocks():
    done = np.zeros((4, 4), int)

    def outer(i):
        def inner(j):
            done[i, j] += 1

        run_blocks(inner, range(4))

    run_blocks(outer, range(4))
    np.testing.assert_array_equal(done, 1)


def test_blocks_run_from_many_threads_at_once():
    def sums(seed):
        out = np.zeros(16)
        x = np.random.default_rng(seed).standard_normal((16, 40, 40))

        def work(i):
            out[i] = np.sum(x[i] @ x[i])

        run_blocks(work, range(16))
        return out

    alone = [sums(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        np.testing.assert_array_equal(list(pool.map(sums, range(6))), alone)


def test_a_worker_holds_blas_after_the_main_thread_did():
    before = blas_threads()
    with single_threaded_blas():
        pass

    def use():
        with single_threaded_blas() as threads:
            return threads, blas_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use).result(20) == (before, 1)
        # the worker is alive and idle, and must not keep the main thread out
        assert use() == (before, 1)


def test_a_blas_that_is_loaded_later_is_held_too():
    program = """
import numpy
from sketching._lib.threads import single_threaded_blas
with single_threaded_blas():
    pass
import scipy.linalg
from threadpoolctl import threadpool_info
with single_threaded_blas():
    pools = [x for x in threadpool_info() if x["user_api"] == "blas"]
    assert all(x["num_threads"] == 1 for x in pools), pools
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_blas_that_is_loaded_after_the_limit_does_not_add_threads():
    program = """
import numpy as np
from threadpoolctl import threadpool_limits
from sketching._lib.threads import single_threaded_blas
with threadpool_limits(1, user_api="blas"):
    import scipy.linalg
    with single_threaded_blas() as threads:
        assert threads == 1, threads
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_exception_of_the_first_block_that_fails_is_raised():
    later = threading.Event()

    def work(i):
        if i == 1:
            later.set()
            raise ValueError("later")
        assert later.wait(10)
        raise KeyError("first")

    with threadpool_limits(2, user_api="blas"), pytest.raises(KeyError, match="first"):
        run_blocks(work, range(2))


def test_no_block_begins_after_one_has_failed():
    begun = []

    def work(i):
        begun.append(i)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_blocks(work, range(100))
    assert len(begun) <= blas_threads()


def test_an_interrupt_is_raised_whatever_else_went_wrong():
    started = threading.Barrier(2)

    def work(i):
        started.wait(10)
        raise KeyboardInterrupt if i else ValueError

    with threadpool_limits(2, user_api="blas"), pytest.raises(KeyboardInterrupt):
        run_blocks(work, range(2))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_there_are_never_more_threads_than_blas_had(threads):
    lock, running, most = threading.Lock(), set(), []

    def inner(j):
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        np.linalg.norm(np.ones((300, 300)) * j)
        with lock:
            running.discard(threading.get_ident())

    def outer(_):
        run_blocks(inner, range(6))

    before = threading.active_count()
    with threadpool_limits(threads, user_api="blas"):
        run_blocks(outer, range(7))
    assert max(most) <= threads
    # and they are gone
    assert threading.active_count() == before


def test_no_more_outer_blocks_are_in_flight_than_there_are_threads():
    lock, flight, most = threading.Lock(), set(), []

    def outer(i):
        with lock:
            flight.add(i)
            most.append(len(flight))
        run_blocks(lambda _: time.sleep(0.001), range(5))
        with lock:
            flight.discard(i)

    with threadpool_limits(3, user_api="blas"):
        run_blocks(outer, range(12))
    assert max(most) <= 3


def test_who_has_nothing_left_helps_with_the_blocks_of_others():
    helped = threading.Barrier(2)

    def outer(i):
        if i == 1:
            # both blocks must be under way at once for either to end
            run_blocks(lambda _: helped.wait(10), range(2))

    with threadpool_limits(2, user_api="blas"):
        run_blocks(outer, range(2))
    assert not helped.broken


def test_nested_exceptions_come_out_where_they_belong():
    def inner(j):
        raise LookupError(j)

    def outer(i):
        if i % 2:
            with pytest.raises(LookupError, match="0"):
                run_blocks(inner, range(3))
        elif i == 4:
            run_blocks(inner, range(3))

    with threadpool_limits(2, user_api="blas"), pytest.raises(LookupError):
        run_blocks(outer, range(6))


def test_blocks_see_what_numpy_was_told_about_errors():
    told = {}

    def work(i):
        told[i] = np.geterr()["over"]

    with threadpool_limits(2, user_api="blas"), np.errstate(over="raise"):
        run_blocks(work, range(8))
    assert set(told.values()) == {"raise"}


def test_what_blocks_hold_is_freed_without_the_collector():
    class Large:
        pass

    def run():
        held = Large()
        gone.append(weakref.ref(held))

        def work(_):
            return held

        run_blocks(work, range(8))

    gone = []
    gc.disable()
    try:
        with threadpool_limits(2, user_api="blas"):
            run()
        assert gone[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("is_started", [False, True])
def test_an_interrupt_while_a_thread_starts_is_raised(is_started, monkeypatch):
    start, before = threading.Thread.start, threading.active_count()

    def interrupt(*_):
        raise KeyboardInterrupt

    def interrupted(thread):
        if not is_started:
            interrupt()
        # it runs, and whoever waits for that is interrupted
        monkeypatch.setattr(thread._started, "wait", interrupt)
        start(thread)

    with threadpool_limits(2, user_api="blas"):
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_blocks(lambda _: None, range(4))
        monkeypatch.undo()
        assert threading.active_count() == before
        done = []
        run_blocks(done.append, range(4))
    assert sorted(done) == [0, 1, 2, 3]
