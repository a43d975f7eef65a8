"""Near and far fields of many blocks of queries in a fixed number of launches.

Weights and moments for the blocks come from matrix products and from kernels over
clusters. Then rows attend to lists of keys twice, by one kernel with an online softmax:
to all clusters, whose logits are products of ``[step, step^2, 1]``, and to near keys.
The two answers merge by their log-sum-exps.

Not run on a device yet: the kernels were compiled and emulated on a CPU, the calls of
CuPy were made to a stand-in; block sizes are estimates.
"""

import cupy as cp
import numpy as np

from fastattn._ops.gpu import kernel
from fastattn._ops.gpu.products import THREADS, TILE
from fastattn._ops.multipole import ALIKE, BEND, FIRST_ORDER, LARGEST

# weights of keys and moments of clusters, for the blocks that share a launch
_NUMBERS = 1 << 26
# the most blocks that a grid has in its second and third direction
_LARGEST_GRID = 65535
# as in multipole.cu
_WARPS = THREADS // 32
_SHARED = 8


def describe(query, *, cuts, rows):
    blocks, d = len(cuts) - 1, query.shape[1]
    mean, square = (cp.empty((blocks, d), dtype=query.dtype) for _ in range(2))
    sampled = cp.empty((blocks, rows, d), dtype=query.dtype)
    kernel("multipole.cu", "describe", query.dtype)(
        (blocks,),
        (THREADS,),
        (cp.ascontiguousarray(query), _move(cuts), mean, square, sampled, d, rows),
    )
    return mean, square, sampled


def multipole(
    query, blocks, key, value, metric, *, cuts, start, group, threshold,
    low_precision="",  # noqa: ARG001
):  # fmt: skip
    keys = _Keys(key, value, metric, start, group)
    query = cp.ascontiguousarray(query)
    n, p, dtype = len(query), value.shape[1], query.dtype
    out = cp.empty((n, p), dtype=dtype)
    norm, error = (cp.empty(n, dtype=dtype) for _ in range(2))
    counts = []
    for lo in range(0, len(blocks.mean), keys.shared):
        some = slice(lo, min(lo + keys.shared, len(blocks.mean)))
        field = _Field(keys, *(x[some] for x in blocks), threshold)
        own = np.asarray(cuts)[some.start : some.stop + 1]
        rows = slice(int(own[0]), int(own[-1]))
        out[rows], norm[rows], error[rows] = field.answer(query[rows], own - own[0])
        counts.append(field.counts())
    return out, norm, error, cp.asnumpy(cp.concatenate(counts))


def _move(numbers):
    return cp.asarray(np.ascontiguousarray(numbers, dtype=np.int64))


class _Keys:
    """Keys, values and clusters, with the arrays that every block of queries uses."""

    def __init__(self, key, value, metric, start, group):
        self.key, self.value = cp.ascontiguousarray(key), cp.ascontiguousarray(value)
        self.metric, self.start = metric, _move(start)
        (m, d), self.clusters = key.shape, len(group)
        label = np.repeat(np.arange(self.clusters), np.diff(start))
        self.label, self.group = _move(label), _move(group)
        # groups by their clusters
        cuts = np.searchsorted(group, np.arange(group[-1] + 2))
        self.groups, self.cuts = len(cuts) - 1, _move(cuts)
        self.centre = describe(self.key, cuts=start, rows=0)[0]
        self.local = self.key - self.centre[self.label]
        self.squares = self.local**2
        # numbers that a block of queries takes
        size = 2 * m + self.clusters * (4 * d + 2 * value.shape[1] + self.groups)
        size += self.groups * d * value.shape[1]
        most = _LARGEST_GRID // self.groups
        self.shared = max(1, min(most, _NUMBERS // size))


class _Field:
    """Weights and moments of the keys for some blocks of queries."""

    def __init__(self, keys, mean, square, sampled, threshold):
        self.keys, self.mean, self.dtype = keys, mean, mean.dtype
        tiny = np.finfo(self.dtype).tiny
        length = cp.matmul(square, keys.metric) + tiny
        self.distance = keys.metric / length[:, None]
        # these are logits before the first kernel, zero at near keys after the second
        self.weight = cp.matmul(mean, keys.key.T)
        mass, self.top = (self._clusters() for _ in range(2))
        self._over_clusters("tilt", self.weight, keys.start, mass, self.top)
        growth = _growths(
            cp.matmul(sampled, keys.centre.T) + self.top[:, None, :],
            mass,
            cp.matmul(sampled**2, keys.metric) + tiny,
        )
        self.kind = cp.empty(self.weight.shape, dtype=cp.int8)
        self.total, self.own, self.error = (self._clusters() for _ in range(3))
        self.near, self.first_order = (self._clusters(cp.int64) for _ in range(2))
        limits = (threshold, FIRST_ORDER * threshold, ALIKE, BEND, LARGEST)
        self._over_clusters(
            "classify", self.weight, cp.matmul(square, keys.squares.T), growth,
            keys.start, self.kind, self.total, self.own, self.error, self.near,
            self.first_order, scalars=[self.dtype.type(x) for x in limits],
        )  # fmt: skip
        self.error /= self._safe_total() ** 2
        self._sum_moments()
        self._sum_first_moments()

    def counts(self):
        """Numbers of near keys, of first-order keys and of clusters of each block."""
        kinds = self.near, self.first_order, self.total > 0
        return cp.stack([x.sum(axis=1, dtype=cp.int64) for x in kinds], axis=1)

    def answer(self, query, cuts):
        """Attend from the queries, cut into blocks by ``cuts``."""
        keys, p = self.keys, self.keys.value.shape[1]
        tiles, block = (
            _Tiles(cuts),
            _move(np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))),
        )
        step = query - self.mean[block]
        features = cp.concatenate([step, step**2, cp.ones_like(step[:, :1])], axis=1)
        far, peak, total, error = tiles.attend(
            features, *self._far_field(), self._every_cluster(), keys.clusters
        )
        out = cp.ascontiguousarray(far[:, :p])
        tiles.add_first_moments(far, step, self.moment, out)
        near, other, rest, _ = tiles.attend(
            query, keys.key, keys.value, None, self._list(2, self.near), keys.clusters
        )
        top = cp.maximum(peak, other)
        shrink, shrunk = cp.exp(peak - top), cp.exp(other - top)
        whole = total * shrink + rest * shrunk
        out = out * (shrink / whole)[:, None] + near * (shrunk / whole)[:, None]
        error = error * (shrink / whole) ** 2
        error *= cp.sum(step**2 * self.distance[block], axis=1) ** 2
        return out, top + cp.log(whole), error

    def _far_field(self):
        """Factors, values and remainders of clusters for the far field."""
        keys, total = self.keys, self.total
        log_total = cp.where(total > 0, cp.log(self._safe_total()) + self.top, -cp.inf)
        table = [keys.centre + self.shift, self.variance / 2, log_total[:, :, None]]
        table = cp.concatenate(table, axis=2)
        member = keys.group[:, None] == cp.arange(keys.groups)
        worth = [self.average, self.factor[:, :, None] * member]
        worth = cp.concatenate(worth, axis=2)
        flat = (x.reshape(-1, x.shape[2]) for x in (table, worth))
        return *flat, self.error.ravel()

    def _every_cluster(self):
        """Each block's list of clusters."""
        every = cp.arange(self.total.size + 1)
        return every[:-1], every

    def _list(self, kind, counts):
        """Each block's keys of a kind, and where those of each cluster start."""
        bounds = cp.zeros(counts.size + 1, dtype=cp.int64)
        cp.cumsum(counts.ravel(), out=bounds[1:])
        return cp.ascontiguousarray(cp.nonzero(self.kind == kind)[1]), bounds

    def _sum_moments(self):
        keys = self.keys
        (r, _), (m, d), p = self.total.shape, keys.key.shape, keys.value.shape[1]
        self.shift, self.variance = (self._clusters(width=d) for _ in range(2))
        self.average = self._clusters(width=p)
        kernel("multipole.cu", "field_moments", self.dtype)(
            (keys.clusters, -(-r // _SHARED)),
            (THREADS,),
            (
                self.weight, keys.local, keys.value, keys.start, self.total, self.shift,
                self.variance, self.average, r, m, keys.clusters, d, p,
            ),
        )  # fmt: skip

    def _sum_first_moments(self):
        """First moments of first-order keys, by groups of clusters."""
        keys, r = self.keys, len(self.total)
        (m, d), p, g = keys.key.shape, keys.value.shape[1], keys.groups
        # within a group, relative to one key
        common = cp.exp(self.top - self.top.max(axis=1)[:, None])
        self.moment = cp.empty((r, g, d, p), dtype=self.dtype)
        listed, bounds = self._list(1, self.first_order)
        kernel("multipole.cu", "first_moments", self.dtype)(
            (-(-d // TILE), -(-p // TILE), r * g),
            (THREADS,),
            (
                self.weight, keys.local, keys.value, common, self.shift, self.average,
                listed, bounds, keys.label, keys.cuts, self.moment, g, m, keys.clusters,
                d, p,
            ),
        )  # fmt: skip
        member = (keys.group[:, None] == cp.arange(g)).astype(self.dtype)
        whole = cp.matmul(self.own * common, member)
        whole = cp.where(whole > 0, whole, 1)[:, keys.group]
        self.factor = self.own / self._safe_total() / whole

    def _safe_total(self):
        return cp.where(self.total > 0, self.total, 1)

    def _clusters(self, dtype=None, width=None):
        shape = [len(self.mean), self.keys.clusters]
        if width is not None:
            shape.append(width)
        return cp.empty(shape, dtype=self.dtype if dtype is None else dtype)

    def _over_clusters(self, name, *arrays, scalars=()):
        """Run a kernel with a warp for every block and cluster."""
        grid = -(-self.keys.clusters // _WARPS), len(self.mean)
        counts = self.weight.shape[1], self.keys.clusters
        kernel("multipole.cu", name, self.dtype)(
            grid, (THREADS,), (*arrays, *counts, *scalars)
        )


def _growths(logit, mass, distance):
    """Share of a row that a unit of weight in each cluster is: root mean squares."""
    growth = cp.exp(logit - logit.max(axis=2, keepdims=True))
    growth /= cp.matmul(growth, mass[:, :, None])
    share = distance / distance.sum(axis=1, keepdims=True)
    return cp.sqrt(cp.sum(growth**2 * share[:, :, None], axis=1))


class _Tiles:
    """Tiles of rows, each of one block."""

    def __init__(self, cuts):
        counts = -(-np.diff(cuts) // TILE)
        block = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.asarray(cuts)[block] + TILE * number
        last = np.minimum(first + TILE, np.asarray(cuts)[block + 1])
        self.size = len(block)
        self.arrays = _move(first), _move(last), _move(block)

    def attend(self, query, key, value, rest, lists, step):
        """Sums of values, largest logits, sums of weights, and remainders of rows."""
        rows, width, p, dtype = len(query), query.shape[1], value.shape[1], query.dtype
        sums = cp.empty((rows, p), dtype=dtype)
        peak, squares = (cp.empty(rows, dtype=dtype) for _ in range(2))
        total = cp.empty(rows, dtype=cp.float64)
        kernel("lists.cu", "attend_lists", dtype)(
            (self.size, -(-p // TILE)),
            (THREADS,),
            (
                query, key, value, 0 if rest is None else rest, *lists, *self.arrays,
                sums, peak, total, squares, width, p, step,
            ),
        )  # fmt: skip
        return sums, peak, total, squares

    def add_first_moments(self, far, step, moment, out):
        """Add what rows get from first moments; ``far`` has their growths last."""
        _, groups, d, p = moment.shape
        growth = cp.ascontiguousarray(far[:, p:])
        kernel("lists.cu", "add_first_moments", out.dtype)(
            (self.size, -(-p // TILE)),
            (THREADS,),
            (growth, step, moment, *self.arrays, out, groups, d, p),
        )
