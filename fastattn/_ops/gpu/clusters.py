"""A round of k-means: products with the means by cuBLAS, the rest on the device.

Bisection uses the reference: it chooses each cut by the result of the last one, reads
few rows of a part, and is done once for keys that are used many times.

Not run on a device yet: the kernel was compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in.
"""

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel
from fastattn._ops.gpu.products import THREADS

# products of rows and means that exist at once
_PRODUCTS = 1 << 25


def regroup(x, order, *, start):
    x, (n, d), parts = cp.ascontiguousarray(x), x.shape, len(start) - 1
    mean = cp.empty((parts, d), dtype=x.dtype)
    order = cp.ascontiguousarray(order, dtype=cp.int64)
    cuts = cp.asarray(np.asarray(start, dtype=np.int64))
    kernel("clusters.cu", "part_means", x.dtype)(
        (parts,), (THREADS,), (x, order, cuts, mean, d)
    )
    half = cp.sum(mean**2, axis=1) / 2
    label, rows = cp.empty(n, dtype=cp.int64), max(1, _PRODUCTS // parts)
    for lo in range(0, n, rows):
        block = slice(lo, min(lo + rows, n))
        product = cp.matmul(x[block], mean.T)
        product -= half
        label[block] = cp.argmax(product, axis=1)
    counts = cp.asnumpy(cp.bincount(label, minlength=parts))
    # CuPy's is stable
    order = cp.argsort(label, kind="stable")
    return order, np.cumsum([0, *counts[counts > 0]])
