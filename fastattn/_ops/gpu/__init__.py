"""CuPy bodies of the ops, same file and function names as the references.

The CUDA source beside them has been compiled and emulated on a CPU; nothing here has
run on a device yet.
"""

import functools
from importlib import resources

import cupy as cp


@functools.cache
def kernel(file, name, dtype):
    """Return the kernel ``name`` of a source file with REAL set to ``dtype``."""
    source = resources.files("fastattn._ops").joinpath("gpu", file).read_text("utf-8")
    real = {"f": "float", "d": "double"}[dtype.char]
    return cp.RawKernel(source, name, options=("-std=c++17", f"-DREAL={real}"))
