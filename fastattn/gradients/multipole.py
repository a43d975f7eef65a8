"""The derivative of attention by near keys and clusters of the others.

Blocks and clusters are those of the answer. Its threshold is only a first guess: what
weights err by averages out over the keys of a cluster in an answer, but not in what
each of these keys gets, and what values have in common makes an answer large, but no
derivative. So a few rows are differentiated by it, and it is scaled by what they show.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._ops.gradient import attend_vjp
from fastattn._ops.multipole_gradient import multipole_vjp
from fastattn.gradients.backward import SLACK, TIME_SHARE, Backward, exact_vjp_work
from fastattn.methods.multipole.clusters import Blocks, Clusters, largest_row_error
from fastattn.methods.multipole.method import Cost, Multipole, arrange, clusters_for
from fastattn.methods.multipole.threshold_search import Trial, choose
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head
from fastattn.problem.row_statistics import high_variance_rows
from fastattn.problem.rows import gather_rows
from sketching._lib.arrays import Array, array_namespace, mover, place_of, to_host
from sketching._lib.certificate import RefusalError

# with fewer logits clusters are not tried unasked: a refusal would cost too much
_LARGE = 1 << 26
# a low rank that takes less than this share of the exact time is tried first
QUICK = 0.15
# time of a derivative in times of an answer
_PASSES = 2.5
# the share of what is allowed that the first derivatives aim at, and later ones do
_AIM, _LESS = 0.65, 0.75
# derivatives that are checked at most
_TRIES = 4
# blocks of a pilot, and rows of each
_BLOCKS, _ROWS = 8, 32
# pilots, and how close to the aim an error says enough
_PILOTS, _CLOSE = 3, 1.4
# the error of a threshold is a power of it
_SLOPE = 0.8
# a share of the keys whose being near changes little, and how much lower a threshold is
# tried then, down to the last
_FEW, _STEP, _SMALLEST = 0.01, 3.0, 1e-10
# a pilot tells no more than this: thresholds change by factors of no more
_FURTHEST = 100.0
# more rows than this share out of reach leave nothing worth having
_MOST_RECOMPUTED = 0.05


def cluster_vjp(
    head: Head,
    grad: Array,
    tol: float,
    rng: np.random.Generator,
    *,
    method: Multipole | None = None,
    limit: float = math.inf,
) -> tuple[Gradients, float]:
    """Differentiate a head by clusters of its keys, and check.

    Returns
    -------
    gradients : tuple of array
        Derivatives by query, key and value.
    error : float
        The largest of their relative Frobenius errors on sampled rows.

    Raises
    ------
    RefusalError
        If logits vary too much within blocks and clusters, no threshold serves, or the
        work is predicted to exceed ``limit``.
    """
    method = Multipole() if method is None else method
    n, m, d, p = head.sizes
    cost = Cost(n, m, d, p)
    count = method.clusters or clusters_for(m)
    clusters, blocks = arrange(head, count, cost, limit / _PASSES, rng)
    # a threshold that is given is all that may make an error
    given = method.threshold
    all_first_order = given is not None
    vjp = _ClusterVjp.of(
        head, grad, clusters, blocks, rng, all_first_order=all_first_order
    )
    if given is not None:
        return vjp.differentiate(given, rng)
    cost = replace(cost, blocks=len(blocks.cuts) - 1)
    threshold = vjp.threshold(tol, cost, limit / _PASSES, rng)
    for number in range(_TRIES):
        if number == _TRIES // 2 or threshold <= _SMALLEST:
            # keys that are alike, near by no threshold, may have other values
            vjp = replace(vjp, all_first_order=True)
            threshold = vjp.threshold(tol, cost, limit / _PASSES, rng)
        gradients, error = vjp.differentiate(threshold, rng)
        if error <= SLACK * tol:
            break
        # what the derivatives lacked says how much more to ask for; more each time
        threshold *= _factor(_LESS * SLACK * tol, error) ** (number + 1)
    return gradients, error


def _factor(wanted: float, error: float) -> float:
    """How many times larger the threshold of an error is than that of another."""
    least = wanted * _FURTHEST**-_SLOPE
    change = min(max(error, least), wanted**2 / least)
    return float((wanted / change) ** (1 / _SLOPE))


def _next(tried: list[tuple[float, float]], aim: float) -> float:
    """Choose a threshold by those that were tried, and their errors."""
    (threshold, error), number = tried[-1], len(tried)
    if number > 1:
        before, old = tried[-2]
        if (error > aim) != (old > aim):
            # an error may be zero
            error = max(error, aim / _FURTHEST)
            slope = math.log(old / error) / math.log(before / threshold)
            return float(threshold * (aim / error) ** (1 / slope))
    # without near keys the error hardly falls: more is asked for each time
    return threshold * _factor(aim, error) ** (number if error > _CLOSE * aim else 1)


def cluster_vjp_if_faster(
    head: Head, grad: Array, tol: float, rng: np.random.Generator, share: float
) -> Gradients | None:
    """Differentiate by clusters that pay and meet ``3 * tol``, if there are any.

    What else there is takes ``share`` of the exact time.
    """
    if head.prefix_lengths is not None or head.logits < _LARGE:
        return None
    # the reference spells out who belongs to which cluster, which never pays
    if multipole_vjp.kernel(place_of(head.query)) is multipole_vjp.reference:
        return None
    limit = TIME_SHARE * share * exact_vjp_work(head)
    try:
        gradients, error = cluster_vjp(head, grad, tol, rng, limit=limit)
    except RefusalError:
        return None
    return gradients if error <= SLACK * tol else None


@dataclass(frozen=True, slots=True, eq=False)
class _ClusterVjp:
    """A head in blocks and clusters, a few rows of a few blocks, and hard rows."""

    head: Head
    grad: Array
    clusters: Clusters
    blocks: Blocks
    sample: Blocks
    outlier_rows: Array
    # good rows of the sample, and what they hand on exactly
    known: list[Any]
    # whether first moments of all far keys are counted
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
        """Draw the few rows, and find the hard ones."""
        sizes = np.diff(blocks.cuts)
        count = min(len(sizes), _BLOCKS)
        some = np.sort(rng.choice(len(sizes), count, replace=False))
        few = np.minimum(sizes[some], _ROWS)
        sample = blocks.subsample(some, few, rng)
        outlier_rows = high_variance_rows(head, rng)
        return _ClusterVjp(
            head, grad, clusters, blocks, sample, outlier_rows, [], all_first_order
        )

    def threshold(
        self, tol: float, cost: Cost, limit: float, rng: np.random.Generator
    ) -> float:
        """Choose the threshold: that of the answer, scaled by what pilots show."""
        found = choose(Trial.of(self.clusters, self.blocks, rng), tol, cost, limit)
        aim, threshold = _AIM * SLACK * tol, found.threshold
        # thresholds with their errors
        tried: list[tuple[float, float]] = []
        last = 0.0
        while len(tried) < _PILOTS:
            row_limit, near = self._row_limit(threshold)
            if cost(replace(found.counts, near=near)) > limit:
                raise RefusalError(
                    f"{near:.0f} near keys a row take more than the work allowed"
                )
            few = near <= last + _FEW * self.head.sizes[1]
            lacking = tried[-1][1] > aim if tried else not self.all_first_order
            if few and lacking and threshold > _SMALLEST:
                # as good as no key has become near: the error is hardly another
                threshold /= _STEP if near else _STEP**2
                continue
            error, last = self._pilot(threshold, row_limit), near
            tried.append((threshold, error))
            threshold = _next(tried, aim)
            if len(tried) > 1 and (error > aim) != (tried[-2][1] > aim):
                # between two that were tried
                break
            if aim / _CLOSE <= error <= aim * _CLOSE:
                break
        return threshold

    def differentiate(
        self, threshold: float, rng: np.random.Generator
    ) -> tuple[Gradients, float]:
        """Differentiate by a threshold, mend rows out of reach, and check."""
        head, clusters, blocks = self.head, self.clusters, self.blocks
        xp, n = head.xp, head.sizes[0]
        limit = np.full(n, self._row_limit(threshold)[0])
        limit[self.outlier_rows] = -1.0
        (query, key, value), *of_rows = self._sums(blocks, limit, threshold)
        back = xp.argsort(blocks.order)
        query, normalizer, delta = (xp.take(x, back, axis=0) for x in (query, *of_rows))
        # centring is undone
        rows = xp.astype(head.query, normalizer.dtype, copy=False)
        normalizer = normalizer + xp.matmul(rows, clusters.offset)
        back = xp.argsort(clusters.order)
        gradients = query, xp.take(key, back, axis=0), xp.take(value, back, axis=0)
        exact_rows = np.flatnonzero(~np.isfinite(to_host(normalizer)))
        if len(exact_rows) > _MOST_RECOMPUTED * n + len(self.outlier_rows):
            raise RefusalError(
                f"Multipole(threshold={threshold:.1e}) fails in {len(exact_rows)} of "
                f"{n} rows: the logits reach beyond what it serves"
            )
        state = Backward(head, self.grad, normalizer, delta).with_exact(exact_rows)
        gradients = state.with_recomputed(gradients, exact_rows)
        return gradients, state.error(gradients, exact_rows, rng)

    def _pilot(self, threshold: float, row_limit: float) -> float:
        """The largest relative error of what the few rows hand on."""
        sample = self.sample
        limit = np.full(self.head.sizes[0], row_limit)
        found, normalizer, _ = self._sums(sample, limit, threshold)
        # rows out of reach are going to be computed exactly
        reliable = np.isfinite(to_host(normalizer))
        error = 0.0
        for x, y in zip(found, self._truth(reliable), strict=True):
            part, truth = (to_host(z).astype(np.float64) for z in (x, y))
            size = float(np.linalg.norm(truth))
            error = max(error, float(np.linalg.norm(part - truth)) / (size or 1.0))
        return error

    def _truth(self, reliable: Array) -> Gradients:
        """What the few rows hand on exactly, but for those that are not good."""
        if self.known and np.array_equal(self.known[0], reliable):
            found: Gradients = self.known[1]
            return found
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
        found = (*self._turned(query, key), value)
        self.known[:] = reliable, found
        return found

    def _sums(
        self, blocks: Blocks, limit: Array, threshold: float
    ) -> tuple[Gradients, Array, Array]:
        """Differentiate blocks: in their order, and keys by cluster.

        Rows whose errors are estimated beyond the limit have infinite normalizers.
        """
        clusters = self.clusters
        move = mover(clusters.key, clusters.key.dtype)
        query, key, value, normalizer, delta = multipole_vjp(
            blocks.query,
            blocks.mean,
            blocks.square,
            blocks.probe,
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
        """Derivatives by queries and keys that are not in balanced coordinates."""
        xp, turn = array_namespace(query), self.clusters.to_query
        # keys are turned by what is inverse to the map of the queries
        back = self.head.scale * np.linalg.pinv(to_host(turn).astype(np.float64))
        move = mover(query, query.dtype)
        return xp.matmul(query, xp.matrix_transpose(turn)), xp.matmul(key, move(back))

    def _row_limit(self, threshold: float) -> tuple[float, float]:
        """How large the estimated error of a row may be, and near keys, by few rows."""
        _, _, error, counts = self.clusters.answer(self.sample, threshold)
        near = float(np.average(counts[:, 0], weights=np.diff(self.sample.cuts)))
        return largest_row_error(error, near / self.head.sizes[1]), near
