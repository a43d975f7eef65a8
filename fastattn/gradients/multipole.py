"""Gradients of multipole attention: near keys exactly, far keys by their clusters.

Blocks of queries and clusters of keys are those of the forward pass. Its threshold is
only the first estimate of a threshold for the gradients: errors of weights average out
over the keys of a cluster in the output, but not in the gradient of each key; and a
common offset of the values makes the output large, but no gradient. So pilot runs on a
few rows measure the error of the gradients, and the threshold is scaled by it.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from fastattn._ops.gradient import attend_vjp
from fastattn._ops.multipole_gradient import multipole_vjp
from fastattn.costs.policy import POLICY
from fastattn.costs.power_law import PowerLaw
from fastattn.gradients.backward import SLACK, Backward, exact_vjp_work
from fastattn.methods.multipole.clusters import Blocks, Clusters, largest_row_error
from fastattn.methods.multipole.method import Cost, Multipole, arrange, clusters_for
from fastattn.methods.multipole.threshold_search import Trial, choose
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head, gather_rows
from fastattn.problem.row_statistics import high_variance_rows
from sketching._lib.arrays import Array, array_namespace, mover, place_of, to_host
from sketching._lib.certificate import RefusalError


def cluster_vjp(
    head: Head,
    grad: Array,
    tol: float,
    rng: np.random.Generator,
    *,
    method: Multipole | None = None,
    limit: float = math.inf,
) -> tuple[Gradients, float]:
    """Gradients of a head by clusters of its keys, with an estimate of their error.

    Parameters
    ----------
    head : Head
        A head without a causal mask.
    grad : array, shape (n, p)
        Gradient of the loss with respect to the output.
    tol : float
        Each gradient may have a relative Frobenius error of ``3 * tol``.
    rng : Generator
        Source of the samples.
    method : Multipole, optional
        Number of clusters and threshold; what is None is chosen.
    limit : float
        The budget, in multiply-adds.

    Returns
    -------
    gradients : tuple of array
        With respect to query, key and value.
    error : float
        The largest of their relative Frobenius errors on sampled rows.

    Raises
    ------
    RefusalError
        If logits vary too much within blocks and clusters, no threshold meets ``tol``,
        or the predicted work exceeds ``limit``.
    """
    policy = POLICY.gradients
    method = Multipole() if method is None else method
    n, m, d, p = head.sizes
    cost = Cost(n, m, d, p)
    count = method.clusters or clusters_for(m, POLICY.multipole.keys)
    clusters, blocks = arrange(
        head, count, cost, limit / policy.cluster_passes, rng, POLICY.multipole.groups
    )
    # with a given threshold, the truncation at it must be the only error
    given = method.threshold
    all_first_order = given is not None
    vjp = _ClusterVjp.of(
        head, grad, clusters, blocks, rng, all_first_order=all_first_order
    )
    if given is not None:
        return vjp.differentiate(given, rng)
    cost = replace(cost, blocks=len(blocks.cuts) - 1)
    threshold = vjp.threshold(tol, cost, limit / policy.cluster_passes, rng)
    for number in range(policy.cluster_tries):
        if (
            number == policy.cluster_tries // 2
            or threshold <= POLICY.threshold.smallest
        ):
            # similar keys, far at every threshold, may have different values
            vjp = replace(vjp, all_first_order=True)
            threshold = vjp.threshold(tol, cost, limit / policy.cluster_passes, rng)
        gradients, error = vjp.differentiate(threshold, rng)
        if error <= SLACK * tol:
            break
        # lower the threshold by the measured error; further with each try
        threshold *= _factor(policy.cluster_retarget * SLACK * tol, error) ** (
            number + 1
        )
    return gradients, error


def _factor(wanted: float, error: float) -> float:
    r"""The factor from the threshold of ``error`` to that of ``wanted``.

    :math:`(w / e)^{1 / 0.8}` for the error :math:`e` and the wanted error :math:`w`,
    as errors grow like the power 0.8 of the threshold; between 1/100 and 100.
    """
    least = wanted * POLICY.gradients.furthest**-POLICY.threshold.slope
    change = min(max(error, least), wanted**2 / least)
    return PowerLaw(1.0, change, POLICY.threshold.slope).solve(wanted)


def _next(tried: list[tuple[float, float]], aim: float) -> float:
    """Next threshold of a secant search in logarithms.

    ``tried`` holds pairs of a threshold and its error.
    """
    policy = POLICY.gradients
    (threshold, error), number = tried[-1], len(tried)
    if number > 1:
        before, old = tried[-2]
        if (error > aim) != (old > aim):
            # an error may be zero
            error = max(error, aim / policy.furthest)
            return PowerLaw.fit((before, old), (threshold, error)).solve(aim)
    # without near keys the error hardly falls: take larger steps each time
    return threshold * _factor(aim, error) ** (
        number if error > policy.cluster_close * aim else 1
    )


def cluster_vjp_if_faster(
    head: Head, grad: Array, tol: float, rng: np.random.Generator, share: float
) -> Gradients | None:
    """Gradients by clusters if these are faster and meet ``3 * tol``, else None.

    The best alternative takes ``share`` of the exact time.
    """
    if head.prefix_lengths is not None or head.logits < POLICY.multipole.few_logits:
        return None
    # the reference expands every cluster to its keys, which is slower than exact
    if multipole_vjp.kernel(place_of(head.query)) is multipole_vjp.reference:
        return None
    limit = POLICY.time_share * share * exact_vjp_work(head)
    try:
        gradients, error = cluster_vjp(head, grad, tol, rng, limit=limit)
    except RefusalError:
        return None
    return gradients if error <= SLACK * tol else None


@dataclass(frozen=True, slots=True, eq=False)
class _ClusterVjp:
    """A head in blocks of queries and clusters of keys, with a pilot sample.

    Parameters
    ----------
    head, grad : Head, array of shape (n, p)
        The head, and the gradient of the loss with respect to its output.
    clusters, blocks : Clusters, Blocks
        Of the keys and of the queries.
    sample : Blocks
        A few rows of a few blocks, for pilot runs.
    outlier_rows : integer array
        Rows of high logit variance, which are computed exactly.
    all_first_order : bool
        Whether first moments of all far keys are summed.
    """

    head: Head
    grad: Array
    clusters: Clusters
    blocks: Blocks
    sample: Blocks
    outlier_rows: Array
    all_first_order: bool

    @staticmethod
    def of(
        head: Head,
        grad: Array,
        clusters: Clusters,
        blocks: Blocks,
        rng: np.random.Generator,
        *,
        all_first_order: bool,
    ) -> "_ClusterVjp":
        """Draw the pilot sample, and find the outlier rows."""
        sizes = np.diff(blocks.cuts)
        count = min(len(sizes), POLICY.gradients.sample_blocks)
        some = np.sort(rng.choice(len(sizes), count, replace=False))
        few = np.minimum(sizes[some], POLICY.gradients.sample_rows)
        sample = blocks.subsample(some, few, rng)
        outlier_rows = high_variance_rows(head, rng)
        return _ClusterVjp(
            head, grad, clusters, blocks, sample, outlier_rows, all_first_order
        )

    def threshold(
        self, tol: float, cost: Cost, limit: float, rng: np.random.Generator
    ) -> float:
        """Choose the threshold: that of the forward pass, scaled by pilot runs."""
        policy = POLICY.gradients
        found = choose(Trial.of(self.clusters, self.blocks, rng), tol, cost, limit)
        aim, threshold = policy.cluster_aim * SLACK * tol, found.threshold

        def row_limit(threshold: float) -> tuple[float, float]:
            largest, near = self._row_limit(threshold)
            if cost(replace(found.counts, near=near)) > limit:
                raise RefusalError(f"{near:.0f} near keys a row exceed the budget")
            return largest, near

        # thresholds with their errors
        tried: list[tuple[float, float]] = []
        truth: tuple[Array, Gradients] | None = None
        near, is_missed = 0.0, not self.all_first_order
        for _ in range(policy.cluster_trials):
            few = near + policy.few_near * self.head.sizes[1]
            largest, near = row_limit(threshold)
            # while hardly any key becomes near, the error would be the same
            while is_missed and near <= few and threshold > POLICY.threshold.smallest:
                threshold /= policy.threshold_step if near else policy.threshold_step**2
                largest, near = row_limit(threshold)
            gradients, reliable = self._pilot(threshold, largest)
            if truth is None or not np.array_equal(truth[0], reliable):
                truth = reliable, self._truth(reliable)
            error = _largest_error(gradients, truth[1])
            tried.append((threshold, error))
            threshold, was_missed, is_missed = _next(tried, aim), is_missed, error > aim
            # after a change of sides, interpolated between the last two
            if len(tried) > 1 and is_missed != was_missed:
                break
            if aim / policy.cluster_close <= error <= aim * policy.cluster_close:
                break
        return threshold

    def differentiate(
        self, threshold: float, rng: np.random.Generator
    ) -> tuple[Gradients, float]:
        """Gradients at a threshold, failed rows recomputed exactly, and their error."""
        head, clusters, blocks = self.head, self.clusters, self.blocks
        xp, n = head.xp, head.sizes[0]
        limit = np.full(n, self._row_limit(threshold)[0])
        limit[self.outlier_rows] = -1.0
        (query, key, value), *of_rows = self._sums(blocks, limit, threshold)
        back = xp.argsort(blocks.order)
        query, normalizer, delta = (xp.take(x, back, axis=0) for x in (query, *of_rows))
        # the keys were centered, which shifts the log-sum-exps
        rows = xp.astype(head.query, normalizer.dtype, copy=False)
        normalizer = normalizer + xp.matmul(rows, clusters.offset)
        back = xp.argsort(clusters.order)
        gradients = query, xp.take(key, back, axis=0), xp.take(value, back, axis=0)
        exact_rows = np.flatnonzero(~np.isfinite(to_host(normalizer)))
        if len(exact_rows) > POLICY.gradients.most_recomputed_by_clusters * n + len(
            self.outlier_rows
        ):
            raise RefusalError(
                f"Multipole(threshold={threshold:.1e}) fails in {len(exact_rows)} of "
                f"{n} rows: their logits are too large for these clusters"
            )
        state = Backward(head, self.grad, normalizer, delta).with_exact(exact_rows)
        gradients = state.with_recomputed(gradients, exact_rows)
        return gradients, state.error(gradients, exact_rows, rng)

    def _pilot(self, threshold: float, row_limit: float) -> tuple[Gradients, Array]:
        """Gradients of the pilot sample, and which of its rows are reliable."""
        limit = np.full(self.head.sizes[0], row_limit)
        found, normalizer, _ = self._sums(self.sample, limit, threshold)
        # rows with infinite log-sum-exps will be computed exactly
        return found, np.isfinite(to_host(normalizer))

    def _truth(self, reliable: Array) -> Gradients:
        """Exact gradients of the reliable rows of the pilot sample."""
        sample, clusters = self.sample, self.clusters
        mask = mover(self.grad, self.grad.dtype)(reliable.astype(float))[:, None]
        query, key, value = attend_vjp(
            sample.query,
            clusters.key,
            clusters.value,
            gather_rows(self.grad, sample.order) * mask,
            scale=1.0,
            prefix_lengths=None,
        )
        return (*self._turned(query, key), value)

    def _sums(
        self, blocks: Blocks, limit: Array, threshold: float
    ) -> tuple[Gradients, Array, Array]:
        """Gradients of blocks, in the order of the blocks and of the clusters.

        Rows whose estimated error exceeds ``limit``, shape ``(n,)``, have infinite
        log-sum-exps and contribute zero.
        """
        clusters = self.clusters
        move = mover(clusters.key, clusters.key.dtype)
        query, key, value, normalizer, delta = multipole_vjp(
            blocks.query,
            blocks.statistics,
            clusters.key,
            clusters.value,
            clusters.metric,
            gather_rows(self.grad, blocks.order),
            move(limit[to_host(blocks.order)]),
            cuts=blocks.cuts,
            start=clusters.start,
            group=clusters.group,
            threshold=threshold,
            all_first_order=self.all_first_order,
        )
        return (*self._turned(query, key), value), normalizer, delta

    def _turned(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Gradients of queries and keys from those in balanced coordinates."""
        xp, turn = array_namespace(query), self.clusters.to_query
        # the map of the keys is the inverse transpose of the map of the queries
        back = self.head.scale * np.linalg.pinv(to_host(turn).astype(np.float64))
        move = mover(query, query.dtype)
        return xp.matmul(query, xp.matrix_transpose(turn)), xp.matmul(key, move(back))

    def _row_limit(self, threshold: float) -> tuple[float, float]:
        """Largest estimated error of a row that stays, and near keys per row."""
        _, _, error, counts = self.clusters.answer(self.sample, threshold)
        near = float(np.average(counts[:, 0], weights=np.diff(self.sample.cuts)))
        return largest_row_error(error, near / self.head.sizes[1]), near


def _largest_error(gradients: Gradients, truth: Gradients) -> float:
    """The largest relative Frobenius error of three gradients."""
    error = 0.0
    for x, y in zip(gradients, truth, strict=True):
        part, exact = (to_host(z).astype(np.float64) for z in (x, y))
        size = float(np.linalg.norm(exact))
        error = max(error, float(np.linalg.norm(part - exact)) / (size or 1.0))
    return error
