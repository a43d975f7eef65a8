r"""The numerical rank of a softmax matrix: a lower bound for factored methods.

Where a matrix differs from the softmax matrix, random signs for values, and their
products, make an error in each row whose mean square is the squared norm of the
difference. If for all values in [-1, 1] the error is at most ``error``, no row differs
by more than that in Euclidean norm. With a matrix of rank r the squares of the singular
values beyond the first r sum to at most n times the square of ``error``.

Of small matrices all singular values are computed. For large ones any orthonormal basis
Q gives a bracket: the singular values of :math:`Q^\top A` are at most those of A
(Cauchy), and the remainder has the exact square :math:`|A|^2 - |Q^\top A|^2`.
"""

import math
from collections.abc import Iterator

import numpy as np

from lowerbounds._factored import Factors
from sketching._lib.arrays import Array

# up to this n computing all singular values costs no more than a basis
_SMALL = 1024
# columns of the first basis, and of the last one, as shares of n
_FEW, _MANY = 16, 2
# a bracket is narrow if its ends differ by at most this share, or by 1
_NARROW = 0.05


def numerical_ranks(
    factors: Factors,
    exponent: float,
    errors: tuple[float, ...],
    largest_spectrum: int,
) -> list[tuple[int, int]]:
    """Bracket the least rank that any factored method needs for each additive error.

    Up to ``largest_spectrum`` queries the ends are equal or nearly so. Beyond, matrices
    of order 2 are bracketed by a basis, a small one where it suffices.
    """
    n, order = len(factors.query), len(factors.keys) + 1
    if order > 2 or n <= _SMALL:
        gram = _gram(factors, exponent)
        return _brackets(np.linalg.eigvalsh(gram), float(np.trace(gram)), n, errors)
    matrix = _softmax(factors, exponent)
    total = float(np.einsum("ij,ij->", matrix, matrix))
    found = []
    for squares in _spectra(matrix, n <= largest_spectrum):
        found = _brackets(squares, total, n, errors)
        if all(high - low <= max(1, _NARROW * high) for low, high in found):
            break
    return found


def _spectra(matrix: Array, whole: bool) -> Iterator[Array]:
    """Squared singular values, of larger and larger parts of the matrix."""
    n = len(matrix)
    yield _captured(matrix, n // _FEW)
    if whole:
        yield np.linalg.eigvalsh(matrix @ matrix.T)
    else:
        yield _captured(matrix, n // _MANY)


def _captured(matrix: Array, size: int) -> Array:
    """Squared singular values of the part of a matrix in a basis of so many columns."""
    # any basis gives a bracket: its precision and its randomness do not matter
    rough = matrix.astype(np.float32)
    start = np.random.default_rng(0).standard_normal((len(matrix), size), np.float32)
    basis = np.linalg.qr((rough @ (rough.T @ start)).astype(np.float64))[0]
    part = basis.T @ matrix
    return np.asarray(np.linalg.eigvalsh(part @ part.T))


def _brackets(
    squares: Array, total: float, n: int, errors: tuple[float, ...]
) -> list[tuple[int, int]]:
    """Least and most rank for each error, from some squares and the sum of all."""
    size = len(squares)
    # entry r is the sum of the squares beyond the first r of those known
    tails = np.append(np.cumsum(np.sort(squares.clip(0)))[::-1], 0.0)
    rest = max(total - float(tails[0]), 0.0) if size < n else 0.0
    # eigenvalues in floating point may be slightly negative
    rounding = n * float(np.finfo(np.float64).eps) * total
    found = []
    for error in errors:
        budget = n * error**2
        low = int(np.argmax(tails <= budget + rounding))
        below = np.flatnonzero(tails + rest <= budget - rounding)
        if len(below):
            high = int(below[0])
        else:
            # beyond the basis the squares fall, so that each of the last ones is
            # bounded
            share = max(budget - rounding, 0.0) / max(rest, budget)
            high = math.ceil(n - (n - size) * share)
        found.append((low, high))
    return found


def _softmax(factors: Factors, exponent: float) -> Array:
    """The softmax matrix of one factor of keys."""
    weights = exponent * factors.logits(factors.query)
    weights -= weights.max(axis=1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _gram(factors: Factors, exponent: float) -> Array:
    """Inner products of the rows of the softmax matrix, some tuples after the other."""
    n = len(factors.query)
    peak = np.full((n, 1), -np.inf)
    for block in factors.blocks():
        np.maximum(peak, block.max(axis=1, keepdims=True), out=peak)
    gram, total = np.zeros((n, n)), np.zeros(n)
    for block in factors.blocks():
        weights = np.exp(exponent * (block - peak))
        total += weights.sum(axis=1)
        gram += weights @ weights.T
    return np.asarray(gram / np.outer(total, total))
