"""Covariances with a ridge or shrinkage, and factors of their inverses."""

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.validation import check_choice, check_number

# rows that are centred and squared at a time
_BLOCK = 4096


def shrunk_covariance(points: Array, shrinkage: float | str) -> Array:
    """Estimate the covariance of rows and mix some of the identity into it."""
    n, d = points.shape
    mean = points.mean(axis=0)
    covariance, fourth = np.zeros((d, d)), 0.0
    for start in range(0, n, _BLOCK):
        rows = points[start : start + _BLOCK] - mean
        covariance += rows.T @ rows
        fourth += float(np.sum(np.sum(rows * rows, axis=1) ** 2))
    covariance /= n
    if isinstance(shrinkage, str):
        check_choice("shrinkage", shrinkage, ("ledoit-wolf", "oas"))
        if shrinkage == "oas":
            share = _oas(covariance, n)
        else:
            share = _ledoit_wolf(covariance, fourth, n)
    else:
        share = check_number("shrinkage", shrinkage, least=0)
        if share > 1:
            raise ValueError(f"shrinkage: expected a share of at most 1, got {share}")
        # the rules above are derived for this divisor, the plain estimate is unbiased
        covariance *= n / (n - 1)
    level = float(np.trace(covariance)) / d
    return (1 - share) * covariance + share * level * np.eye(d)


def _ledoit_wolf(covariance: Array, fourth: float, n: int) -> float:
    """Share of the identity that is optimal for many points."""
    d = len(covariance)
    square = float(np.sum(covariance**2))
    spread = square - float(np.trace(covariance)) ** 2 / d
    noise = (fourth / n - square) / n
    return 0.0 if spread <= 0 else float(np.clip(noise / spread, 0, 1))


def _oas(covariance: Array, n: int) -> float:
    """Share of the identity that approximates the oracle's for Gaussian points."""
    d = len(covariance)
    square = float(np.mean(covariance**2))
    level = (float(np.trace(covariance)) / d) ** 2
    bottom = (n + 1) * (square - level / d)
    return 1.0 if bottom == 0 else min((square + level) / bottom, 1.0)


def inverse_factor(covariance: Array, ridge: float, rounding: float = 0.0) -> Array:
    """Return U with ``U^T U = (covariance + ridge I)^-1``.

    ``rounding`` is the relative error of the entries of the covariance.
    """
    ridge = check_number("ridge", ridge, least=0)
    d = len(covariance)
    values, vectors, units = _balanced(covariance + ridge * np.eye(d))
    floor = max(d * np.finfo(np.float64).eps, rounding) * abs(values[-1])
    low = int(np.sum(values <= floor))
    if low:
        raise ValueError(
            f"covariance: {low} of its {d} eigenvalues are zero or negative, in units "
            f"in which its diagonal is one (the least is {values[0]:.3g}, the largest "
            f"{values[-1]:.3g}), so it has no inverse: give a ridge or a shrinkage "
            "above 0"
        )
    factor: Array = vectors.T / np.sqrt(values)[:, None] / units
    return factor


def semidefinite_factor(matrix: Array, rounding: float) -> tuple[Array, Array]:
    """Return U with ``U^T U = matrix``, and the eigenvalues that were taken for zero.

    ``rounding`` is the relative error of the entries of the matrix.
    """
    share = max(len(matrix) * float(np.finfo(np.float64).eps), rounding)
    values, vectors, units = _balanced(matrix)
    top = float(np.abs(values).max())
    if values[0] < -share * top:
        # noise of large entries in small rows is not small in units of those rows
        values, vectors = np.linalg.eigh(matrix)
        units, top = np.ones(len(matrix)), float(np.abs(values).max())
        if values[0] < -share * top:
            raise ValueError(
                "matrix: expected a positive semidefinite matrix, got one with the "
                f"eigenvalue {values[0]:.3g} (the largest is {values[-1]:.3g})"
            )
    is_kept = values > share * top
    if not is_kept.any():
        raise ValueError("matrix: expected a matrix that is not zero")
    dropped = values[~is_kept]
    factor: Array = np.sqrt(values[is_kept])[:, None] * vectors[:, is_kept].T * units
    return factor, dropped


def _balanced(matrix: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues and vectors in units that make the diagonal one, and the units."""
    diagonal = np.diagonal(matrix)
    units = np.sqrt(np.maximum(diagonal, 0))
    # a row without a diagonal is zero, or the matrix is not semidefinite
    units[units == 0] = 1
    values, vectors = np.linalg.eigh(matrix / units[:, None] / units)
    return values, vectors, units
