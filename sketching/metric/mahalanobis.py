"""Mahalanobis metrics: a factor U of the matrix A = U^T U, which updates change."""

from typing import Any

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.cell import Cell
from sketching._lib.spare import Spare
from sketching._lib.validation import check_dense, check_finite, check_integer
from sketching._ops.updates import changed_factor
from sketching.metric.covariance import (
    inverse_factor,
    semidefinite_factor,
    shrunk_covariance,
)
from sketching.metric.matrices import as_matrix, as_symmetric, rounding_of

# a factor, which is never written in place, and whether it is suspected to be a
# covariance's
_Held = tuple[Array, bool]


class MahalanobisMetric:
    r"""The metric :math:`d_A(x, y) = \sqrt{(x - y)^\top A (x - y)} = |U (x - y)|`.

    The metric is stored as the factor :math:`U` of :math:`A = U^\top U`, in float64, so
    that every update leaves :math:`A` positive semidefinite.

    Parameters
    ----------
    factor : array, shape (k, d)
        The factor :math:`U`; fewer rows than columns make a metric of low rank, in
        which some different points have distance 0.

    Raises
    ------
    TypeError
        If the factor is no array of real numbers.
    ValueError
        If it is no finite, non-empty matrix.

    See Also
    --------
    MahalanobisIndex : Points under such a metric.

    Notes
    -----
    Libraries disagree on which matrix they expect. The Mahalanobis distance has the
    *inverse* of the covariance for :math:`A`; the argument ``VI`` of
    ``scipy.spatial.distance.cdist`` is that inverse, ``V`` of scikit-learn the
    covariance itself, and either may be ignored where it does not apply. Here each
    matrix has its own constructor:

    ============================  ==================================================
    what you have                 the call
    ============================  ==================================================
    the factor U, A = U^T U       ``MahalanobisMetric(U)``
    A itself (a ``VI``)           ``MahalanobisMetric.from_matrix(A)``
    a covariance (a ``V``)        ``MahalanobisMetric.from_covariance(C)``
    points                        ``MahalanobisMetric.from_data(X, ridge=...)``
    ============================  ==================================================

    An index that is filled with points whose covariance is the very ``A`` that
    ``from_matrix`` was given raises an error: there the two were confused.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisMetric
    >>> metric = MahalanobisMetric(np.diag([1.0, 2.0]))
    >>> metric.distances(np.zeros((1, 2)), np.array([[3.0, 2.0]]))
    array([5.])
    >>> metric.update(np.array([1.0, 0.0]), np.array([0.0, 1.0])).factor
    array([[1., 1.],
           [0., 2.]])
    """

    def __init__(self, factor: Array) -> None:
        # only a matrix that came in as A can have been meant as its inverse
        self._cell = Cell((as_matrix("factor", factor).copy(), False))
        self._spare = Spare()
        self._dropped = np.empty(0)

    @classmethod
    def from_matrix(cls, matrix: Array) -> "MahalanobisMetric":
        """Factor a symmetric positive semidefinite matrix A, of any rank.

        Its eigenvalues are computed in units in which its diagonal is one, so that
        columns may have very different units. Those that are zero up to the rounding of
        the matrix are dropped, and can be read from ``dropped``.

        Parameters
        ----------
        matrix : array, shape (d, d)
            The matrix A of the metric: the *inverse* of a covariance, if one is meant.

        Returns
        -------
        MahalanobisMetric
            With a factor of as many rows as A has rank.

        Raises
        ------
        ValueError
            If the matrix is not symmetric, or has a negative eigenvalue beyond
            rounding, or is zero.
        """
        a = as_symmetric("matrix", matrix)
        factor, dropped = semidefinite_factor(a, rounding_of(matrix))
        metric = _metric_of((factor, True))
        metric._dropped = dropped
        return metric

    @classmethod
    def from_covariance(
        cls, covariance: Array, *, ridge: float = 0.0
    ) -> "MahalanobisMetric":
        """Make the metric whose matrix is the inverse of a covariance.

        Parameters
        ----------
        covariance : array, shape (d, d)
            Symmetric; with the ridge positive definite.
        ridge : float, optional
            What is added to the diagonal first.

        Returns
        -------
        MahalanobisMetric
            Its factor whitens: points of that covariance get the identity.

        Raises
        ------
        ValueError
            If covariance and ridge have no inverse to working precision, in units in
            which the diagonal is one.
        """
        rounding = rounding_of(covariance)
        covariance = as_symmetric("covariance", covariance)
        return cls(inverse_factor(covariance, ridge, rounding))

    @classmethod
    def from_data(
        cls, X: Array, *, ridge: float = 0.0, shrinkage: float | str = 0.0
    ) -> "MahalanobisMetric":
        """Estimate the covariance of points and take its inverse.

        Parameters
        ----------
        X : array, shape (n, d)
            One point a row.
        ridge : float, optional
            What is added to the diagonal of the covariance.
        shrinkage : float or {"ledoit-wolf", "oas"}, optional
            The share of ``trace / d`` times the identity that is mixed into the
            covariance, or the rule that picks it.

        Returns
        -------
        MahalanobisMetric
            The metric of the inverse.

        Raises
        ------
        ValueError
            If the covariance has no inverse: too few points, or columns that depend
            on each other, with neither ridge nor shrinkage.

        References
        ----------
        Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance
        matrices, doi 10.1016/S0047-259X(03)00096-4. Chen et al., Shrinkage Algorithms
        for MMSE Covariance Estimation, doi 10.1109/TSP.2010.2053029.
        """
        points = as_matrix("X", X)
        if len(points) < 2:
            raise ValueError("X: expected at least 2 points, got 1")
        return cls(inverse_factor(shrunk_covariance(points, shrinkage), ridge))

    @property
    def _factor(self) -> Array:
        return self._cell.value[0]

    @property
    def factor(self) -> Array:
        """The factor U, ``(k, d)``, as a read-only view."""
        view = self._factor.view()
        view.flags.writeable = False
        return view

    @property
    def dropped(self) -> Array:
        """Eigenvalues that ``from_matrix`` took for zero, where the diagonal is one."""
        return self._dropped.copy()

    @property
    def matrix(self) -> Array:
        """The matrix A, ``(d, d)``."""
        factor = self._factor
        return factor.T @ factor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the factor."""
        k, d = self._factor.shape
        return k, d

    def __repr__(self) -> str:
        k, d = self.shape
        count = len(self._dropped)
        dropped = f", {count} eigenvalues dropped as zero" if count else ""
        return f"MahalanobisMetric(<factor of shape ({k}, {d})>{dropped})"

    def copy(self) -> "MahalanobisMetric":
        """Return a metric of its own with the same factor."""
        other = _metric_of(self._cell.value)
        other._dropped = self._dropped
        return other

    __copy__ = copy

    def whiten(self, X: Array) -> Array:
        """Map rows x to U x, between which Euclidean distance is this metric's.

        Parameters
        ----------
        X : array, shape (n, d)
            One point a row.

        Returns
        -------
        array, shape (n, k)
            In the dtype of the points.
        """
        points = as_points("X", X, self.shape[1])
        return points @ self._factor.T.astype(points.dtype)

    def distances(self, X: Array, Y: Array) -> Array:
        """Measure the distance of each row of ``X`` to the same row of ``Y``.

        Parameters
        ----------
        X, Y : array, shape (n, d)
            One point a row; a single row goes with every other.

        Returns
        -------
        array, shape (n,)
            The distances, in float64.
        """
        d = self.shape[1]
        x, y = (as_points(name, z, d) for name, z in (("X", X), ("Y", Y)))
        if len(x) != len(y) and 1 not in (len(x), len(y)):
            raise ValueError(f"Y: expected {len(x)} rows like X, got {len(y)}")
        difference = x.astype(np.float64) - y
        return np.linalg.norm(difference @ self._factor.T, axis=1)

    def update(self, a: Array | int, b: Array) -> "MahalanobisMetric":
        r"""Change the factor by :math:`U \mathrel{+}= a b^\top`, in place.

        Parameters
        ----------
        a : array, shape (k,) or (r, k), or int
            The left vector; rows of a batch are added one after the other, which is
            :math:`U \mathrel{+}= \sum_t a_t b_t^\top`; an int is the number of the
            one row of U that changes.
        b : array, shape (d,) or (r, d)
            The right vector, or as many as ``a`` has.

        Returns
        -------
        MahalanobisMetric
            This metric.
        """
        left, right = as_update(a, b, self.shape)

        def change(held: _Held) -> tuple[_Held, None]:
            factor, _ = changed_factor(held[0], left, right, out=self._spare.take())
            self._spare.keep(held[0])
            return (factor, False), None

        self._cell.change(change)
        return self

    def refuse_covariance_of(self, points: Array) -> None:
        """Raise where the matrix of the metric is the covariance of the points.

        The two are distinguished by their products with one vector, in units in which
        the points have variance one. Where the covariance is its own inverse, as after
        whitening, they cannot be confused.
        """
        factor, is_suspect = self._cell.value
        if not is_suspect or len(points) < 3:
            return
        probe = np.random.default_rng(0).standard_normal(points.shape[1])
        centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
        spread = centred.std(axis=0)
        spread[spread == 0] = 1
        centred /= spread
        image = centred.T @ (centred @ probe)
        inverse, factor = factor * spread, factor / spread
        product = factor.T @ (factor @ probe)
        again = centred.T @ (centred @ (inverse.T @ (inverse @ probe)))
        again /= len(points) - 1
        if np.linalg.norm(again - probe) < 0.01 * np.linalg.norm(probe):
            return
        for divisor in (len(points) - 1, len(points)):
            apart = np.linalg.norm(image / divisor - product)
            if apart < 1e-4 * np.linalg.norm(product):
                raise ValueError(
                    "metric: its matrix A is the covariance of the points, where "
                    "Mahalanobis distances want its inverse: use "
                    "MahalanobisMetric.from_covariance(C), or MahalanobisMetric(U) "
                    "with A = U^T U where A is meant"
                )


def updated_metric(
    metric: MahalanobisMetric, left: Array, right: Array, out: Array | None
) -> tuple[MahalanobisMetric, Array]:
    """Return the metric after a checked update, and ``U_t^T a_t`` before each of it.

    ``out`` is memory for the factor, which may be overwritten.
    """
    # an update of one row is an update of all with zeros in the other rows
    factor, images = changed_factor(metric._factor, left, right, out=out)
    return _metric_of((factor, False)), images


def _metric_of(held: _Held) -> MahalanobisMetric:
    """Make a metric of a factor that nobody changes."""
    metric = object.__new__(MahalanobisMetric)
    metric._cell, metric._spare, metric._dropped = Cell(held), Spare(), np.empty(0)
    return metric


def as_update(a: Any, b: Any, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Check an update; return its vectors as rows, ``(r, k)`` and ``(r, d)``."""
    k, d = shape
    if np.ndim(a) == 0:
        row = check_integer("a", a, least=-k)
        if row >= k:
            raise ValueError(f"a: expected a row of the factor below {k}, got {row}")
        a = np.eye(1, k, row % k)[0]
    left, right = (np.asarray(x) for x in (a, b))
    if left.ndim == right.ndim == 1:
        left, right = left[None], right[None]
    left, right = as_matrix("a", left), as_matrix("b", right)
    for name, x, width in (("a", left, k), ("b", right, d)):
        if x.shape[1] != width:
            raise ValueError(
                f"{name}: expected vectors of {width} entries, got shape {x.shape}"
            )
    if len(left) != len(right):
        raise ValueError(f"b: expected {len(left)} vectors like a, got {len(right)}")
    return left, right


def as_points(name: str, x: Any, d: int) -> Array:
    """Check points of ``d`` entries; half precision and integers are widened."""
    check_dense(name, x)
    points = np.asarray(x)
    if points.ndim != 2 or points.shape[1] != d:
        raise ValueError(f"{name}: expected shape (n, {d}), got {points.shape}")
    if points.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got dtype {points.dtype}")
    if points.dtype.kind == "f" and points.dtype.itemsize <= 4:
        points = points.astype(np.float32, copy=False)
    else:
        points = points.astype(np.float64, copy=False)
    if points.size:
        check_finite(name, points)
    return points
