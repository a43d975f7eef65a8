"""CUDA source without a device: nvcc compiles it, and g++ runs it as fibers.

The emulation runs every thread of a block up to its next barrier, in rising or falling
order, so that a missing barrier shows as a wrong answer in one of the two. NumPy stands
in for CuPy. What it cannot show: speed, limits of a device, and CuPy's own manners.
"""

import ctypes
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import fastattn
from tests.fastattn.test_gpu import BodyLaws

SOURCES = sorted(Path(fastattn.__file__).parent.glob("_ops/gpu/*.cu"))
KERNEL = re.compile(r'extern "C" __global__ \S+ void (\w+)\(')

SHIM = r"""
#include <ucontext.h>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)
#define __align__(n) __attribute__((aligned(n)))
using std::exp, std::isfinite;
template <class T> T min(T a, T b) { return b < a ? b : a; }

struct Index { unsigned x, y, z; };
enum class Wait { RUNS, WARP, BLOCK, DONE };
struct Fiber { ucontext_t context; std::vector<char> stack; Wait wait; };
static Index threadIdx, blockIdx, gridDim;
static ucontext_t home;
static std::vector<Fiber> fibers;
static std::function<void()> body;

static void pause(Wait why)
{
    Fiber& self = fibers[threadIdx.x];
    self.wait = why;
    swapcontext(&self.context, &home);
}
static void begin() { body(); pause(Wait::DONE); }
static void __syncthreads() { pause(Wait::BLOCK); }
template <class T> T __shfl_xor_sync(unsigned, T value, int distance)
{
    static T slots[1024];
    slots[threadIdx.x] = value;
    pause(Wait::WARP);
    T other = slots[threadIdx.x ^ distance];
    pause(Wait::WARP);
    return other;
}
// fibers first to last - 1 go on if all of them have come to the same barrier
static bool release(unsigned first, unsigned last, Wait why)
{
    for (unsigned t = first; t < last; ++t) if (fibers[t].wait != why) return false;
    for (unsigned t = first; t < last; ++t) fibers[t].wait = Wait::RUNS;
    return true;
}
static bool run_block(unsigned threads, bool falling)
{
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.wait = Wait::RUNS;
        makecontext(&fiber.context, begin, 0);
    }
    for (;;) {
        unsigned done = 0;
        for (unsigned t = 0; t < threads; ++t) {
            threadIdx.x = falling ? threads - 1 - t : t;
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.wait == Wait::RUNS) swapcontext(&home, &fiber.context);
            done += fiber.wait == Wait::DONE;
        }
        if (done == threads) return true;
        bool released = release(0, threads, Wait::BLOCK);
        for (unsigned t = 0; t < threads; t += 32)
            released |= release(t, t + 32, Wait::WARP);
        // a barrier that some threads never reach
        if (!released) return false;
    }
}
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>)
{
    kernel(*static_cast<A*>(args[I])...);
}
template <class... A>
int launch(void (*kernel)(A...), const unsigned* shape, bool falling, void** args)
{
    fibers.clear();
    fibers.resize(shape[3]);
    for (Fiber& fiber : fibers) fiber.stack.resize(1 << 14);
    body = [=] { call(kernel, args, std::index_sequence_for<A...>()); };
    gridDim = {shape[0], shape[1], shape[2]};
    for (blockIdx.z = 0; blockIdx.z < shape[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < shape[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < shape[0]; ++blockIdx.x)
                if (!run_block(shape[3], falling)) return 1;
    return 0;
}
#define EXPORT(name) extern "C" int launch_##name( \
    const unsigned* shape, int falling, void** args) \
{ return launch(name, shape, falling, args); }
"""


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_a_warning(source, real):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    # registers that spill to memory are a warning too
    strict = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills"]
    target = ["-std=c++17", "-arch=sm_90", "-cubin", "-o", "/dev/null"]
    _run([nvcc, *target, *strict, f"-DREAL={real}", str(source)])


def test_every_source_has_kernels():
    assert [len(KERNEL.findall(path.read_text())) for path in SOURCES] == [3, 1]


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
def test_emulation_tells_a_missing_barrier(tmp_path, falling):
    source = """
    extern "C" __global__ __launch_bounds__(64) void turn(REAL* x) {
        __shared__ REAL copy[64];
        copy[threadIdx.x] = x[threadIdx.x];
        BARRIER;
        x[threadIdx.x] = copy[63 - threadIdx.x];
    }"""
    got = []
    for barrier in ("__syncthreads()", "(void)0"):
        text = source.replace("BARRIER", barrier)
        x = np.arange(64.0)
        _Kernel(text, "turn", ("-DREAL=double",), tmp_path, falling)((1,), (64,), (x,))
        got.append(x.tolist())
    assert got[0] == list(range(64))[::-1]
    assert got[1] != got[0]


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class _Kernel:
    """What ``cupy.RawKernel`` is, compiled by g++ and run on this thread."""

    def __init__(self, source, name, options, folder, falling):
        stem = folder / f"{abs(hash((source, options)))}"
        code, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
        if not library.exists():
            exports = "".join(f"EXPORT({x})\n" for x in KERNEL.findall(source))
            code.write_text(SHIM + source + "\n" + exports)
            real = [option for option in options if option.startswith("-D")]
            # an index beyond a tile, or an overflow, stops the process
            trap = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
            flags = ["-std=c++20", "-O2", "-shared", "-fPIC", *trap, *real]
            _run(["g++", *flags, "-o", str(library), str(code)])
        self.launch = getattr(ctypes.CDLL(str(library)), f"launch_{name}")
        self.falling = falling

    def __call__(self, grid, block, args):
        shape = (ctypes.c_uint * 4)(*(*grid, 1, 1)[:3], *block)
        values = [_pointer(x) for x in args]
        pointers = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, values))
        assert self.launch(shape, int(self.falling), pointers) == 0, "barrier diverged"


def _pointer(x):
    """An argument as CuPy passes it: the memory of an array, or a 64-bit integer."""
    if not isinstance(x, np.ndarray):
        return ctypes.c_longlong(x)
    assert x.flags.c_contiguous
    return ctypes.c_void_p(x.ctypes.data)


def _stand_in(folder, falling):
    """NumPy under the name of CuPy."""
    cupy = ModuleType("cupy")
    cupy.__dict__.update({name: getattr(np, name) for name in np.__all__})
    cupy.asnumpy = np.asarray
    # memory that nobody has written is poison
    cupy.empty = lambda shape, dtype: np.full(shape, np.nan, dtype=dtype)
    cupy.RawKernel = lambda source, name, options: _Kernel(
        source, name, options, folder, falling
    )
    stream = SimpleNamespace(synchronize=lambda: None)
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: stream
    )
    return cupy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where emulated kernels are compiled, once for each precision."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module", params=[False, True], ids=["rising", "falling"])
def gpu(folder, request):
    with mock.patch.dict(sys.modules, {"cupy": _stand_in(folder, request.param)}):
        for name in [x for x in sys.modules if x.startswith("fastattn._ops.gpu")]:
            del sys.modules[name]
        softmax, monomials = (
            importlib.import_module(f"fastattn._ops.gpu.{name}")
            for name in ("softmax", "monomials")
        )
    return SimpleNamespace(
        asarray=np.array,
        asnumpy=np.asarray,
        attend=softmax.attend,
        monomials=monomials.monomials,
        moments=monomials.moments,
        means=monomials.means,
    )


# NumPy warns of infinities that CuPy and the references take without a word
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestEmulated(BodyLaws):
    pass
