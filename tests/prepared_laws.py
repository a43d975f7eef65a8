"""The law suite of prepared keys and values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import load, prepare
from tests import oracles


def problem(n=700, m=900, d=6, p=3, seed=0, dtype=np.float64, lead=()):
    """Query, key and value of smooth heads."""
    rng = np.random.default_rng(seed)
    query, key = (0.5 * rng.standard_normal((*lead, x, d)) for x in (n, m))
    value = 1 + rng.standard_normal((*lead, m, p))
    return tuple(x.astype(dtype) for x in (query, key, value))


class PreparedLaws:
    """A subclass has ``options``, which choose the structure, among them ``tol``.

    ``exact`` says that the structure stores the keys, ``rounding`` is the largest
    difference between two orders of summation.
    """

    options = {}  # noqa: RUF012
    exact = False
    rounding = 1e-9

    def prepare(self, key, value, queries, **more):
        options = {"rng": 0, **self.options, **more}
        return prepare(key, value, queries=queries, **options)

    def assert_same(self, one, other):
        for x, y in ((one.value, other.value), (one.log_normalizer,) * 2):
            np.testing.assert_allclose(x, y, rtol=0, atol=self.rounding)

    def assert_true(self, answer, query, key, value, **more):
        """The answer is within its certificate, which meets the tolerance."""
        truth, logarithm = oracles.attention(query, key, value, **more)
        certificate = answer.certificate
        errors = oracles.error_in(certificate.norm, np.asarray(answer.value), truth)
        half = np.ptp(value, axis=-2).max() / 2 if certificate.norm == "max" else 1
        assert answer.value.shape == truth.shape
        assert np.all(errors <= certificate.error)
        assert np.all(certificate.error <= self.options["tol"] * half)
        # weights are off by more than their means
        slack = 10 * self.options["tol"] * np.maximum(1, np.abs(logarithm))
        assert np.all(np.abs(np.asarray(answer.log_normalizer) - logarithm) <= slack)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_answers_are_within_the_certificate(self, dtype):
        query, key, value = problem(dtype=dtype)
        prepared = self.prepare(key, value, query[:300])
        answer = prepared.query(query[300:])
        assert answer.value.dtype == dtype
        self.assert_true(answer, query[300:], key, value)

    def test_merge_is_concatenation(self):
        query, key, value = problem()
        whole = self.prepare(key, value, query)
        left = whole.empty().insert(key[:400], value[:400])
        right = whole.empty().insert(key[400:], value[400:])
        merged = left.merge(right)
        assert merged.count == whole.count == 900
        assert right.count == 500
        self.assert_same(merged.query(query), whole.query(query))
        assert merged.certificate.error == pytest.approx(
            whole.certificate.error, rel=1e-3
        )

    @given(cuts=st.lists(st.integers(1, 899), max_size=5, unique=True))
    def test_pieces_are_the_whole(self, cuts):
        query, key, value = problem()
        whole = self.prepare(key, value, query)
        pieces = whole.empty()
        for rows in np.split(np.arange(900), sorted(cuts)):
            pieces.insert(key[rows], value[rows])
        self.assert_true(pieces.query(query[:300]), query[:300], key, value)
        # recent keys are exact until a merge adds them to the state
        pieces.merge(whole.empty())
        self.assert_same(pieces.query(query), whole.query(query))

    def test_one_token_after_the_other_is_within_tolerance(self):
        query, key, value = problem(m=1300)
        prepared = self.prepare(key[:700], value[:700], query[:400])
        steps = range(700, 1300)
        got = np.empty((len(steps), 3))
        truth = np.empty_like(got)
        for row, end in zip(range(len(steps)), steps, strict=True):
            prepared.insert(key[end : end + 1], value[end : end + 1])
            one = slice(row % 700, row % 700 + 1)
            got[row] = prepared.query(query[one]).value
            seen = slice(0, end + 1)
            truth[row] = oracles.attention(query[one], key[seen], value[seen])[0]
        assert oracles.frobenius_error(got, truth) <= self.options["tol"]

    def test_saving_keeps_every_bit(self, tmp_path):
        query, key, value = problem()
        prepared = self.prepare(key[:600], value[:600], query)
        prepared.insert(key[600:650], value[600:650])
        prepared.save(tmp_path / "keys.npz")
        again = load(tmp_path / "keys.npz")
        for one in (prepared, again):
            one.insert(key[650:], value[650:])
        parts = prepared.empty().insert(key[:7], value[:7])
        for one in (prepared, again):
            one.merge(parts).insert(key[:1], value[:1])
        assert again.plan == prepared.plan
        for x, y in zip(_fields(prepared, query), _fields(again, query), strict=True):
            np.testing.assert_array_equal(x, y)

    def test_keys_are_counted_and_sums_do_not_grow(self):
        query, key, value = problem()
        prepared = self.prepare(key, value, query)
        before = prepared.nbytes
        many = [np.tile(x, (40, 1)) for x in (key, value)]
        prepared.insert(*many)
        assert prepared.count == 41 * 900
        grown = prepared.nbytes - before
        if self.exact:
            assert grown >= 40 * (key.nbytes + value.nbytes)
        else:
            assert grown == 0
        keys = (np.concatenate([x, y]) for x, y in zip((key, value), many, strict=True))
        self.assert_true(prepared.query(query[:200]), query[:200], *keys)

    def test_no_keys_give_zeros_and_minus_infinity(self):
        query, key, value = problem()
        answer = self.prepare(key, value, query).empty().query(query)
        np.testing.assert_array_equal(answer.value, 0)
        np.testing.assert_array_equal(answer.log_normalizer, -np.inf)

    def test_masked_keys_do_not_count(self):
        query, key, value = problem(m=1100)
        mask = np.random.default_rng(1).random(1100) < 0.8
        loud = np.where(mask[:, None], value, value[:1])
        prepared = self.prepare(key[:1000], loud[:1000], query, key_mask=mask[:1000])
        prepared.insert(key[1000:], loud[1000:], key_mask=mask[1000:])
        assert prepared.count == mask.sum()
        self.assert_true(
            prepared.query(query[:300]), query[:300], key[mask], value[mask]
        )

    def test_heads_are_apart_and_groups_broadcast(self):
        query, key, value = problem(lead=(2, 3))
        key, value = key[:, :1], value[:, :1]
        prepared = self.prepare(key, value, query[..., :400, :])
        prepared.insert(key[..., :9, :], value[..., :9, :])
        rest = query[..., 400:, :]
        answer = prepared.query(rest)
        assert np.shape(answer.certificate.error) == (2, 3)
        assert np.shape(prepared.plan) == np.shape(prepared.count) == (2, 3)
        keys, values = (
            np.concatenate([x, x[..., :9, :]], axis=-2) for x in (key, value)
        )
        truth, _ = oracles.attention(rest, keys, values)
        errors = oracles.error_in(answer.certificate.norm, answer.value, truth)
        assert np.all(errors <= answer.certificate.error)
        # queries without leading dimensions go to all heads
        assert prepared.query(query[0, 0, :5]).value.shape == (2, 3, 5, 3)

    def test_library_and_dtype_follow_the_inputs(self, xp, tmp_path):
        inputs = problem(dtype=np.float32)
        query, key, value = xp.asarrays(*inputs)
        prepared = self.prepare(key, value, query[:300, :])
        prepared.insert(key[:20, :], value[:20, :])
        answer = prepared.query(query[300:, :])
        for x in (answer.value, answer.log_normalizer):
            assert isinstance(x, xp.array_type)
            assert xp.dtype_name(x) == "float32"
        keys = [np.concatenate([x, x[:20]]) for x in inputs[1:]]
        self.assert_true(answer, inputs[0][300:], *keys)
        prepared.save(tmp_path / "keys.npz")
        again = load(tmp_path / "keys.npz", like=query).query(query[300:, :])
        np.testing.assert_array_equal(np.asarray(again.value), np.asarray(answer.value))

    def test_half_precision_stays_half(self):
        query, key, value = problem(dtype=np.float16)
        prepared = self.prepare(key, value, query)
        prepared.insert(key[:5], value[:5])
        answer = prepared.query(query)
        assert answer.value.dtype == np.float16
        keys = [np.concatenate([x, x[:5]]) for x in (key, value)]
        self.assert_true(answer, query, *keys)

    @pytest.mark.parametrize("bad", ["key", "value"])
    def test_a_failed_insert_changes_nothing(self, bad):
        query, key, value = problem()
        prepared = self.prepare(key, value, query)
        prepared.insert(key[:3], value[:3])
        before = prepared.query(query)
        more = {"key": key[:300].copy(), "value": value[:300].copy()}
        more[bad][299, 1] = np.nan
        with pytest.raises(ValueError, match=rf"{bad}: .*1 NaN .*\(299, 1\)"):
            prepared.insert(more["key"], more["value"])
        assert prepared.count == 903
        np.testing.assert_array_equal(prepared.query(query).value, before.value)

    def test_an_int_makes_it_reproducible(self):
        query, key, value = problem()
        one, other = (self.prepare(key, value, query, rng=3) for _ in range(2))
        np.testing.assert_array_equal(one.query(query).value, other.query(query).value)
        one.merge(other)
        assert one.count == 1800

    def test_inputs_are_copied_where_they_are_kept(self):
        query, key, value = problem()
        mine = [x.copy() for x in (query, key, value)]
        prepared = self.prepare(mine[1], mine[2], mine[0])
        before = prepared.query(query)
        for x in mine:
            x[:] = 7
        np.testing.assert_array_equal(prepared.query(query).value, before.value)


def _fields(prepared, query):
    answer = prepared.query(query)
    certificate = answer.certificate
    yield from (answer.value, answer.log_normalizer)
    yield from (certificate.error, certificate.failure, certificate.source)
