"""Summaries of clusters and leaves, of which there are many.

Single rows use the reference: a device computes its matrix products with all leaves,
and with all keys, at once.

Not run on a device yet: the kernel was compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in.
"""

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel
from fastattn._ops.gpu.products import THREADS
from fastattn._ops.multipole_rows import STEPS


def summarise(key, value, value_center, *, start):
    (m, d), p, dtype = key.shape, value.shape[1], key.dtype
    parts = cp.empty((len(start) - 1, 3 * d + p + 3), dtype=dtype)
    along = cp.empty(m, dtype=dtype)
    cuts = cp.asarray(np.ascontiguousarray(start, dtype=np.int64))
    arrays = map(cp.ascontiguousarray, (key, value, value_center))
    kernel("multipole_rows.cu", "summarise", dtype)(
        (len(parts),),
        (THREADS,),
        (*arrays, cuts, parts, along, d, p, STEPS, dtype.type(np.finfo(dtype).tiny)),
    )
    return parts
