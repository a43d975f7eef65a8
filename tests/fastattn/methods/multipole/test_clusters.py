"""Rows cut into parts of similar ones, and the structure that is made of them."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fastattn import RefusalError
from fastattn._ops.clusters import partition, regroup
from fastattn.methods.multipole.clusters import Clusters
from fastattn.problem.transforms import balance
from tests import oracles
from tests.laws import OpLaws


class TestPartition(OpLaws):
    op = partition

    def inputs(self, rng, dtype, n, m):
        x = rng.standard_normal((n, 3)) * [3, 2, 1]
        parts = 1 + m % 17
        return [x.astype(dtype)], {"parts": parts, "least": 1 + n // 99, "most": n}

    def slack(self, arrays, options):  # noqa: ARG002
        return 0


class TestPartitionOfLongParts(TestPartition):
    def inputs(self, rng, dtype, n, m):
        # skewed: halves at the mean have sizes that differ
        x = np.exp(rng.standard_normal((n, 2)))
        least = 1 + m // 40
        return [x.astype(dtype)], {"parts": 3, "least": least, "most": 2 * least + 5}


class TestRegroup(OpLaws):
    op = regroup

    def inputs(self, rng, dtype, n, m):
        x = rng.standard_normal((n, 4))
        start = np.linspace(0, n, 1 + min(n, 1 + m // 9)).astype(int)
        return [x.astype(dtype), rng.permutation(n)], {"start": start}

    def slack(self, arrays, options):  # noqa: ARG002
        return 0


def cut(x, **options):
    return partition.kernel("cpu")(x, **{"least": 1, "most": len(x), **options})


@pytest.mark.parametrize("kernel", [partition.reference, partition.kernel("cpu")])
@pytest.mark.parametrize("n", [1, 2, 5, 100])
@pytest.mark.parametrize("kind", ["equal rows", "two rows", "one far row", "line"])
def test_parts_hold_every_row_once(kernel, n, kind):
    x = np.zeros((n, 3))
    if kind == "two rows":
        x[::2] = 1
    elif kind == "one far row":
        x[0] = 1e6
    elif kind == "line":
        x[:, 1] = np.arange(n)
    order, start = kernel(x, parts=8, least=2, most=40)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    sizes = np.diff(start)
    assert start[0] == 0
    assert start[-1] == n
    assert sizes.min() >= min(2, n)
    assert sizes.max() <= 40


def test_separate_clusters_are_found(rng):
    # at the corners of a box
    label = np.repeat(np.arange(8), 50)
    centre = (label[:, None] >> np.arange(3)) % 2 * [400, 200, 100]
    x = rng.permutation(centre + rng.standard_normal((400, 3)))
    label = (x > 50) @ [1, 2, 4]
    order, start = cut(x, parts=8)
    for lo, hi in pairwise(start):
        assert len(set(label[order[lo:hi]])) == 1


def test_k_means_never_spreads_the_parts(rng):
    x = rng.standard_normal((2000, 6))

    def within(order, start):
        parts = np.split(x[order], start[1:-1])
        return sum(np.sum((part - part.mean(axis=0)) ** 2) for part in parts)

    order, start = cut(x, parts=32)
    spread = [within(order, start)]
    for _ in range(4):
        order, start = regroup(x, order, start=start)
        assert len(start) <= 33
        assert np.diff(start).min() > 0
        spread.append(within(order, start))
    assert np.all(np.diff(spread) < 0)


def problem(n=500, m=700, d=5, p=3, seed=0):
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal(s) for s in ((n, d), (m, d), (m, p)))
    return 2 * query, key + 3, value


def prepare(query, key, value, scale=0.5, clusters=20, groups=4):
    transform = balance(query, key, scale, queries=False)
    return Clusters.of(key, value, transform, scale, clusters=clusters, groups=groups)


def test_a_threshold_of_zero_is_exact():
    query, key, value = problem()
    structure = prepare(query, key, value)
    blocks = structure.arrange(query, 64)
    got, normalizer, _, _ = structure.query(query, 0.0, blocks)
    truth, log_sum = oracles.attention(query, key, value, scale=0.5)
    np.testing.assert_allclose(got, truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(normalizer, log_sum, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_error_falls_with_the_threshold(scale):
    query, key, value = problem()
    structure = prepare(query, key, value, scale)
    blocks = structure.arrange(query, 64)
    truth, log_sum = oracles.attention(query, key, value, scale=scale)
    errors, logs = [], []
    for threshold in (1e-2, 1e-3, 1e-4, 1e-5):
        got, normalizer, _, _ = structure.query(query, threshold, blocks)
        errors.append(oracles.frobenius_error(got, truth))
        logs.append(np.abs(normalizer - log_sum).max())
    # where all logits are equal, clusters are exact
    assert np.all(np.diff(errors) < 0) or max(errors) < 1e-12
    assert errors[-1] < 2e-3
    assert logs[-1] < 2e-2


def test_more_keys_are_near_at_a_lower_threshold():
    query, key, value = problem()
    structure = prepare(query, key, value)
    blocks = structure.arrange(query, 64)
    near = [structure.answer(blocks, t)[3][:, 0] for t in (1e-2, 1e-3, 1e-4)]
    assert np.all(np.diff(near, axis=0) >= 0)
    assert near[0].sum() < near[2].sum()


def test_equal_keys_of_one_cluster_with_opposite_values_are_exact(rng):
    # their weights are equal for every query: the mean of the values is all there is
    key = np.repeat(3 * rng.standard_normal((10, 4)), 20, axis=0)
    value = np.tile([[1.0], [-1.0]], (100, 1)) * rng.standard_normal((200, 2))
    query = rng.standard_normal((100, 4))
    structure = prepare(query, key, value, clusters=10, groups=2)
    got, _, _, _ = structure.query(query, 1e-9, structure.arrange(query, 50))
    truth, _ = oracles.attention(query, key, value, scale=0.5)
    np.testing.assert_allclose(got, truth, rtol=0, atol=1e-9)


def test_equal_queries_need_no_near_key(rng):
    query, key, value = problem()
    query = np.tile(query[:1], (500, 1))
    structure = prepare(query, key, value)
    blocks = structure.arrange(query, 64)
    got, _, _, counts = structure.answer(blocks, 1e-6)
    truth, _ = oracles.attention(query, key, value, scale=0.5)
    assert counts[:, 0].max() == 0
    np.testing.assert_allclose(got, truth, rtol=0, atol=1e-4)


def test_logits_beyond_the_range_are_refused():
    query, key, value = (x.astype(np.float32) for x in problem())
    key[7] = 1e15
    structure = prepare(query, key, value)
    with pytest.raises(RefusalError, match="logits may reach"):
        structure.arrange(query * 1e10, 64)


def test_bytes_are_those_of_the_arrays():
    structure = prepare(*problem())
    arrays = [getattr(structure, name) for name in structure.__dataclass_fields__]
    assert structure.nbytes == sum(getattr(x, "nbytes", 0) for x in arrays)
    assert structure.nbytes < 8 * (math.prod((700, 8)) + 1000)
