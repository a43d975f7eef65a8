"""Few queries over prepared clusters: the op, the tree, and certificates."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import Multipole, RefusalError, load, prepare
from fastattn._ops.multipole_rows import LARGEST, multipole_rows, summarise
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work
from fastattn.prepared.clusters.tree import Tree
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.laws import OpLaws

TOL = 0.1


class TestSummarise(OpLaws):
    op = summarise
    sizes_used = ("m",)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        # wider in one direction, so that the power iteration is well conditioned
        key = rng.standard_normal((m, 5)) * [1, 8, 1, 0.5, 0]
        arrays = key @ rng.standard_normal((5, 5)), rng.standard_normal((m, 3))
        start = np.linspace(0, m, 1 + min(m, 1 + m // 9)).astype(int)
        return [x.astype(dtype) for x in (*arrays, np.ones(3))], {"start": start}

    def slack(self, arrays, options):  # noqa: ARG002
        # variances are up to some hundreds, and computed as differences
        return 1e5 * np.finfo(arrays[0].dtype).eps


def clustered(m, d=8, p=5, seed=0, centres=64, spread=0.25, dtype=np.float64):
    """Keys in clusters, values that depend on them, and queries near some clusters."""
    rng = np.random.default_rng(seed)
    centre, mean = rng.standard_normal((centres, d)), rng.standard_normal((centres, p))
    label = rng.integers(centres, size=m)
    key = 2 * centre[label] + spread * rng.standard_normal((m, d))
    value = mean[label] + 0.3 * rng.standard_normal((m, p))
    query = 2 * centre[rng.integers(centres, size=2000)]
    query = query + spread * rng.standard_normal(query.shape)
    return tuple(x.astype(dtype) for x in (query, key, value))


def planted(m=700, n=9, dtype=np.float64):
    """A tree over few keys, which are in its order, and queries."""
    query, key, value = clustered(m, dtype=dtype)
    order, tree = Tree.of(key, value, key)
    query = (query[:n] / np.sqrt(8)).astype(dtype)
    return query, key[order], value[order], tree


def evaluated(query, key, value, tree, threshold):
    return multipole_rows(
        query,
        key,
        value,
        tree.clusters,
        tree.leaves,
        first=tree.first,
        start=tree.start,
        threshold=threshold,
    )


def prepared_over(key, value, query, **more):
    return prepare(
        key, value, queries=query[:1500], tol=TOL, method=Multipole(), rng=0, **more
    )


def relative(prepared, query, key, value):
    """The error of single rows, one call each, over all of them."""
    got = np.concatenate([prepared.query(q[None]).value for q in query])
    truth, _ = oracles.attention(query, key, value)
    return oracles.frobenius_error(got, truth)


@pytest.mark.parametrize("place", multipole_rows.places)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 3e-2, 10.0])
def test_fast_kernel_agrees_with_reference(place, dtype, threshold):
    query, key, value, tree = planted(dtype=dtype, n=40)
    arrays = query, key, value, tree.clusters, tree.leaves
    options = {"first": tree.first, "start": tree.start, "threshold": threshold}
    got = multipole_rows.kernel(place)(*arrays, **options)
    want = multipole_rows.reference(*arrays, **options)
    slack = 500 * np.finfo(dtype).eps
    for x, y in zip(got[:3], want[:3], strict=True):
        assert x.dtype == y.dtype == dtype
        assert_allclose(x, y, rtol=slack, atol=slack)
    assert_array_equal(got[3], want[3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_summaries_agree_with_reference(dtype):
    _, key, value = clustered(50, dtype=dtype)
    start = np.array([0, 1, 17, 50])
    got = summarise.kernel("cpu")(key, value, value[0], start=start)
    want = summarise.reference(key, value, value[0], start=start)
    assert got.dtype == want.dtype == dtype
    assert_allclose(got, want, atol=100 * np.finfo(dtype).eps)


def test_other_libraries_give_the_same(xp):
    query, key, value, tree = planted()
    want = evaluated(query, key, value, tree, 1e-3)
    arrays = xp.asarrays(query, key, value, tree.clusters, tree.leaves)
    options = {"first": tree.first, "start": tree.start, "threshold": 1e-3}
    got = multipole_rows(*arrays, **options)
    for x, y in zip(got[:3], want[:3], strict=True):
        assert isinstance(x, xp.array_type)
        assert_allclose(np.asarray(x), y, rtol=1e-9, atol=1e-9)
    assert_array_equal(got[3], want[3])


def test_no_threshold_is_exact_attention():
    query, key, value, tree = planted()
    out, norm, error, counts = evaluated(query, key, value, tree, 0.0)
    truth, logarithm = oracles.attention(query, key, value, scale=1.0)
    assert_allclose(out, truth, atol=1e-12)
    assert_allclose(norm, logarithm, atol=1e-12)
    assert_array_equal(error, 0)
    assert_array_equal(counts[:, 1], len(key))


def test_equal_keys_need_no_look():
    rng = np.random.default_rng(0)
    key = np.repeat(rng.standard_normal((5, 3)), 20, axis=0)
    value, query = rng.standard_normal((100, 2)), rng.standard_normal((4, 3))
    cuts = np.arange(0, 101, 20)
    order, tree = Tree.of(key, value, key, cuts)
    # means of equal keys are the keys up to rounding
    out, norm, _, counts = evaluated(query, key[order], value[order], tree, 1e-6)
    truth, logarithm = oracles.attention(query, key, value, scale=1.0)
    assert_allclose(out, truth, atol=1e-12)
    assert_allclose(norm, logarithm, atol=1e-12)
    assert_array_equal(counts, 0)


def test_a_tree_keeps_the_keys_and_their_clusters():
    _, key, value = clustered(900)
    cuts = np.array([0, 10, 500, 900])
    order, tree = Tree.of(key, value, key, cuts)
    for lo, hi in pairwise(cuts):
        assert_array_equal(np.sort(order[lo:hi]), np.arange(lo, hi))
    assert_array_equal(tree.start[tree.first], cuts)
    assert np.all(np.diff(tree.start) > 0)
    both = tree.merge(tree)
    assert both.count == 1800
    twice = [np.concatenate([x[order]] * 2) for x in (key, value)]
    assert_allclose(both.leaves, summarise(*twice, tree.value_center, start=both.start))
    assert_allclose(
        both.clusters,
        summarise(*twice, tree.value_center, start=both.start[both.first]),
    )


def test_large_queries_attend_to_all_keys_exactly():
    # these logits are not normal in any cluster: all keys are attended to exactly
    query, key, value, tree = planted()
    wide = 30 * query
    lead, rest = tree.leaves[:, 8:16], tree.leaves[:, 16:24]
    assert np.min((wide @ lead.T) ** 2 + wide**2 @ rest.T) > LARGEST
    out, _, _, counts = evaluated(wide, key, value, tree, 1e3)
    assert_allclose(out, oracles.attention(wide, key, value, scale=1.0)[0], atol=1e-9)
    assert_array_equal(counts[:, 1], len(key))


@pytest.fixture(scope="module")
def decoding():
    """A structure with a tree, and what it is over."""
    query, key, value = clustered(POLICY.tree.fewest_keys + 1808, dtype=np.float32)
    prepared = prepared_over(key, value, query)
    assert prepared._heads[0].rows.tree is not None
    return prepared, query, key, value


def test_single_rows_are_within_the_certificate(decoding):
    prepared, query, key, value = decoding
    answer = prepared.query(query[1500:])
    assert "held-out queries" in answer.certificate.source
    truth, logarithm = oracles.attention(query[1500:], key, value)
    error = oracles.frobenius_error(answer.value, truth)
    assert 0 < error <= answer.certificate.error <= TOL
    assert np.sqrt(np.mean((answer.log_normalizer - logarithm) ** 2)) <= TOL
    assert prepared.certificate.error == answer.certificate.error
    # rows do not depend on the other rows of a call, except that BLAS may add in
    # another order for one row
    one = prepared.query(query[1500:1501])
    assert_allclose(one.value[0], answer.value[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_certificate_fails_rarely():
    query, key, value = clustered(POLICY.tree.fewest_keys, dtype=np.float32)
    truth, _ = oracles.attention(query, key, value)

    def trial(rng):
        order = rng.permutation(len(query))
        options = {"tol": TOL, "method": Multipole(clusters=100), "rng": rng}
        prepared = prepare(key, value, queries=query[order[:1200]], **options)
        assert prepared._heads[0].rows.tree is not None
        rest = order[1200:]
        got = np.concatenate([prepared.query(query[i][None]).value for i in rest])
        error = oracles.frobenius_error(got, truth[rest])
        return error <= prepared.certificate.error <= TOL

    assert_fails_rarely(trial, failure=0.05, trials=20)


def test_more_rows_at_once_have_to_pay():
    query, key, value = clustered(POLICY.tree.fewest_keys, dtype=np.float32)
    head = prepared_over(key, value, query)._heads[0]
    # a row that takes an eighth of exact attention, which BLAS does faster for many
    eighth = replace(head.rows, work=exact_work(1, head.count, 8, 5) / 8)
    assert eighth.serves(1, head.buffer)
    assert not eighth.serves(64, head.buffer)


def test_most_keys_are_far(decoding):
    prepared, query, _, _ = decoding
    head = prepared._heads[0]
    rows = (query[:300] @ head.transform.query_map).astype(np.float32)
    *_, counts = head.rows.tree.evaluate(rows, head.buffer, head.rows.threshold)
    assert counts[:, 1].mean() < head.count / 4


def test_many_queries_are_still_answered_by_blocks(decoding):
    prepared, query, key, value = decoding
    answer = prepared.query(query[:1024])
    assert "rows computed exactly" in answer.certificate.source
    truth, _ = oracles.attention(query[:1024], key, value)
    assert oracles.frobenius_error(answer.value, truth) <= TOL


def test_strange_queries_are_exact(decoding):
    prepared, query, key, value = decoding
    strange = 5 * np.roll(query[:5], 3, axis=1)
    truth, _ = oracles.attention(strange, key, value)
    got = prepared.query(strange).value
    assert oracles.frobenius_error(got, truth) <= TOL


def test_logits_beyond_the_precision_are_refused(decoding):
    prepared, query, _, _ = decoding
    vast = query[:1] * np.float32(1e38)
    with np.errstate(all="ignore"), pytest.raises(RefusalError, match="overflow"):
        prepared.query(vast)


def test_saving_keeps_every_bit(decoding, tmp_path):
    prepared, query, _, _ = decoding
    prepared.save(tmp_path / "keys.npz")
    again = load(tmp_path / "keys.npz")
    for rows in (query[1500:1501], query[1500:1540]):
        one, other = prepared.query(rows), again.query(rows)
        assert_array_equal(one.value, other.value)
        assert one.certificate.error == other.certificate.error
    assert again.nbytes == prepared.nbytes
    assert again.empty().insert(query[:3], query[:3, :5]).count == 3


def test_recent_keys_go_into_the_tree_and_old_structures_stay_true():
    query, key, value = clustered(POLICY.tree.fewest_keys + 1808)
    start = POLICY.tree.fewest_keys + 100
    prepared = prepared_over(key[:start], value[:start], query)
    before = prepared._heads[0]
    planned = before.rows.tree.count
    ends = [start + 1, start + 900, start + 1100, start + 1500]
    for lo, hi in zip([start, *ends[:-1]], ends, strict=True):
        prepared.insert(key[lo:hi], value[lo:hi])
        head = prepared._heads[0]
        assert head.start[-1] == planned == start
        recent = head.rows.tree.count - planned
        assert recent == (0 if hi - start <= 1024 else 1100)
        error = relative(prepared, query[1500:1540], key[:hi], value[:hi])
        assert error <= prepared.certificate.error <= TOL
    # a structure that others grew from answers over its own keys
    answer = before.answer(query[1500:1540], TOL, "sampled", np.random.default_rng(0))
    truth, _ = oracles.attention(query[1500:1540], key[:start], value[:start])
    assert oracles.frobenius_error(answer.value, truth) <= answer.error


def test_keys_that_break_the_certificate_are_answered_exactly():
    query, key, value = clustered(POLICY.tree.fewest_keys + 1808)
    prepared = prepared_over(key, value, query)
    assert "held-out queries" in prepared.query(query[-1:]).certificate.source
    # they take away most of every answer: what is left is small, its error is not
    some = np.random.default_rng(1).permutation(len(key))[:1000]
    more, away = key[some], -value[some] * len(key) / 1000
    prepared.insert(more, away)
    assert "held-out queries" not in prepared.query(query[-1:]).certificate.source
    keys, values = np.concatenate([key, more]), np.concatenate([value, away])
    assert relative(prepared, query[1500:1540], keys, values) <= 1e-9


@pytest.mark.parametrize("reason", ["few keys", "few queries", "little is far"])
def test_where_it_does_not_pay_few_queries_are_exact(reason):
    count = 2000 if reason == "few keys" else POLICY.tree.fewest_keys + 500
    query, key, value = clustered(count)
    if reason == "little is far":
        # clusters that are wide: a row tells their keys apart
        query, key, value = clustered(count, d=24, spread=0.9)
    given = query[:200] if reason == "few queries" else query[:1500]
    method = Multipole(clusters=2000, threshold=1e-4)
    prepared = prepare(key, value, queries=given, tol=TOL, method=method, rng=0)
    answer = prepared.query(query[-2:])
    truth, _ = oracles.attention(query[-2:], key, value)
    assert_allclose(answer.value, truth, atol=1e-11)
    assert "held-out queries" not in answer.certificate.source
