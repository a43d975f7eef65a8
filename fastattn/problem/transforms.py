"""Changes of coordinates of query and key under which attention is invariant.

* Key centring: softmax is invariant to a constant added to a row of logits.
* Query centring: ``q . k = (q - a) . k + a . k``; the second term depends on the key
  only and becomes a weight ``exp(scale a . k)`` of the key.
* Balancing: ``q . k = (T^T q) . (T^-1 k)`` for any invertible ``T``; with the T of
  :func:`balance` queries and keys get the same diagonal covariance, sorted.
"""

from dataclasses import dataclass, replace

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# eigenvalues below this share of the largest are numerically zero
_RELATIVE_FLOOR = 1e-10


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    r"""Coordinates in which the logits are :math:`u \cdot v` plus known terms.

    With :math:`u = (q - a) T_q` and :math:`v = (k - c) T_k`,
    :math:`s\,q \cdot k = u \cdot v + t \cdot (k - c) + s\,q \cdot c`.

    Parameters
    ----------
    query_center, key_center : array, shape (d,)
        The centres :math:`a` and :math:`c`.
    query_map, key_map : array, shape (d, r)
        The maps :math:`T_q` and :math:`T_k`; :math:`T_q T_k^T = s I`.
    tilt : array, shape (d,)
        :math:`t = s\,a`: the key ``k`` carries the weight ``exp(t . (k - c))``.
    scales : array, shape (r,)
        Variance of each coordinate where the transform balances, else ones.
    """

    query_center: Array
    key_center: Array
    query_map: Array
    key_map: Array
    tilt: Array
    scales: Array


def identity(d: int, scale: float) -> Transform:
    """Return the identity; the scale is split between both sides."""
    zero, root = np.zeros(d), abs(scale) ** 0.5 * np.eye(d)
    return Transform(zero, zero, root, np.sign(scale) * root, zero, np.ones(d))


def center(query: Array, key: Array, scale: float, *, queries: bool) -> Transform:
    """Centre the keys and, if ``queries``, the queries, without balancing."""
    plain = identity(query.shape[1], scale)
    mean_query = mean(query) if queries else plain.query_center
    return replace(
        plain, query_center=mean_query, key_center=mean(key), tilt=scale * mean_query
    )


def balance(query: Array, key: Array, scale: float, *, queries: bool) -> Transform:
    r"""Centre, then balance: both sides get the covariance ``diag(scales)``.

    From the factors of the covariances, :math:`L_q^T L_k = U \Sigma W^T`, follow
    :math:`T_q = L_q^{-T} U \sqrt\Sigma` and :math:`T_k = L_k^{-T} W \sqrt\Sigma`.

    Parameters
    ----------
    query, key : array, shapes (n, d) and (m, d)
        All rows, or a sample of them; NumPy arrays.
    scale : float
        The factor of the logits; folded into the maps.
    queries : bool
        Centre the queries as well (keys then carry weights).

    Raises
    ------
    RefusalError
        If entries are so large that their covariances overflow.
    """
    plain = center(query, key, scale, queries=queries)
    if scale == 0:
        return plain
    # huge entries overflow, and matrices that are not finite have no factors
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            left, left_inverse = _factor(query, plain.query_center)
            right, right_inverse = _factor(key, plain.key_center)
            u, sigma, wt = np.linalg.svd(left.T @ right)
    except np.linalg.LinAlgError as error:
        raise RefusalError(
            "query and key cannot be balanced: their covariances overflow; scale query "
            "or key down, or use Exact()"
        ) from error
    root = np.sqrt(np.maximum(sigma, np.finfo(np.float64).tiny))
    # the sign of a negative scale goes to the keys
    return Transform(
        plain.query_center,
        plain.key_center,
        left_inverse.T @ (u * root) * abs(scale) ** 0.5,
        right_inverse.T @ (wt.T * root) * np.sign(scale) * abs(scale) ** 0.5,
        plain.tilt,
        sigma * abs(scale),
    )


def mean(x: Array) -> Array:
    """Mean of the rows in float64."""
    return np.mean(x, axis=0, dtype=np.float64)


def _factor(x: Array, origin: Array) -> tuple[Array, Array]:
    """A square root ``L`` of the covariance of the rows of ``x``, and its inverse."""
    centred = np.asarray(x, dtype=np.float64) - origin
    # in units of the largest entry: squares neither overflow nor underflow
    unit = float(np.abs(centred).max()) or 1.0
    centred /= unit
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    # if all rows are equal the covariance is zero, and any map will do
    floor = values[-1] * _RELATIVE_FLOOR if values[-1] > 0 else 1.0
    root = np.sqrt(np.maximum(values, floor))
    return vectors * (root * unit), (vectors / (root * unit)).T
