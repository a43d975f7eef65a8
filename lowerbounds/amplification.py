r"""From orthogonal vectors to a gap of inner products, by Reed-Solomon codes.

A distributed proof small enough to run: each vector is cut into T blocks of m bits,
block t is the polynomial :math:`X_t` of degree below m over the integers modulo a
prime q that takes the bits as values at 0, ..., m - 1. Two vectors are orthogonal if
and only if :math:`\sum_t X_t Y_t` is 0 at these m points. Given that polynomial, the
advice, both sides check it at all q points: a false one fails at all but
2 (m - 1) of them.
"""

import itertools

import numpy as np

from lowerbounds._instance import VectorInstance, largest_product
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_integer

# bits that one amplified instance may have
_MOST_BITS = 1 << 30


def amplify_gap(
    instance: VectorInstance, *, field: int = 7, block: int = 2
) -> tuple[VectorInstance, ...]:
    r"""Turn a pair of sets into gap instances, one for each advice.

    The instance has orthogonal vectors if and only if one of those returned has a
    solution: an inner product of ``field``, where all others are at most
    ``2 * (block - 1)``.

    Parameters
    ----------
    instance : VectorInstance
        Two sets of vectors, in which orthogonal ones are sought.
    field : int
        The prime q; the gap is q to 2 (m - 1).
    block : int
        The bits m of a block. There are :math:`T = \lceil d / m \rceil` blocks,
        :math:`q^{m-1}` advices and :math:`q^{T+1}` coordinates.

    Returns
    -------
    tuple of VectorInstance
        The gap instances, with their answers.

    Raises
    ------
    ValueError
        If the instance has not two sets in which orthogonal vectors are sought, or
        if ``field`` is no prime above ``2 * (block - 1)`` and the number of blocks.
    RefusalError
        If the vectors would be too long for memory.

    References
    ----------
    S. Aaronson and A. Wigderson, Algebrization, STOC 2008; A. Abboud, A. Rubinstein
    and R. Williams, Distributed PCP theorems for hardness of approximation in P,
    FOCS 2017, arXiv:1706.06407.

    Examples
    --------
    >>> from lowerbounds import amplify_gap, orthogonal_vectors
    >>> instance = orthogonal_vectors(8, 4, rng=1)
    >>> gaps = amplify_gap(instance)
    >>> len(gaps), gaps[0].d, gaps[0].yes, gaps[0].no
    (7, 343, 7, 2)
    >>> any(gap.has_solution for gap in gaps) == instance.has_solution
    True
    """
    field = check_integer("field", field, least=2)
    block = check_integer("block", block, least=1)
    if instance.parts != 2 or not instance.seeks_orthogonal:
        raise ValueError(
            "instance: expected two sets in which orthogonal vectors are sought, got "
            f"{instance.parts} sets with yes={instance.yes}, no={instance.no}"
        )
    blocks = -(-instance.d // block)
    _check_field(field, block, blocks)
    bits = field ** (blocks + 1) * max(len(x) for x in instance.vectors)
    if bits > _MOST_BITS:
        raise RefusalError(
            f"{blocks} blocks make {field}^{blocks + 1} coordinates: take shorter "
            f"vectors (got {instance.d}), a larger block or a smaller field"
        )
    left, right = (_encode(x, field, block) for x in instance.vectors)
    symbols = np.array(list(itertools.product(range(field), repeat=blocks)))
    left = (left[:, :, None, :] == symbols).all(axis=3)
    left = left.reshape(len(left), -1).astype(np.uint8)
    sums = np.einsum("nat,ut->nau", right, symbols) % field
    return tuple(_gap(left, sums, advice, block) for advice in _advices(field, block))


def _gap(left: Array, sums: Array, advice: Array, block: int) -> VectorInstance:
    """Make the instance of one advice, and compute its answer."""
    right = (sums == advice[:, None]).reshape(len(sums), -1).astype(np.uint8)
    found = largest_product((left, right)) >= len(advice)
    return VectorInstance((left, right), None, found, len(advice), 2 * (block - 1))


def _check_field(field: int, block: int, blocks: int) -> None:
    if any(field % divisor == 0 for divisor in range(2, int(field**0.5) + 1)):
        raise ValueError(f"field: expected a prime, got {field}")
    # a sum of so many bits must not be 0 modulo the prime
    least = max(2 * (block - 1), blocks)
    if field <= least:
        raise ValueError(
            f"field: expected a prime above {least}, twice the degree of a block and "
            f"the number of blocks, got {field}"
        )


def _encode(bits: Array, field: int, block: int) -> Array:
    """Values of the blocks' polynomials at all points, ``(n, q, T)``."""
    padded = np.pad(bits.astype(np.int64), ((0, 0), (0, -bits.shape[1] % block)))
    values = padded.reshape(len(bits), -1, block)
    return np.einsum("ntm,am->nat", values, _lagrange(field, block)) % field


def _lagrange(field: int, block: int) -> Array:
    """Values at each point of the polynomials that are 1 at one base point."""
    basis = np.ones((field, block), dtype=np.int64)
    for point, base in itertools.product(range(field), range(block)):
        for other in range(block):
            if other != base:
                inverse = pow(base - other, -1, field)
                basis[point, base] *= (point - other) * inverse
                basis[point, base] %= field
    return basis


def _advices(field: int, block: int) -> list[Array]:
    """Values of all polynomials of degree 2 (m - 1) that are 0 at the base points."""
    points = np.arange(field)
    vanishing = np.ones(field, dtype=np.int64)
    for base in range(block):
        vanishing = vanishing * (points - base) % field
    powers = points ** np.arange(block - 1)[:, None] % field
    return [
        vanishing * (np.array(coefficients, dtype=np.int64) @ powers) % field
        for coefficients in itertools.product(range(field), repeat=block - 1)
    ]
