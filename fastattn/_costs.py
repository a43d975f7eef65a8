"""What a method costs on this machine, from three rates measured once a process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds for one unit of work of each kind.

    Parameters
    ----------
    product : float
        One multiply-add inside a matrix product.
    softmax : float
        One logit turned into a weight: maximum, exp and sum.
    monomial : float
        One monomial of one row.
    """

    product: float
    softmax: float
    monomial: float

    def exact(self, n: int, m: int, d: int, p: int) -> float:
        """Seconds of exact attention."""
        return n * m * ((d + p) * self.product + self.softmax)

    def polynomial(self, n: int, m: int, d: int, p: int, rank: int) -> float:
        """Seconds of the polynomial method with ``rank`` monomials."""
        a_row = rank * ((p + 1) * self.product + self.monomial) + d * d * self.product
        return (n + m) * a_row


@cache
def rates() -> Rates:
    """Measure the rates: about 20 milliseconds, plus the compilation of the ops."""
    from fastattn._ops.monomials import moments
    from fastattn._ops.softmax import attend
    from fastattn.expansions import total_degree

    rng = np.random.default_rng(0)
    wide, narrow = (
        rng.standard_normal((1, 2048, d)).astype(np.float32) for d in (64, 4)
    )

    def exact(x: np.ndarray) -> None:
        attend(x, x, x, scale=0.1, visible=None)

    # two head sizes separate the products from the softmax
    slow, fast = (_seconds(partial(exact, x)) / 2048**2 for x in (wide, narrow))
    product = max((slow - fast) / 120, 1e-12)
    softmax = max(fast - 8 * product, product)
    index, eye = total_degree(4, 6), np.eye(4, dtype=np.float32)
    zero = np.zeros(4, dtype=np.float32)
    features = _seconds(
        lambda: moments(
            narrow[0], narrow[0, :, :1], zero, eye, zero, zero[:1],
            parent=index.parent, coordinate=index.coordinate,
        )
    )  # fmt: skip
    monomial = max(features / (2048 * len(index)) - 2 * product, product)
    return Rates(product, softmax, monomial)


def _seconds(call: Callable[[], None]) -> float:
    """Best of five timed calls after one that compiles: noise only ever adds."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
