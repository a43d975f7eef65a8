"""Checks of matrices that a metric is made from."""

from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.validation import check_dense, check_finite


def as_matrix(name: str, x: Any) -> Array:
    """Check a finite, non-empty matrix of real numbers; return it in float64."""
    check_dense(name, x)
    matrix = np.asarray(x)
    if matrix.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got dtype {matrix.dtype}")
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name}: expected a non-empty matrix, got {matrix.shape}")
    matrix = matrix.astype(np.float64)
    check_finite(name, matrix)
    return matrix


def as_symmetric(name: str, x: Any) -> Array:
    """Check a symmetric matrix; return it in float64."""
    matrix = as_matrix(name, x)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: expected a square matrix, got {matrix.shape}")
    skew = float(np.abs(matrix - matrix.T).max())
    scale = float(np.abs(matrix).max())
    if skew > max(1e-8, 8 * rounding_of(x)) * scale:
        raise ValueError(
            f"{name}: expected a symmetric matrix, got one that differs from its "
            f"transpose by {skew:.3g} (its largest entry is {scale:.3g})"
        )
    return (matrix + matrix.T) / 2


def rounding_of(x: Any) -> float:
    """Return the spacing of the numbers that a matrix was computed in."""
    dtype = np.asarray(x).dtype
    kind = dtype if dtype.kind == "f" and dtype.itemsize < 8 else np.float64
    return 4 * float(np.finfo(kind).eps)
