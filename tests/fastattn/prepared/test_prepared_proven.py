"""Certificates of proven structures hold for all rows within their bounds."""

import numpy as np
import pytest

from fastattn import Exact, Polynomial, RefusalError, load, prepare
from tests import oracles
from tests.prepared_laws import PreparedLaws


def uniform(n=500, m=600, d=3, p=2, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    query, key = (rng.uniform(-1, 1, (x, d)).astype(dtype) for x in (n, m))
    return query, key, rng.uniform(-1, 1, (m, p)).astype(dtype)


class TestProvenExact(PreparedLaws):
    options = {  # noqa: RUF012
        "method": Exact(),
        "tol": 1e-2,
        "guarantee": "proven",
    }
    exact = True


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_hold_after_inserts_merges_and_a_load(dtype, tmp_path):
    query, key, value = uniform(dtype=dtype)
    whole = prepare(key, value, queries=query, tol=1e-3, guarantee="proven", rng=0)
    assert isinstance(whole.plan.method, Polynomial)
    parts = whole.empty().insert(key[:100], value[:100])
    parts.merge(whole.empty().insert(key[100:], value[100:]))
    parts.save(tmp_path / "keys.npz")
    truth, logarithm = oracles.attention(query, key, value)
    for prepared in (whole, parts, load(tmp_path / "keys.npz")):
        answer = prepared.query(query)
        error = answer.certificate.error
        assert (answer.certificate.norm, answer.certificate.failure) == ("max", 0.0)
        assert error <= 1e-3 * np.ptp(value, axis=0).max() / 2
        assert oracles.largest_error(answer.value, truth) <= error
        np.testing.assert_allclose(answer.log_normalizer, logarithm, atol=2e-3)


def test_float32_serves_where_it_can():
    query, key, value = uniform(dtype=np.float32)
    prepared = prepare(key, value, queries=query, tol=1e-2, guarantee="proven", rng=0)
    assert prepared._heads[0].state.expansion.dtype == np.float32


def test_worst_keys_within_the_row_bounds_stay_within_the_bound():
    query, key, value = uniform()
    prepared = prepare(key, value, queries=query, tol=1e-2, guarantee="proven", rng=0)
    # keys at the ends of the range, with values that go with the sign of the error
    far = key[np.argsort(-np.linalg.norm(key, axis=1))[:50]]
    keys = np.concatenate([far, -0.9 * far])
    values = np.repeat([value.max(axis=0), value.min(axis=0)], 50, axis=0)
    prepared = prepared.empty().insert(keys, values)
    truth, _ = oracles.attention(query, keys, values)
    answer = prepared.query(query)
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error


@pytest.mark.parametrize("rank", [None, 15])
def test_rows_beyond_the_row_bounds_are_refused(rank):
    query, key, value = uniform()
    method = Polynomial(rank=rank, degree=6 if rank is None else 2)
    prepared = prepare(
        key, value, queries=query, tol=1.0, guarantee="proven", method=method, rng=0
    )
    # there is room for somewhat larger queries only
    assert prepared.query(1.05 * query).certificate.error > 0
    for beyond in (1.2 * query, query + 1):
        with pytest.raises(RefusalError, match=r"query: rows are 1.* times as large"):
            prepared.query(beyond)
    with pytest.raises(RefusalError, match=r"key: rows are 1.* times as large"):
        prepared.insert(1.01 * key, value)
    with pytest.raises(RefusalError, match="value: entries are outside"):
        prepared.insert(key, 1.01 * value)
    assert prepared.count == 600


def test_more_sums_than_the_bound_allows_for_are_refused(monkeypatch):
    query, key, value = uniform()
    prepared = prepare(key, value, queries=query, tol=1e-2, guarantee="proven", rng=0)
    monkeypatch.setattr("fastattn.certificates.accumulation.MAX_BLOCKS", 2)
    prepared.insert(key[:1], value[:1])
    with pytest.raises(RefusalError, match="more than 2 inserts"):
        prepared.insert(key[:1], value[:1])
    assert prepared.count == 601


def test_heads_that_no_polynomial_is_proven_for_keep_their_keys():
    query, key, value = uniform()
    options = {"queries": 40 * query, "tol": 1e-2, "guarantee": "proven", "rng": 0}
    prepared = prepare(key, value, **options)
    assert isinstance(prepared.plan.method, Exact)
    assert prepared.query(40 * query).certificate.norm == "max"
    with pytest.raises(RefusalError, match="no degree"):
        prepare(key, value, method=Polynomial(), **options)
    with pytest.raises(RefusalError, match="has no proven bound"):
        prepare(key, value, method=Polynomial(basis="hermite"), **options)
