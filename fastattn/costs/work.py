"""What a method costs: counted in multiply-adds of a matrix product.

Which method runs compares counts alone; only the seconds that ``explain`` prints need
the speed of this machine.
"""

from fastattn.costs.rates import rates, seconds_a_product
from sketching._lib.threads import single_threaded_blas


def exact_work(n: int, m: int, d: int, p: int, *, logits: int | None = None) -> float:
    """Work of exact attention, over so many logits where rows see some keys only."""
    return (n * m if logits is None else logits) * _pair_work(d, p)


def quantized_work(
    n: int, m: int, d: int, p: int, *, integers: bool, logits: int | None = None
) -> float:
    """Work of attention in products of eight bits, over so many logits."""
    each = _pair_work(d, p, "int8" if integers else "bfloat16")
    return (n * m if logits is None else logits) * each + (n + m) * rates().row


def _pair_work(d: int, p: int, low_precision: str = "") -> float:
    """Work of one query and one key."""
    rate = rates()
    if not low_precision:
        return d + p + rate.softmax
    # four bytes are multiplied where two bfloat16 numbers are
    return ((d / 2 if low_precision == "int8" else d) + p) * rate.coarse + rate.weight


def polynomial_work(n: int, m: int, d: int, p: int, rank: int) -> float:
    """Work of the polynomial method with ``rank`` monomials."""
    return (n + m) * (rank * (p + 1 + rates().monomial) + d * d)


def lowrank_work(n: int, m: int, d: int, p: int, rank: int, landmarks: int) -> float:
    """Work of ``rank`` polynomials and ``landmarks`` with a Gaussian law of queries."""
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
    """Work of near keys and clusters for blocks of queries; counts are a row's."""
    rate = rates()
    keys = (
        4 * m * d + (near + first_order) * (d + p) * rate.gathered + first_order * d * p
    )
    rows = near * _pair_work(d, p, low_precision)
    rows += clusters * (2 * d + p + rate.softmax) * rate.cluster
    return (n + m) * rate.parted + blocks * keys + n * rows


def seconds(work: float) -> float:
    """Turn work into seconds of this machine, spread over the threads of BLAS."""
    with single_threaded_blas() as threads:
        return work * seconds_a_product() / threads
