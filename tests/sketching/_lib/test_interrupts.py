"""An interrupt ends all blocks, and leaves no lock held and no file half written."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from sketching._lib.threads import run_blocks

# a process that a shell starts in the background ignores interrupts, and so would its
# children
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def run(code, threads="2", **options):
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    environment |= {"OPENBLAS_NUM_THREADS": threads}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HEARS + code], check=False,
        env=environment, capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def test_an_interrupt_ends_the_blocks_within_heads_of_other_threads():
    begun, interrupted = threading.Event(), threading.Event()
    counts = np.zeros(2, int)

    def head(number):
        def block(_):
            counts[number] += 1
            begun.set()
            # whoever is not interrupted has an hour of blocks
            time.sleep(0.01)
            if number and begun.wait(10) and counts[0]:
                interrupted.set()
                raise KeyboardInterrupt

        run_blocks(block, range(360_000))

    with threadpool_limits(2, user_api="blas"):
        before = max(x["num_threads"] for x in threadpool_info())
        with pytest.raises(KeyboardInterrupt):
            run_blocks(head, range(2))
        assert max(x["num_threads"] for x in threadpool_info()) == before
    assert interrupted.is_set()
    assert counts.max() < 100_000


def test_an_error_lets_earlier_blocks_finish():
    done = []

    def work(number):
        if number == 1:
            raise ZeroDivisionError
        time.sleep(0.05)
        done.append(number)

    with threadpool_limits(2, user_api="blas"), pytest.raises(ZeroDivisionError):
        run_blocks(work, range(2))
    assert done == [0]


CALLS = {
    "attention": "x = rng.standard_normal((3, 8, 3000, 32)).astype('f4')\n"
    "call = lambda: fastattn.attention(*x, rng=0)",
    "index": "index = sketching.MahalanobisIndex(sketching.MahalanobisMetric("
    "np.eye(16)), mode=sketching.Exact())\n"
    "x = rng.standard_normal((20000, 16)); index.insert(x)\n"
    "call = lambda: index.kneighbors(x[:500], 5)",
    "pairs": "instance = lowerbounds.from_cnf(lowerbounds.random_formula(24, rng=2))\n"
    "def call():\n"
    "    instance.__dict__['_answer'] = None\n"
    "    return instance.has_solution",
}
SCRIPT = """
import os, signal, threading
import numpy as np, fastattn, sketching, lowerbounds
from sketching._lib import threads
from threadpoolctl import threadpool_info
rng = np.random.default_rng(0)
{setup}
count = lambda: max(x["num_threads"] for x in threadpool_info())
want, before = call(), count()
for wait in (0.05, 0.21, 0.4):
    threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            call()
    except KeyboardInterrupt:
        print("heard")
    assert (threads._held, threads._crew, count()) == (0, None, before)
    assert threading.active_count() == 1, threading.enumerate()
    np.testing.assert_array_equal(call(), want)
"""


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        ("attention", "2"),
        *(pytest.param(x, "1", marks=pytest.mark.slow) for x in CALLS),
        *(pytest.param(x, "2", marks=pytest.mark.slow) for x in list(CALLS)[1:]),
    ],
)
def test_an_interrupt_leaves_no_threads_and_no_limits(name, threads):
    found = run(SCRIPT.format(setup=CALLS[name]), threads)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == 3 * ["heard"]


def test_interrupts_that_llvm_would_swallow_are_heard():
    found = run("""
import signal
from sketching._ops.cpu.compile import _hearing_interrupts

def _raw_object_cache_notify():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("swallowed")

def elsewhere():
    signal.raise_signal(signal.SIGINT)
    print("late")

for call in (_raw_object_cache_notify, elsewhere):
    try:
        with _hearing_interrupts(), _hearing_interrupts():
            call()
        print("lost")
    except KeyboardInterrupt:
        print("heard")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
""")
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["heard", "heard"]


def test_an_interrupted_command_leaves_no_file(tmp_path):
    x = np.random.default_rng(0).standard_normal((60000, 16)).astype(np.float32)
    np.savez(tmp_path / "in.npz", q=x, k=x, v=x)
    code = HEARS + "import sys; from fastattn.cli.main import main; sys.exit(main())"
    command = ["-c", code, "attend", "in.npz", "-o", "out.npz"]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *command, "--method", "exact"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as process:  # fmt: skip
        # the files of the answers are nameless, those of a process are links to them
        folder = f"/proc/{process.pid}/fd"
        while not any(x.startswith(f"{tmp_path}/#") for x in links(folder)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == ["in.npz"]


def links(folder):
    found = []
    for name in os.listdir(folder):
        try:
            found.append(os.readlink(f"{folder}/{name}"))
        except FileNotFoundError:
            found.append("")
    return found
