r"""A sample of one head, and the whitening of its queries.

The queries, weighted by their influence on the error, are modelled as Gaussian. In
coordinates ``x`` of a query and ``y`` of a key with :math:`q \cdot k = x \cdot y + t
\cdot k` the Gaussian is standard, and :math:`e^{q \cdot k} = a(k) \sum_\alpha
He_\alpha(x)\, y^\alpha / \sqrt{\alpha!}` with :math:`a(k) = e^{t \cdot k + |y|^2 / 2}`
and orthonormal Hermite polynomials :math:`He_\alpha` (their generating function).
"""

from dataclasses import dataclass, replace

import numpy as np

from fastattn._ops.softmax import attend
from fastattn.costs.policy import POLICY
from fastattn.problem.head import Head, host_rows
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# ridge of the covariance, relative to its mean diagonal and to the squared mean
_RIDGE = 1e-6
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class PlanningSample:
    """Sampled rows of one head for planning, on the host.

    Parameters
    ----------
    query : array, shape (b, d)
        Queries that the whitening is fitted to.
    held : array, shape (h, d)
        Held-out queries, on which errors are estimated.
    key, value : array, shapes (c, d), (c, p)
        Keys with their values in random order: every prefix is a sample, too.
    scale : float
        The factor of the logits.
    """

    query: Array
    held: Array
    key: Array
    value: Array
    scale: float

    @staticmethod
    def of(head: Head, rng: np.random.Generator) -> "PlanningSample":
        """Draw the rows and copy them to the host, in float32 or float64."""
        policy = POLICY.sample
        n, m, _, _ = head.sizes
        held = min(
            max(policy.held[0], min(policy.held[1], n // policy.held_of)), n // 4
        )
        rows = rng.choice(n, min(n, policy.queries + held), replace=False)
        keys = rng.choice(
            m, min(m, policy.most_keys, max(policy.fewest_keys, m // 2)), replace=False
        )
        query = host_rows(head.query, rows)
        return PlanningSample(
            query[held:],
            query[:held],
            host_rows(head.key, keys),
            host_rows(head.value, keys),
            head.scale,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    r"""Affine maps from keys and queries to the coordinates y and x.

    Parameters
    ----------
    center : array, shape (d,)
        The mean key.
    to_key : array, shape (d, t + 1)
        A centred key times this matrix is ``[y, t . k]``.
    to_query, origin : array, shapes (d, t + 1), (t + 1,)
        A query times the matrix, minus the origin, is ``[x, s q . center]``.
    spread : array, shape (t,)
        Mean square of each coordinate of the keys, not increasing; the sum is the
        logit variance.
    offset : float
        Added to ``log a(k)``, so that the mean of ``a`` is one.
    limit : float
        Queries with a logit variance ``sum(spread x^2)`` above it are unreliable.
    longest : float
        Keys whose squared distance from the mean key is above it are far keys.
    share : float
        Effective sample size over number of the queries, weighted by ``1 / D^2`` with
        the softmax denominators ``D``.
    scale : float
        The factor of the logits.
    """

    center: Array
    to_key: Array
    to_query: Array
    origin: Array
    spread: Array
    offset: float
    limit: float
    longest: float
    share: float
    scale: float

    @staticmethod
    def fit(sample: PlanningSample) -> "Whitening":
        """Fit the whitening to a sample; raise ``RefusalError`` if squares overflow."""
        policy = POLICY.sample
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            center, near, longest = _near_keys(sample.key)
            key = near * near.dtype.type(sample.scale)
            second = (key.T @ key).astype(np.float64) / len(key)
            mass = _log_mass(sample.query, key[: policy.mass_keys])
            mean, covariance, level = _query_law(sample.query, mass, second)
            _check_finite(second, covariance)
            root = np.linalg.cholesky(covariance)
            spread, turn = np.linalg.eigh(root.T @ second @ root)
            spread, turn = np.maximum(spread[::-1], 0.0), turn[:, ::-1]
            to_key, to_query = root @ turn, np.linalg.solve(root.T, turn)
            some = key[: policy.fewest_keys].astype(np.float64)
            log = some @ mean + 0.5 * np.sum((some @ to_key) ** 2, axis=1)
            offset = -float(np.log(np.mean(np.exp(log - log.max()))) + log.max())
            _check_finite(to_query, np.asarray(offset))
        return Whitening(
            center,
            sample.scale * np.column_stack([to_key, mean]),
            np.column_stack([to_query, sample.scale * center]),
            np.append(mean @ to_query, 0.0),
            spread,
            offset,
            max(policy.limit * level, 0.01),
            longest,
            effective(np.exp(-2 * mass)) / len(mass),
            sample.scale,
        )

    def keep(self, used: int) -> "Whitening":
        """Return the whitening with its first ``used`` coordinates only."""
        pick = np.append(np.arange(used), len(self.spread))
        return replace(
            self,
            to_key=self.to_key[:, pick],
            to_query=self.to_query[:, pick],
            origin=self.origin[pick],
            spread=self.spread[:used],
        )

    def coordinates(self, key: Array) -> tuple[Array, Array]:
        """Coordinates ``y`` and ``log a`` of the keys that are not far, on the host."""
        centred = key - self.center.astype(key.dtype)
        centred = centred[np.einsum("ij,ij->i", centred, centred) <= self.longest]
        both = centred @ self.to_key.astype(key.dtype)
        y = np.ascontiguousarray(both[:, :-1])
        square = np.einsum("ij,ij->i", y, y)
        return y, both[:, -1] + 0.5 * square + key.dtype.type(self.offset)


def _check_finite(*arrays: Array) -> None:
    """Raise ``RefusalError`` unless all numbers are finite."""
    if not all(np.isfinite(x).all() for x in arrays):
        raise RefusalError("queries or keys are too large: their squares overflow")


def effective(weight: Array) -> float:
    """Effective sample size ``(sum w)^2 / sum w^2``."""
    return float(np.sum(weight) ** 2 / np.sum(weight**2))


def _near_keys(key: Array) -> tuple[Array, Array, float]:
    """Mean key, centred keys that are not far, and the limit of squared lengths."""
    keep = np.ones(len(key), dtype=bool)
    # twice: a huge key shifts the first mean
    for _ in range(2):
        center = key[keep].mean(axis=0, dtype=np.float64)
        centred = key - center.astype(key.dtype)
        length = np.einsum("ij,ij->i", centred, centred)
        median, high = np.quantile(length, [0.5, POLICY.sample.quantile])
        longest = float(max(2 * POLICY.sample.limit * median, high))
        _check_finite(np.asarray(longest))
        keep = length <= longest
        if keep.all():
            break
    return center, centred[keep], longest


def _log_mass(query: Array, key: Array) -> Array:
    """Log-sum-exps of the queries over the keys, less the smallest of them."""
    # only log-sum-exps are needed: values without columns
    _, mass = attend(
        query[None],
        key[None],
        key[None, :, :0],
        scale=1.0,
        prefix_lengths=None,
        rows=1024,
    )
    return (mass[0] - mass.min()).astype(np.float64)


def _query_law(query: Array, mass: Array, second: Array) -> tuple[Array, Array, float]:
    """Weighted mean and covariance of the queries, and their mean logit variance."""
    policy = POLICY.sample
    q = query.astype(np.float64)
    weight = _query_weights(mass, q.shape[1])
    keep = np.ones(len(q), dtype=bool)
    # outlier rows are recomputed exactly: leave them out
    for _ in range(3):
        share = np.where(keep, weight, 0.0) / weight[keep].sum()
        mean = share @ q
        variance = np.sum(((q - mean) @ second) * (q - mean), axis=1)
        level = float(share @ variance)
        before, keep = keep, variance <= policy.limit * level
        keep |= ~keep.any()
        if (keep == before).all():
            break
    covariance = (1 - policy.blend) * _scatter(q, mean, share)
    covariance += policy.blend * _scatter(q, mean, keep / keep.sum())
    d = len(covariance)
    floor = _RIDGE * np.trace(covariance) / d + _ROUNDING * (mean @ mean) + 1e-60
    return mean, covariance + floor * np.eye(d), level


def _query_weights(mass: Array, enough: int) -> Array:
    """Weights of the queries from the logs ``mass`` of their softmax denominators D.

    ``1 / D^2`` is a query's weight in the squared error. Where these weights are nearly
    uniform, ``1 / D`` gave smaller errors; where the effective sample size is below
    ``enough``, the power is reduced.
    """
    power = 2.0
    if effective(np.exp(-2 * mass)) >= len(mass) / 4:
        return np.exp(-mass)
    while effective(np.exp(-power * mass)) < min(enough, len(mass)):
        power *= 0.8
    return np.exp(-power * mass)


def _scatter(x: Array, mean: Array, weight: Array) -> Array:
    return ((x - mean).T * weight) @ (x - mean)
