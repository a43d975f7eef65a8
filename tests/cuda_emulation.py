"""A CUDA device that is emulated on a CPU, and NumPy in the place of CuPy.

CUDA source is compiled by g++. Every thread of a block is a fiber that runs up to its
next barrier, in rising or falling order, so that a missing barrier shows as a wrong
answer in one of the two. What this cannot show: speed, limits of a device, and CuPy's
own behaviour.
"""

import ctypes
import importlib
import re
import subprocess
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

KERNEL = re.compile(r'extern "C" __global__ __launch_bounds__\(.*?\) void (\w+)\(')

SHIM = r"""
#include <csetjmp>
#include <ucontext.h>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
using std::exp, std::isfinite;
template <class T> T min(T a, T b) { return b < a ? b : a; }

struct Index { unsigned x, y, z; };
enum class Wait { RUNS, WARP, BLOCK, DONE };
struct Fiber { jmp_buf place; std::vector<char> stack; Wait wait; bool begun; };
static Index threadIdx, blockIdx, gridDim;
static jmp_buf home;
static std::vector<Fiber> fibers;
static std::function<void()> body;

static void pause(Wait why)
{
    Fiber& self = fibers[threadIdx.x];
    self.wait = why;
    if (!_setjmp(self.place)) _longjmp(home, 1);
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
static void enter(Fiber& fiber)
{
    if (_setjmp(home)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&context, begin, 0);
    setcontext(&context);
}
static bool run_block(unsigned threads, bool falling)
{
    for (Fiber& fiber : fibers) fiber.begun = false, fiber.wait = Wait::RUNS;
    for (;;) {
        unsigned done = 0;
        for (unsigned t = 0; t < threads; ++t) {
            threadIdx.x = falling ? threads - 1 - t : t;
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.wait == Wait::RUNS) enter(fiber);
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


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Kernel:
    """``cupy.RawKernel``, compiled by g++ and run on this thread."""

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
            run(["g++", *flags, "-o", str(library), str(code)])
        self.launch = getattr(ctypes.CDLL(str(library)), f"launch_{name}")
        self.falling = falling

    def __call__(self, grid, block, args):
        shape = (ctypes.c_uint * 4)(*(*grid, 1, 1)[:3], *block)
        values = [_pointer(x) for x in args]
        pointers = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, values))
        assert self.launch(shape, int(self.falling), pointers) == 0, "barrier diverged"


def _pointer(x):
    """An argument as CuPy passes it: the memory of an array, or a number."""
    if isinstance(x, np.generic):
        return np.ctypeslib.as_ctypes_type(x.dtype)(x)
    if isinstance(x, int):
        return ctypes.c_longlong(x)
    assert x.flags.c_contiguous
    return ctypes.c_void_p(x.ctypes.data)


def _poisoned(shape, dtype):
    """Memory that nobody has written."""
    out = np.empty(shape, dtype=dtype)
    out.fill(np.nan if out.dtype.kind == "f" else np.iinfo(np.int8).max)
    return out


def stand_in(folder, falling):
    """NumPy under the name of CuPy."""
    cupy = ModuleType("cupy")
    cupy.__dict__.update({name: getattr(np, name) for name in np.__all__})
    cupy.__spec__ = ModuleSpec("cupy", None)
    cupy.is_available = lambda: True
    cupy.asnumpy = np.asarray
    # arrays of NumPy are not to be taken for CuPy's by others
    cupy.ndarray = type("ndarray", (), {})
    cupy.empty = _poisoned
    cupy.RawKernel = lambda source, name, options: Kernel(
        source, name, options, folder, falling
    )
    stream = SimpleNamespace(synchronize=lambda: None)
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: stream
    )
    return cupy


@contextmanager
def emulated(folder, falling):
    """GPU kernels that are imported meanwhile run on the emulated device."""
    with mock.patch.dict(sys.modules, {"cupy": stand_in(folder, falling)}):
        for name in [x for x in sys.modules if "._ops.gpu" in x]:
            del sys.modules[name]
        yield lambda module: importlib.import_module(f"fastattn._ops.gpu.{module}")
