"""Work of the methods, in multiply-adds of a float32 matrix product.

Methods are chosen by work alone; only the seconds that ``explain`` prints depend on the
speed of this machine.
"""

from fastattn.costs.rates import rates, seconds_a_product
from sketching._lib.threads import single_threaded_blas


def exact_work(n: int, m: int, d: int, p: int, *, logits: int | None = None) -> float:
    """Work of exact attention; ``logits`` is their number under a causal mask."""
    return (n * m if logits is None else logits) * _pair_work(d, p)


def quantized_work(
    n: int, m: int, d: int, p: int, *, integers: bool, logits: int | None = None
) -> float:
    """Work of attention by int8/bfloat16 matmuls; ``logits`` as in ``exact_work``."""
    each = _pair_work(d, p, "int8" if integers else "bfloat16")
    return (n * m if logits is None else logits) * each + (n + m) * rates().row


def _pair_work(d: int, p: int, low_precision: str = "") -> float:
    """Work of one query and one key."""
    rate = rates()
    if not low_precision:
        return d + p + rate.softmax
    # an instruction multiplies four int8 numbers, or two bfloat16 numbers
    return ((d / 2 if low_precision == "int8" else d) + p) * rate.coarse + rate.weight


def polynomial_work(n: int, m: int, d: int, p: int, rank: int) -> float:
    """Work of the polynomial method, ``O((n + m) rank p)``."""
    return (n + m) * (rank * (p + 1 + rates().monomial) + d * d)


def lowrank_work(n: int, m: int, d: int, p: int, rank: int, landmarks: int) -> float:
    """Work of a low rank with ``rank`` Hermite polynomials and ``landmarks``."""
    rate = rates()
    functions = rank * (p + rate.monomial) + landmarks * (d + p + rate.monomial)
    return (n + m) * (functions + d * (d + 1) + rate.row)


def multipole_work(
    n: int,
    m: int,
    d: int,
    p: int,
    *,
    blocks: int,
    clusters: float,
    near: float,
    first_order: float,
    low_precision: str = "",
) -> float:
    """Work of the multipole method with ``blocks`` of queries.

    ``clusters``, ``near`` and ``first_order`` are average numbers per row: of clusters,
    of near keys, and of keys in clusters whose first moments are used.
    """
    rate = rates()
    keys = (
        4 * m * d + (near + first_order) * (d + p) * rate.gathered + first_order * d * p
    )
    rows = near * _pair_work(d, p, low_precision)
    rows += clusters * (2 * d + p + rate.softmax) * rate.cluster
    return (n + m) * rate.parted + blocks * keys + n * rows


def seconds(work: float) -> float:
    """Predict the seconds of some work on this machine, on all BLAS threads."""
    with single_threaded_blas() as threads:
        return work * seconds_a_product() / threads
