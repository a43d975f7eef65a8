"""Prepared structures: laws, and the failure rates of their certificates."""

import tracemalloc

import numpy as np
import pytest

from fastattn import Auto, Exact, Multipole, Polynomial, RefusalError, load, prepare
from fastattn.prepared.held_out import QuerySplit
from fastattn.problem.head import Head
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.prepared_laws import PreparedLaws, problem


class TestExact(PreparedLaws):
    options = {"method": Exact(), "tol": 1e-2}  # noqa: RUF012
    exact = True


class TestAuto(PreparedLaws):
    options = {"method": Auto(), "tol": 0.1}  # noqa: RUF012

    def test_sums_take_the_place_of_the_keys(self):
        query, key, value = problem()
        found = self.prepare(key, value, query).plan
        assert isinstance(found.method, Polynomial)
        exact = self.prepare(key, value, query, method=Exact()).plan
        assert found.predicted_seconds < exact.predicted_seconds

    def test_sharp_heads_keep_their_keys(self):
        query, key, value = problem()
        plan = self.prepare(20 * key, value, query).plan
        assert isinstance(plan.method, Exact)
        assert "variance" in plan.reason

    def test_few_queries_keep_the_keys(self):
        query, key, value = problem()
        prepared = self.prepare(key, value, query[:1])
        assert "too few" in prepared.plan.reason
        self.assert_true(prepared.query(query), query, key, value)

    def test_a_tolerance_beyond_all_polynomials_keeps_the_keys(self):
        query, key, value = problem()
        prepared = self.prepare(key, value, query, tol=1e-11)
        assert isinstance(prepared.plan.method, Exact)
        assert prepared.query(query).certificate.error <= 1e-11


class TestMonomials(PreparedLaws):
    options = {"method": Polynomial(degree=3), "tol": 0.1}  # noqa: RUF012


class TestHermite(PreparedLaws):
    options = {  # noqa: RUF012
        "method": Polynomial(degree=3, basis="hermite"),
        "tol": 0.1,
    }


class TestLandmarks(PreparedLaws):
    options = {"method": Polynomial(rank=5, landmarks=60), "tol": 0.1}  # noqa: RUF012
    # the projection onto correlated landmarks enlarges what is rounded
    rounding = 1e-7


class TestMultipole(PreparedLaws):
    options = {"method": Multipole(), "tol": 0.1}  # noqa: RUF012
    exact = True

    def test_many_keys_are_clustered_and_recent_ones_are_not(self, tmp_path):
        query, key, value = problem(n=3000, m=6000)
        prepared = self.prepare(key[:4000], value[:4000], query[:1500])
        head = prepared._heads[0]
        assert head.start[-1] == 4000
        prepared.insert(key[4000:4500], value[4000:4500])
        assert prepared._heads[0].start[-1] == 4000
        answer = prepared.query(query[1500:])
        assert "rows computed exactly" in answer.certificate.source
        self.assert_true(answer, query[1500:], key[:4500], value[:4500])
        prepared.insert(key[4500:], value[4500:])
        assert prepared._heads[0].start[-1] == 6000
        self.assert_true(prepared.query(query[1500:]), query[1500:], key, value)
        prepared.save(tmp_path / "keys.npz")
        again = load(tmp_path / "keys.npz").query(query[1500:])
        np.testing.assert_array_equal(again.value, prepared.query(query[1500:]).value)

    def test_merging_clusters_keeps_the_certificate(self):
        query, key, value = problem(n=3000, m=6000)
        whole = self.prepare(key, value, query[:1500])
        left = whole.empty().insert(key[:2500], value[:2500])
        left.merge(whole.empty().insert(key[2500:], value[2500:]))
        assert left._heads[0].start[-1] == left.count == 6000
        self.assert_true(left.query(query[1500:]), query[1500:], key, value)

    def test_few_queries_are_answered_exactly(self):
        query, key, value = problem(m=3000)
        prepared = self.prepare(key, value, query)
        truth, logarithm = oracles.attention(query[:2], key, value)
        answer = prepared.query(query[:2])
        np.testing.assert_allclose(answer.value, truth, rtol=0, atol=1e-12)
        np.testing.assert_allclose(answer.log_normalizer, logarithm, atol=1e-12)

    def test_nothing_is_proven(self):
        query, key, value = problem()
        with pytest.raises(RefusalError, match="no proven bound"):
            self.prepare(key, value, query, guarantee="proven")


KINDS = pytest.mark.parametrize(
    "method",
    [
        Polynomial(degree=2),
        Polynomial(degree=2, basis="hermite"),
        Polynomial(landmarks=40),
    ],
    ids=["monomials", "hermite", "landmarks"],
)


def promise(method, queries=256, d=8, spread=0.5, kept=0):
    """A trial: the certificate holds for many more queries of the same law."""

    def trial(rng):
        query, key = (spread * rng.standard_normal((x, d)) for x in (queries, 400))
        value = 1 + rng.standard_normal((400, 3))
        prepared = prepare(
            key[:300], value[:300], queries=query, tol=1.0, method=method, rng=rng
        )
        prepared.insert(key[300 : 400 - kept], value[300 : 400 - kept])
        prepared.merge(prepared.empty())
        if kept:
            prepared.insert(key[-kept:], value[-kept:])
        more = spread * rng.standard_normal((2000, d))
        answer = prepared.query(more)
        truth, _ = oracles.attention(more, key, value)
        assert answer.certificate.failure == 0.05
        return oracles.frobenius_error(answer.value, truth) <= answer.certificate.error

    return trial


@KINDS
def test_certificates_keep_their_promise(method):
    assert_fails_rarely(promise(method), failure=0.05, trials=60)


def test_certificates_keep_their_promise_with_recent_keys():
    trial = promise(Polynomial(degree=1, basis="hermite"), kept=50)
    assert_fails_rarely(trial, failure=0.05, trials=60)


def test_certificates_keep_their_promise_where_few_queries_hold_the_error():
    # one per cent of the queries have nearly half of the squared error
    trial = promise(Polynomial(degree=3, basis="hermite"), 1000, d=4, spread=0.7)
    assert_fails_rarely(trial, failure=0.05, trials=60)


@KINDS
def test_a_drift_of_the_keys_shows_in_the_certificate(method):
    query, key, value = problem()
    prepared = prepare(key, value, queries=query, tol=1.0, method=method, rng=0)
    before = prepared.certificate.error
    prepared.insert(2 * key + 0.5, value)
    assert prepared.certificate.error > 1.5 * before


@pytest.mark.parametrize("method", [Polynomial(landmarks=40), Polynomial(degree=2)])
def test_insert_copies_no_more_than_blocks(method, tmp_path):
    rng, m, d = np.random.default_rng(0), 300_000, 16
    keys = np.lib.format.open_memmap(tmp_path / "k.npy", "w+", np.float32, (m, d))
    keys[:] = 0.3 * rng.standard_normal((m, d), dtype=np.float32)
    keys = np.load(tmp_path / "k.npy", mmap_mode="r")
    query = 0.3 * rng.standard_normal((300, d)).astype(np.float32)
    some = slice(0, 2000)
    prepared = prepare(
        keys[some], keys[some], queries=query, tol=1.0, method=method, rng=0
    )
    tracemalloc.start()
    try:
        prepared.insert(keys, keys)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < keys.nbytes / 4
    assert prepared.count == m + 2000


def test_a_batch_has_a_structure_for_each_head():
    query, key, value = problem(lead=(2,))
    key[1] *= 20
    prepared = prepare(key, value, queries=query, tol=0.1, rng=0)
    kinds = [type(plan.method) for plan in prepared.plan]
    assert kinds == [Polynomial, Exact]
    truth, _ = oracles.attention(query, key, value)
    answer = prepared.query(query)
    errors = oracles.frobenius_error(answer.value, truth)
    assert np.all(errors <= answer.certificate.error)


@pytest.mark.parametrize(
    ("n", "held_out", "held"), [(256, 128, 128), (2000, 128, 1000)]
)
def test_queries_of_the_largest_variance_are_held_out(n, held_out, held):
    query, key, value = problem(n=n)
    head, rng = Head(query, key, value, 0.4), np.random.default_rng(0)
    split = QuerySplit.of(head, rng)
    assert len(split.held_out) == len(split.weight) == held_out
    assert split.weight.sum() == pytest.approx(held)
    assert len(split.rest) == n - held
    both = np.concatenate([split.held_out, split.rest])
    assert len(np.unique(both, axis=0)) == len(both)
    # candidates of the highest logit variance are always held out
    query[:] *= np.where(np.arange(n) % 50 == 0, 5, 1)[:, None]
    split = QuerySplit.of(head, rng)
    is_outlier = np.linalg.norm(split.held_out, axis=1) > 3
    if held > held_out:
        assert np.all(split.weight[is_outlier] == 1)
