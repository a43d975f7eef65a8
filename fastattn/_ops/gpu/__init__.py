"""CuPy kernels of the ops, same file and function names as the references.

The CUDA source in this folder has been compiled and emulated on a CPU; nothing here has
run on a device yet.

Ops without a kernel use their references, also for arrays of CuPy. References are as
fast where the time goes into matrix products and few passes over their results:
exponentials of rows, single rows over clusters, the derivative of exact attention,
Strassen, path and window attention, and exact attention over tuples, whose products are
those of ``attend``. They are slow where they loop over parts or polynomials: bisection
of rows, derivatives of low ranks and of clusters, prefixes of tuples.
"""

import functools
from importlib import resources

import cupy as cp

_HEADER = "tiles.cuh"


@functools.cache
def kernel(file, name, dtype):
    """Return the CUDA kernel ``name`` of a source file with REAL set to ``dtype``."""
    folder = resources.files("fastattn._ops").joinpath("gpu")
    source = folder.joinpath(file).read_text("utf-8")
    # inserted here: the run-time compiler has no path to the header
    header = folder.joinpath(_HEADER).read_text("utf-8")
    source = source.replace(f'#include "{_HEADER}"', header)
    real = {"f": "float", "d": "double"}[dtype.char]
    return cp.RawKernel(source, name, options=("-std=c++17", f"-DREAL={real}"))
