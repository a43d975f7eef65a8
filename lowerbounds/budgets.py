"""Deciders of a fixed rank: what a budget can decide as the entries grow."""

import math

import numpy as np

from lowerbounds._attention_instance import AttentionInstance
from lowerbounds._factored import LARGEST_DEGREE, polynomial_outputs
from lowerbounds.audit import Decider
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_integer, check_number

# logits that exist at once
_BLOCK = 1 << 22


def polynomial_within(rank: int) -> Decider:
    """Make a decider of the largest polynomial within a number of monomials.

    The answers are those of low-rank attention; they are computed from the logits.

    Parameters
    ----------
    rank : int
        The most monomials: C(d + g, g) for degree g in d coordinates.

    Returns
    -------
    callable
        From an `AttentionInstance` to an output.

    Examples
    --------
    >>> from lowerbounds import decide, orthogonal_vectors, polynomial_within
    >>> from lowerbounds import reduce_to_attention
    >>> instance = orthogonal_vectors(32, 60, planted=False, rng=0)
    >>> made = reduce_to_attention(instance)
    >>> decide(made), made.decide(polynomial_within(32)(made))
    (False, True)
    """
    rank = check_integer("rank", rank, least=1)

    def decider(made: AttentionInstance) -> Array:
        degree = degree_within(made.query.shape[1], rank)
        worth = made.products_of_values()
        step = max(1, _BLOCK // len(worth))
        blocks = [slice(i, i + step) for i in range(0, len(made.query), step)]
        ends = [(float(x.min()), float(x.max())) for x in map(made.logits, blocks)]
        low, high = min(x for x, _ in ends), max(x for _, x in ends)
        output = np.concatenate(
            [
                polynomial_outputs(made.logits(x), worth, low, high, degree)[-1]
                for x in blocks
            ]
        )
        if not np.isfinite(output).all():
            raise RefusalError(f"weights of degree {degree} sum to 0 in some row")
        return output

    return decider


def degree_within(d: int, rank: int) -> int:
    """Find the largest degree in d coordinates within a number of monomials."""
    degree = 0
    while degree < LARGEST_DEGREE and math.comb(d + degree + 1, d) <= rank:
        degree += 1
    return degree


def best_of_rank(rank: int) -> Decider:
    """Make a decider of the best matrix of a rank, by singular values.

    No method would find it without computing all pairs; it shows what the rank allows.

    Parameters
    ----------
    rank : int
        The rank.

    Returns
    -------
    callable
        From an `AttentionInstance` to an output.

    Examples
    --------
    >>> from lowerbounds import best_of_rank, orthogonal_vectors, reduce_to_attention
    >>> made = reduce_to_attention(orthogonal_vectors(32, 40, rng=0))
    >>> best_of_rank(32)(made).shape
    (32,)
    """
    rank = check_integer("rank", rank, least=1)

    def decider(made: AttentionInstance) -> Array:
        logits = made.logits()
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        # left singular vectors, of as many rows as there are queries
        left = np.linalg.eigh(weights @ weights.T)[1][:, -rank:]
        found: Array = left @ (left.T @ (weights @ made.products_of_values()))
        return found

    return decider


def at_entry_bound(made: AttentionInstance, entry_bound: float) -> AttentionInstance:
    """Scale queries and keys to an entry bound; the threshold stays as it is.

    Below the entry bound of the reduction exact attention need not decide right.

    Parameters
    ----------
    made : AttentionInstance
        Inputs of a reduction.
    entry_bound : float
        The largest absolute entry of the inputs returned.

    Returns
    -------
    AttentionInstance
        The same instance with scaled inputs.

    Examples
    --------
    >>> from lowerbounds import at_entry_bound, orthogonal_vectors, reduce_to_attention
    >>> made = reduce_to_attention(orthogonal_vectors(32, 40, rng=0))
    >>> round(at_entry_bound(made, 2.0).entry_bound, 12)
    2.0
    """
    factor = check_number("entry_bound", entry_bound, above=0) / made.entry_bound
    return made.scaled(factor)
