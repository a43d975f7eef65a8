"""Online learners of a metric, whose every step is a rank-one update of the factor.

A step sees a pair of points, or three, and answers with the vectors a and b of
``U += a b^T``. It applies them to a metric, or to an index, whose points follow.
"""

import math
from collections.abc import Hashable

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.validation import check_number
from sketching.index.mahalanobis import MahalanobisIndex
from sketching.learning.rank_one_step import (
    Learner,
    difference_of,
    no_update,
    rank_one_step,
    sign_of,
)
from sketching.metric.mahalanobis import MahalanobisMetric

# the inverse of a factor is computed anew when it is off by so much
_STALE = 1e-9


class Lego(Learner):
    r"""Learner from distances: LogDet regularised, with exact updates.

    For a pair at squared distance :math:`\hat y` and the target y the step minimises
    :math:`D_{ld}(A', A) + \tfrac\eta2 (y - \bar y)^2`, with :math:`\bar y` the squared
    distance under :math:`A'`, in closed form. A stays positive semidefinite at every
    rate.

    Parameters
    ----------
    metric : MahalanobisMetric or MahalanobisIndex
        What is changed.
    rate : float, optional
        The learning rate :math:`\eta`.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import Lego, MahalanobisMetric
    >>> metric = MahalanobisMetric(np.eye(2))
    >>> learner = Lego(metric, rate=10.0)
    >>> x, x2 = np.array([[0.0, 0.0], [2.0, 0.0]])
    >>> for _ in range(50):
    ...     a, b = learner.update(x, x2, 9.0)
    >>> np.round(metric.distances(x[None], x2[None]), 3)
    array([3.])

    References
    ----------
    Jain, Kulis, Dhillon and Grauman, Online Metric Learning and Fast Similarity
    Search, NIPS 2008.
    """

    def __init__(
        self, metric: MahalanobisMetric | MahalanobisIndex, *, rate: float = 1.0
    ) -> None:
        super().__init__(metric)
        self.rate = check_number("rate", rate, above=0)

    def update(self, x: Array, x2: Array, target: float) -> tuple[Array, Array]:
        """Move the squared distance of two points towards a target.

        Parameters
        ----------
        x, x2 : array, shape (d,)
            The points.
        target : float
            Their squared distance, as it should be.

        Returns
        -------
        a, b : array, shape (k,) and (d,)
            The update, which was applied; zeros where there was nothing to change.
        """
        target = check_number("target", target, least=0)
        factor = self._factor
        u = factor @ difference_of(x, x2, factor)
        square = float(u @ u)
        if square == 0:
            return no_update(factor)
        c = self.rate * target * square - 1
        root = math.hypot(c, 2 * math.sqrt(self.rate) * square)
        # of the two forms of the positive root, the one without cancellation
        ratio = (c + root) / (2 * self.rate * square**2) if c > 0 else 2 / (root - c)
        return self._apply(u * ((math.sqrt(ratio) - 1) / square), u @ factor)


class Itml(Learner):
    r"""Learner from pairs that are near or far.

    Near pairs should have a squared distance of at most ``near``, far ones of at least
    ``far``. A step is Bregman's projection on the constraint of one pair, in the
    LogDet divergence, with a slack.

    Parameters
    ----------
    metric : MahalanobisMetric or MahalanobisIndex
        What is changed.
    near, far : float
        The bounds of squared distances.
    slack : float, optional
        The factor :math:`\gamma`: a larger one enforces constraints more strictly.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import Itml, MahalanobisMetric
    >>> metric = MahalanobisMetric(np.eye(2))
    >>> learner = Itml(metric, near=1.0, far=4.0, slack=100.0)
    >>> x, x2 = np.array([[0.0, 0.0], [2.0, 0.0]])
    >>> a, b = learner.update(x, x2, 1)
    >>> np.round(metric.distances(x[None], x2[None]), 1)
    array([1.])

    References
    ----------
    Davis, Kulis, Jain, Sra and Dhillon, Information-Theoretic Metric Learning,
    doi 10.1145/1273496.1273523.
    """

    def __init__(
        self,
        metric: MahalanobisMetric | MahalanobisIndex,
        *,
        near: float,
        far: float,
        slack: float = 1.0,
    ) -> None:
        super().__init__(metric)
        self.near = check_number("near", near, above=0)
        self.far = check_number("far", far, above=0)
        self.slack = check_number("slack", slack, above=0)
        # multiplier and inverse bound of the pairs that have a name
        self._pairs: dict[Hashable, tuple[float, float]] = {}

    def update(
        self, x: Array, x2: Array, target: float, *, pair: Hashable | None = None
    ) -> tuple[Array, Array]:
        """Bring two points nearer, or apart.

        Parameters
        ----------
        x, x2 : array, shape (d,)
            The points.
        target : {1, -1}
            1 where they should be near, -1 where they should be far.
        pair : hashable, optional
            A name of the pair. Visits to a pair of one name continue where the last one
            stopped: a step that was too long is taken back in part, and with many
            rounds the metric converges to ITML's. Nothing is stored for other pairs.

        Returns
        -------
        a, b : array, shape (k,) and (d,)
            The update, which was applied; zeros where there was nothing to change.
        """
        sign = sign_of(target)
        factor = self._factor
        u = factor @ difference_of(x, x2, factor)
        p = float(u @ u)
        if p == 0:
            return no_update(factor)
        start = 0.0, 1 / (self.near if sign > 0 else self.far)
        multiplier, inverse = self._pairs.get((pair, sign), start)
        share = self.slack / (self.slack + 1)
        alpha = min(multiplier, share * sign * (1 / p - inverse))
        if pair is not None:
            moved = inverse + sign * alpha / self.slack
            self._pairs[pair, sign] = multiplier - alpha, moved
        # 1 + beta p, the square of the factor by which the distance changes
        change = 1 / (1 - sign * alpha * p)
        return self._apply(u * ((math.sqrt(change) - 1) / p), u @ factor)


class Pola(Learner):
    r"""Learner of a metric and a threshold between near and far pairs.

    A pair with y = 1 should have a squared distance of at most :math:`t - 1`, one with
    y = -1 of at least :math:`t + 1`. A step projects metric and threshold on this
    constraint, then the metric on the matrices whose eigenvalues are at least
    ``floor`` and the threshold on :math:`t \ge 1`.

    Parameters
    ----------
    metric : MahalanobisMetric or MahalanobisIndex
        What is changed; its factor is square and has an inverse.
    threshold : float, optional
        The threshold t to begin with.
    floor : float, optional
        The least eigenvalue of A.

    Notes
    -----
    Projecting on the cone takes one eigenvector, as only one eigenvalue can fall below
    the floor. Both projections together are one update of rank one: the change of A is
    of rank two with one positive and one negative eigenvalue, and
    :math:`(U + a b^\top)^\top (U + a b^\top) - A` is any such matrix that keeps A
    positive definite.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import MahalanobisMetric, Pola
    >>> metric = MahalanobisMetric(np.eye(2))
    >>> learner = Pola(metric, threshold=2.0)
    >>> x, x2 = np.array([[0.0, 0.0], [2.0, 0.0]])
    >>> a, b = learner.update(x, x2, 1)
    >>> square = metric.distances(x[None], x2[None]) ** 2
    >>> bool(square[0] <= learner.threshold - 1 + 1e-9)
    True

    References
    ----------
    Shalev-Shwartz, Singer and Ng, Online and Batch Learning of Pseudo-Metrics,
    doi 10.1145/1015330.1015376.
    """

    def __init__(
        self,
        metric: MahalanobisMetric | MahalanobisIndex,
        *,
        threshold: float = 1.0,
        floor: float = 1e-6,
    ) -> None:
        super().__init__(metric)
        self.threshold = check_number("threshold", threshold, least=1)
        self.floor = check_number("floor", floor, above=0)
        factor = self._factor
        if factor.shape[0] != factor.shape[1]:
            raise ValueError(
                f"metric: expected a square factor, got one of shape {factor.shape}"
            )
        least = float(np.linalg.svd(factor, compute_uv=False)[-1] ** 2)
        # the root of the floor, squared, is off by rounding
        if least < self.floor * (1 - 1e-9):
            raise ValueError(
                f"metric: expected eigenvalues of A of at least floor = {self.floor:g}"
                f", got {least:.3g}"
            )
        self._inverse = np.linalg.inv(factor)

    def update(self, x: Array, x2: Array, target: float) -> tuple[Array, Array]:
        """Bring two points nearer, or apart, and move the threshold.

        Parameters
        ----------
        x, x2 : array, shape (d,)
            The points.
        target : {1, -1}
            1 where they should be near, -1 where they should be far.

        Returns
        -------
        a, b : array, shape (d,)
            The update, which was applied; zeros where there was nothing to change.
        """
        sign = sign_of(target)
        factor = self._factor
        v = difference_of(x, x2, factor)
        u = factor @ v
        loss = max(0.0, sign * (float(u @ u) - self.threshold) + 1)
        if loss == 0:
            return no_update(factor)
        tau = loss / (float(v @ v) ** 2 + 1)
        self.threshold = max(1.0, self.threshold + sign * tau)
        if not v.any():
            return no_update(factor)
        p = self._solved(factor, v)
        a, b = rank_one_step(factor, self._inverse, v, p, -sign * tau, self.floor)
        # the inverse follows as the formula of Sherman and Morrison says
        image = self._inverse @ a
        change = np.outer(image, b @ self._inverse)
        self._inverse -= change / (1 + float(b @ image))
        return self._apply(a, b)

    def _solved(self, factor: Array, v: Array) -> Array:
        """Solve ``U^T p = v``, by the stored inverse unless its error is too large."""
        p = v @ self._inverse
        if np.linalg.norm(p @ factor - v) > _STALE * np.linalg.norm(v):
            self._inverse = np.linalg.inv(factor)
            p = v @ self._inverse
        return p


class HingeGradient(Learner):
    r"""Learner by steps down the gradient of a hinge, in the factor itself.

    A pair has the loss :math:`\max(0, y (|U v|^2 - t) + 1)` with a threshold t that
    stays, a triplet the loss :math:`\max(0, |U v|^2 - |U w|^2 + 1)` for the differences
    to the point that should be near and to the one that should be far. The factor may
    have few rows: the rank of the metric.

    Parameters
    ----------
    metric : MahalanobisMetric or MahalanobisIndex
        What is changed.
    rate : float, optional
        The length :math:`\eta` of steps. It must not exceed :math:`1 / |v|^2`: longer
        steps diverge, and are refused.
    threshold : float, optional
        The threshold t.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import HingeGradient, MahalanobisMetric
    >>> metric = MahalanobisMetric(np.eye(2))
    >>> learner = HingeGradient(metric, rate=0.1, threshold=2.0)
    >>> for _ in range(20):
    ...     a, b = learner.update(np.zeros(2), np.array([1.5, 0.0]), 1)
    >>> bool(metric.distances(np.zeros((1, 2)), np.array([[1.5, 0.0]]))[0] <= 1)
    True

    References
    ----------
    Weinberger and Saul, Distance Metric Learning for Large Margin Nearest Neighbor
    Classification, JMLR 10, 2009.
    """

    def __init__(
        self,
        metric: MahalanobisMetric | MahalanobisIndex,
        *,
        rate: float = 0.01,
        threshold: float = 2.0,
    ) -> None:
        super().__init__(metric)
        self.rate = check_number("rate", rate, above=0)
        self.threshold = check_number("threshold", threshold, least=1)

    def update(self, x: Array, x2: Array, target: float) -> tuple[Array, Array]:
        """Bring two points nearer, or apart.

        Parameters
        ----------
        x, x2 : array, shape (d,)
            The points.
        target : {1, -1}
            1 where they should be near, -1 where they should be far.

        Returns
        -------
        a, b : array, shape (k,) and (d,)
            The update, which was applied; zeros where there was nothing to change.
        """
        sign = sign_of(target)
        factor = self._factor
        v = difference_of(x, x2, factor)
        u = factor @ v
        if sign * (float(u @ u) - self.threshold) + 1 <= 0:
            return no_update(factor)
        self._refuse_long(v[None])
        return self._apply(-2 * self.rate * sign * u, v)

    def update_triplet(self, x: Array, near: Array, far: Array) -> tuple[Array, Array]:
        """Bring a point nearer to one than to another.

        Parameters
        ----------
        x, near, far : array, shape (d,)
            The points.

        Returns
        -------
        a, b : array, shape (2, k) and (2, d)
            The two updates, which were applied; zeros where nothing was to change.
        """
        factor = self._factor
        apart = np.stack([difference_of(x, z, factor) for z in (near, far)])
        images = apart @ factor.T
        squares = np.einsum("rk,rk->r", images, images)
        if squares[0] - squares[1] + 1 <= 0:
            return np.zeros_like(images), np.zeros_like(apart)
        self._refuse_long(apart)
        signs = np.array([[-1.0], [1.0]])
        return self._apply(2 * self.rate * signs * images, apart)

    def _refuse_long(self, differences: Array) -> None:
        """Raise if a step overshoots by more than the initial violation."""
        square = float(np.einsum("rd,rd->r", differences, differences).max())
        if self.rate * square > 1:
            raise ValueError(
                f"rate: expected at most {1 / square:.3g} for points whose squared "
                f"difference is {square:.3g}, got {self.rate:g}: longer steps diverge; "
                "give a lower rate or points of a smaller scale"
            )
