r"""Orthogonal vectors, k of them, and gaps of inner products, with known answers.

A planted solution must not show in the density of its vectors. Here each of its
coordinates is drawn so that every k - 1 of the k bits are independent, as those of
all other vectors are, and only all k together never are 1.
"""

import math

import numpy as np

from lowerbounds._instance import VectorInstance, largest_product
from sketching._lib.arrays import Array
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_integer, check_number


def orthogonal_vectors(
    n: int,
    d: int,
    *,
    parts: int = 2,
    planted: bool = True,
    p: float = 0.5,
    rng: RandomSource = None,
) -> VectorInstance:
    r"""Draw random 0/1 vectors, with or without a planted orthogonal tuple.

    Every bit is 1 with probability :math:`p`. The bits of the planted tuple follow
    :math:`P(x) = p^{|x|}(1-p)^{k-|x|} - (-1)^{k-|x|} p^k`, under which any
    :math:`k-1` of them are independent and all are never 1.

    Parameters
    ----------
    n, d : int
        Vectors in each set, and their coordinates.
    parts : int
        The number of sets, :math:`k`.
    planted : bool
        Whether to plant a solution. Without, one may still be there by accident:
        `expected_solutions` says how likely, and ``has_solution`` is the truth.
    p : float
        The density of ones; at most 1/2 where a solution is planted.
    rng : int, Generator or None
        The source of randomness.

    Returns
    -------
    VectorInstance
        The vectors, the rows of the planted solution and the answer.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    The planting law: Search-to-decision reductions for k-orthogonal vectors,
    ESA 2025.

    Examples
    --------
    >>> from lowerbounds import orthogonal_vectors
    >>> instance = orthogonal_vectors(64, 40, parts=3, rng=0)
    >>> i, j, k = instance.planted
    >>> x, y, z = instance.vectors
    >>> int((x[i] * y[j] * z[k]).sum()), instance.has_solution
    (0, True)
    """
    n, d, parts = _sizes(n, d, parts)
    p = _density(p)
    if planted and p > 0.5:
        raise ValueError(
            f"p: expected at most 0.5 where a solution is planted, got {p}"
        )
    rng = as_generator(rng)
    vectors = tuple(_bits(rng, (n, d), p) for _ in range(parts))
    if not planted:
        return VectorInstance.from_vectors(*vectors)
    rows = tuple(int(i) for i in rng.integers(n, size=parts))
    first = _bits(rng, (parts - 1, d), p)
    zeros = (parts - 1) - first.sum(axis=0, dtype=np.int64)
    last = rng.random(d) < p * (1 - (-p / (1 - p)) ** zeros)
    for x, i, chosen in zip(vectors, rows, (*first, last), strict=True):
        x[i] = chosen
    return VectorInstance.from_vectors(*vectors, planted=rows)


def gap_inner_product(
    n: int,
    d: int,
    *,
    parts: int = 2,
    planted: bool = True,
    correlation: float = 0.8,
    rng: RandomSource = None,
) -> VectorInstance:
    r"""Draw balanced 0/1 vectors, with or without one correlated tuple.

    The light bulb problem: every vector has :math:`\lfloor d/2 \rfloor` ones in
    random places. The vectors of the planted tuple agree on a share ``correlation``
    of the coordinates, so that their inner product, ``yes``, stands out; ``no`` is
    the largest inner product of all other tuples.

    Parameters
    ----------
    n, d : int
        Vectors in each set, and their coordinates.
    parts : int
        The number of sets, :math:`k`.
    planted : bool
        Whether to plant a correlated tuple.
    correlation : float
        The share of coordinates on which it agrees, above 0 and at most 1.
    rng : int, Generator or None
        The source of randomness.

    Returns
    -------
    VectorInstance
        The vectors, the rows of the planted tuple, the answer and both bounds.

    Raises
    ------
    ValueError
        If a number is out of range, or if d is so small that random tuples have as
        large a product as the planted one.

    Notes
    -----
    The problem serves to test the reductions. It has algorithms that are faster than
    all pairs, so it is not believed to be as hard as orthogonal vectors.

    Examples
    --------
    >>> from lowerbounds import gap_inner_product
    >>> instance = gap_inner_product(32, 64, rng=0)
    >>> instance.yes, instance.no < instance.yes, instance.has_solution
    (29, True, True)
    """
    n, d, parts = _sizes(n, d, parts)
    correlation = check_number("correlation", correlation, above=0)
    if correlation > 1:
        raise ValueError(f"correlation: expected at most 1, got {correlation}")
    rng = as_generator(rng)
    vectors = tuple(
        np.stack([_balanced(rng, d, d // 2) for _ in range(n)]) for _ in range(parts)
    )
    shared = round(correlation * (d // 2))
    yes = shared + (d // 2 - shared) // 2 ** (parts - 1)
    rows = None
    if planted:
        rows = tuple(int(i) for i in rng.integers(n, size=parts))
        for x, i, chosen in zip(
            vectors, rows, _correlated(rng, d, parts, shared, yes), strict=True
        ):
            x[i] = chosen
    no = _largest_beside(vectors, rows)
    if no >= yes:
        raise ValueError(
            f"d: {d} coordinates are too few, random tuples of {parts} reach {no} and "
            f"the planted one {yes}: take a larger d or correlation"
        )
    return VectorInstance(vectors, rows, planted, yes, no)


def expected_solutions(n: int, d: int, *, parts: int = 2, p: float = 0.5) -> float:
    r"""Compute how many orthogonal tuples random vectors hold on average.

    This is :math:`n^k (1 - p^k)^d`.

    Parameters
    ----------
    n, d, parts, p
        As for `orthogonal_vectors`.

    Returns
    -------
    float
        The expected number, a bound on the probability that there is one.

    Examples
    --------
    >>> from lowerbounds import expected_solutions
    >>> round(expected_solutions(4096, 58), 2)
    0.95
    """
    n, d, parts = _sizes(n, d, parts)
    return math.exp(parts * math.log(n) + d * math.log1p(-(_density(p) ** parts)))


def least_dimension(
    n: int, *, parts: int = 2, p: float = 0.5, expected: float = 1.0
) -> int:
    r"""Find the least d at which accidental solutions are rare.

    Parameters
    ----------
    n, parts, p
        As for `orthogonal_vectors`.
    expected : float
        The accidental solutions allowed on average.

    Returns
    -------
    int
        The least :math:`d` with :math:`n^k (1 - p^k)^d` at most ``expected``.

    Examples
    --------
    >>> from lowerbounds import least_dimension
    >>> least_dimension(4096), least_dimension(256, parts=3)
    (58, 125)
    """
    n, _, parts = _sizes(n, 1, parts)
    expected = check_number("expected", expected, above=0)
    needed = parts * math.log(n) - math.log(expected)
    return max(1, math.ceil(needed / -math.log1p(-(_density(p) ** parts))))


def _sizes(n: int, d: int, parts: int) -> tuple[int, int, int]:
    return (
        check_integer("n", n, least=1),
        check_integer("d", d, least=1),
        check_integer("parts", parts, least=2),
    )


def _density(p: float) -> float:
    p = check_number("p", p, above=0)
    if p >= 1:
        raise ValueError(f"p: expected a number below 1, got {p}")
    return p


def _bits(rng: np.random.Generator, shape: tuple[int, int], p: float) -> Array:
    return (rng.random(shape) < p).astype(np.uint8)


def _balanced(rng: np.random.Generator, d: int, ones: int) -> Array:
    """Draw a vector of ``d`` bits with so many ones."""
    x = np.zeros(d, dtype=np.uint8)
    x[rng.choice(d, ones, replace=False)] = 1
    return x


def _correlated(
    rng: np.random.Generator, d: int, parts: int, shared: int, yes: int
) -> Array:
    """Draw balanced vectors that share ones, whose inner product is ``yes``."""
    order, ones, inside = rng.permutation(d), d // 2 - shared, yes - shared
    # on the places left of these half are ones; on all others the vectors are 0
    rest = order[shared : shared + 2 * ones]
    chosen = np.zeros((parts, d), dtype=np.uint8)
    chosen[:, order[:shared]] = 1
    while True:
        for x in chosen[:-1]:
            x[rest] = _balanced(rng, len(rest), ones)
        met = np.bitwise_and.reduce(chosen[:-1])[rest] == 1
        # the last vector must find enough places where all others are 1
        if met.sum() >= inside:
            break
    chosen[-1, rng.choice(rest[met], inside, replace=False)] = 1
    chosen[-1, rng.choice(rest[~met], ones - inside, replace=False)] = 1
    return chosen


def _largest_beside(vectors: tuple[Array, ...], rows: tuple[int, ...] | None) -> int:
    """Find the largest inner product over all tuples but one."""
    if rows is None:
        return largest_product(vectors)
    best = 0
    for s, i in enumerate(rows):
        # the tuples that first differ from the planted one in part s
        same = tuple(x[[j]] for x, j in zip(vectors[:s], rows, strict=False))
        other = np.delete(vectors[s], i, axis=0)
        if len(other):
            best = max(best, largest_product((*same, other, *vectors[s + 1 :])))
    return best
