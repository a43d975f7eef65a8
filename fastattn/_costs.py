"""What a method costs: counted in multiply-adds, so that a choice is reproducible.

The ratios between kinds of work were measured once (AVX-512, OpenBLAS) and are
constants: which method runs then depends on the inputs and the seed, not on how busy
the machine is. Only the seconds that ``explain`` prints need the speed of this machine.
"""

import time
from functools import cache

import numpy as np

# multiply-adds inside a matrix product that take as long as ...
SOFTMAX = 16.0  # one logit turned into a weight: maximum, exp and sum
MONOMIAL = 6.0  # one monomial, or one landmark's weight, of one row
PASS = 1500.0  # one row read, centred and written by the passes of a low rank


def exact_work(n: int, m: int, d: int, p: int) -> float:
    """Work of exact attention."""
    return n * m * (d + p + SOFTMAX)


def polynomial_work(n: int, m: int, d: int, p: int, rank: int) -> float:
    """Work of the polynomial method with ``rank`` monomials."""
    return (n + m) * (rank * (p + 1 + MONOMIAL) + d * d)


def lowrank_work(n: int, m: int, d: int, p: int, rank: int, landmarks: int) -> float:
    """Work of ``rank`` polynomials and ``landmarks`` with a Gaussian law of queries."""
    functions = rank * (p + MONOMIAL) + landmarks * (d + p + MONOMIAL)
    return (n + m) * (functions + d * (d + 1) + PASS)


def seconds(work: float) -> float:
    """Turn work into seconds of this machine."""
    return work * seconds_a_product()


@cache
def seconds_a_product() -> float:
    """Time one multiply-add in a product of the shape that attention uses."""
    x = np.ones((1024, 64), dtype=np.float32)
    out = np.empty((1024, 1024), dtype=np.float32)
    times = []
    # the best of some: noise only ever adds
    for _ in range(6):
        start = time.perf_counter()
        np.matmul(x, x.T, out=out)
        times.append(time.perf_counter() - start)
    return min(times) / (1024 * 1024 * 64)
