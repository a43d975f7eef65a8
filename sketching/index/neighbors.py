"""Neighbors: the result of kneighbors, a pair with its certificate."""

from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate


class Neighbors(tuple[Array, Array]):
    """Distances and numbers of neighbours: a pair with a certificate.

    Parameters
    ----------
    distances, numbers : array, shape (q, k)
        The pair.
    certificate : Certificate
        What is promised of the distances. Neighbours of the modes ``Exact`` and
        ``Filter`` are the nearest, but for ties within its ``error``.
    examined : array of int, shape (q,)
        How many points each query had an exact distance computed for.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisIndex, MahalanobisMetric
    >>> index = MahalanobisIndex(MahalanobisMetric(np.eye(2)))
    >>> _ = index.insert(np.array([[0.0, 0.0], [3.0, 4.0]]))
    >>> distances, numbers = found = index.kneighbors(np.array([[3.0, 0.0]]), 1)
    >>> distances, numbers
    (array([[3.]]), array([[0]]))
    >>> found.certificate.failure < 1e-12
    True
    """

    certificate: Certificate
    examined: Array

    def __new__(
        cls, distances: Array, numbers: Array, certificate: Certificate, examined: Array
    ) -> "Neighbors":
        """Make the pair and store the other attributes."""
        found = super().__new__(cls, (distances, numbers))
        found.certificate, found.examined = certificate, examined
        return found
