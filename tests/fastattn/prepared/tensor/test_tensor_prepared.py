"""Tensor attention prepared on its factors: laws, limits, and files."""

import numpy as np
import pytest

import fastattn
from fastattn import Exact, Multipole, Polynomial, RefusalError, prepare
from tests import oracles
from tests.laws import DTYPES

PROVEN = {"guarantee": "proven", "tol": 1e-3, "rng": 0}
METHODS = [
    pytest.param(Exact(), id="exact"),
    pytest.param(Polynomial(), id="polynomial"),
]


def problem(lengths=(40, 30), n=20, d=4, p=3, seed=0, dtype=np.float64, lead=()):
    rng = np.random.default_rng(seed)
    query, *keys = (
        rng.uniform(-1, 1, (*lead, m, d)).astype(dtype) for m in (n, *lengths)
    )
    values = tuple(rng.uniform(0, 1, (*lead, m, p)).astype(dtype) for m in lengths)
    return query, tuple(keys), values


def made(inputs, method=None, **options):
    query, keys, values = inputs
    options = {**PROVEN, "method": method, **options}
    return prepare(keys, values, queries=query, **options)


def rows(arrays, *slices):
    """The given rows of each factor; None where there are to be none."""
    return tuple(
        None if part is None else x[part]
        for x, part in zip(arrays, slices, strict=True)
    )


def assert_true(answer, inputs, **options):
    truth, normalizer = oracles.tensor_attention(*inputs, **options)
    error = oracles.largest_error(np.asarray(answer.value), truth)
    assert error <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, normalizer, atol=2e-3)


def assert_close(one, other):
    for name in ("value", "log_normalizer"):
        pair = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(*pair, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
class TestLaws:
    """What both structures owe."""

    @pytest.mark.parametrize("lengths", [(40,), (40, 30), (12, 1, 20)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_answers_are_within_the_bound(self, method, lengths, dtype):
        inputs = problem(lengths, dtype=dtype)
        prepared = made(inputs, method)
        np.testing.assert_array_equal(prepared.count, lengths)
        answer = prepared.query(inputs[0])
        assert answer.certificate.norm == "max"
        assert answer.value.dtype == dtype
        assert_true(answer, inputs)

    def test_pieces_of_factors_are_the_whole(self, method):
        query, keys, values = inputs = problem()
        whole = made(inputs, method)
        pieces = whole.empty()
        first, last, every = slice(0, 25), slice(25, None), slice(None)
        for parts in ((first, None), (None, every), (last, None)):
            pieces.insert(rows(keys, *parts), rows(values, *parts))
        np.testing.assert_array_equal(pieces.count, whole.count)
        assert_close(pieces.query(query), whole.query(query))

    def test_merged_structures_hold_the_tuples_of_the_union(self, method):
        query, keys, values = inputs = problem()
        whole = made(inputs, method)
        one, other = whole.empty(), whole.empty()
        for half, parts in (
            (one, (slice(0, 17), slice(0, 11))),
            (other, (slice(17, None), slice(11, None))),
        ):
            half.insert(rows(keys, *parts), rows(values, *parts))
        merged = one.merge(other)
        assert_close(merged.query(query), whole.query(query))
        # tuples of one key of each are among them
        assert_true(merged.query(query), inputs)

    def test_a_factor_without_keys_leaves_no_tuple(self, method):
        query, keys, values = inputs = problem()
        prepared = made(inputs, method).empty()
        prepared.insert((keys[0], None), (values[0], None))
        answer = prepared.query(query)
        np.testing.assert_array_equal(answer.value, 0)
        np.testing.assert_array_equal(answer.log_normalizer, -np.inf)

    def test_masked_keys_do_not_count(self, method):
        query, keys, values = inputs = problem()
        mask = np.arange(40) % 3 != 0
        loud = (np.where(mask[:, None], values[0], 1e9), values[1])
        prepared = made((query, keys, loud), method, key_mask=(mask, None))
        np.testing.assert_array_equal(prepared.count, (mask.sum(), 30))
        assert_true(prepared.query(query), inputs, key_mask=(mask, None))
        again = prepared.empty().insert(keys, loud, key_mask=(mask, None))
        assert_close(again.query(query), prepared.query(query))

    def test_files_answer_to_the_last_bit(self, method, tmp_path, xp):
        query, keys, values = problem(dtype=np.float32)
        inputs = xp.asarray(query), xp.asarrays(*keys), xp.asarrays(*values)
        prepared = made(inputs, method)
        prepared.save(tmp_path / "factors.npz")
        again = fastattn.load(tmp_path / "factors.npz", like=inputs[0])
        one, other = (x.query(inputs[0]) for x in (prepared, again))
        assert isinstance(other.value, xp.array_type)
        np.testing.assert_array_equal(np.asarray(one.value), np.asarray(other.value))
        np.testing.assert_array_equal(
            np.asarray(one.log_normalizer), np.asarray(other.log_normalizer)
        )
        assert one.certificate == other.certificate
        np.testing.assert_array_equal(prepared.count, again.count)
        # it grows, and merges with the one that was saved
        again.merge(prepared).insert(inputs[1], inputs[2])
        np.testing.assert_array_equal(again.count, (120, 90))

    def test_batches_are_loops_over_their_heads(self, method):
        query, keys, values = inputs = problem(lead=(2,))
        prepared = made(inputs, method)
        assert prepared.count.shape == (2, 2)
        # within the bounds on keys and values of both heads
        first = keys[0][0] / 2, np.clip(values[0][0], 0.3, 0.7)
        prepared.insert((first[0], None), (first[1], None))
        np.testing.assert_array_equal(prepared.count, [[80, 30]] * 2)
        answer = prepared.query(query)
        for i in range(2):
            grown = (
                (np.concatenate([keys[0][i], first[0]]), keys[1][i]),
                (np.concatenate([values[0][i], first[1]]), values[1][i]),
            )
            truth, _ = oracles.tensor_attention(query[i], *grown)
            error = oracles.largest_error(answer.value[i], truth)
            assert error <= answer.certificate.error[i]

    def test_what_does_not_fit_is_named(self, method):
        query, keys, values = inputs = problem()
        prepared = made(inputs, method)
        for change, message in (
            ((keys[0], values[0]), "key: expected a tuple of 2 entries"),
            ((keys, values[:1]), "value: expected a tuple of 2 entries"),
            (((keys[0], None), values), r"value\[1\]: expected None where key\[1\]"),
            (((keys[0][:, :3], None), (values[0], None)), r"key\[0\]: expected 4"),
            (((keys[0], None), (values[0][:9], None)), "40 rows and value has 9"),
        ):
            with pytest.raises(ValueError, match=message):
                prepared.insert(*change)
        with pytest.raises(ValueError, match="expected a structure with"):
            prepared.merge(made(problem(d=5), method))
        pair = prepare(keys[0], values[0], queries=query)
        with pytest.raises(ValueError, match="expected a structure with"):
            prepared.merge(pair)
        np.testing.assert_array_equal(prepared.count, (40, 30))


def test_sums_do_not_grow_with_the_keys():
    sizes = [
        made(problem((m, m)), Polynomial(degree=4)).nbytes for m in (50, 500, 5000)
    ]
    assert len(set(sizes)) == 1


@pytest.mark.slow
def test_many_pieces_stay_within_the_bound():
    inputs = problem((5000, 9000), n=5, d=2, dtype=np.float32)
    assert_true(made(inputs, Polynomial()).query(inputs[0]), inputs)


def test_order_two_is_what_pairwise_attention_prepares():
    query, (key,), (value,) = inputs = problem((300,))
    one = made(inputs, Polynomial()).query(query)
    other = prepare(key, value, queries=query, scale=1 / 4, method=Exact(), **PROVEN)
    slack = one.certificate.error
    np.testing.assert_allclose(one.value, other.query(query).value, atol=slack)


def test_a_bound_holds_for_other_keys_within_the_limits():
    query, keys, values = problem((60, 50))
    prepared = made((query, keys, values), Polynomial())
    rng = np.random.default_rng(1)
    weights = [rng.dirichlet(np.ones(len(x)), 400) for x in keys]
    other = (
        query,
        tuple(w @ x for w, x in zip(weights, keys, strict=True)),
        tuple(w @ x for w, x in zip(weights, values, strict=True)),
    )
    # means of keys are within their ranges
    answer = prepared.empty().insert(*other[1:]).query(query)
    assert_true(answer, other)
    assert answer.certificate == prepared.certificate


@pytest.mark.parametrize("side", ["keys", "values", "query"])
def test_rows_beyond_the_limits_are_refused(side):
    query, keys, values = problem()
    prepared = made((query, keys, values), Polynomial())
    before = prepared.query(query).value
    beyond = {
        "query": lambda: prepared.query(1.2 * query),
        "keys": lambda: prepared.insert((keys[0], 1.01 * keys[1]), values),
        "values": lambda: prepared.insert(keys, (values[0], 1.01 * values[1])),
    }
    with pytest.raises(RefusalError, match=rf"{side}.*column \d has entries from"):
        beyond[side]()
    # all keys or none: those of the first factor were within
    np.testing.assert_array_equal(prepared.query(query).value, before)
    prepared.query(1.09 * query)


def test_a_row_longer_than_all_others_is_refused():
    query, keys, values = problem()
    sparse = np.eye(4)[np.arange(40) % 4] * np.sign(keys[0])
    prepared = made((query, (sparse, keys[1]), values), Polynomial())
    with pytest.raises(RefusalError, match=r"keys\[0\]: a row is longer than"):
        prepared.insert((np.ones((1, 4)), None), (values[0][:1], None))


def test_auto_keeps_keys_where_no_polynomial_serves():
    query, keys, values = problem()
    wide = made((30 * query, keys, values))
    assert wide.plan.method == Exact()
    assert "wider than" in wide.plan.reason
    few = slice(2), slice(2)
    few = made((query, rows(keys, *few), rows(values, *few)))
    assert "times as long" in few.plan.reason
    many = made(problem((400, 300)))
    assert isinstance(many.plan.method, Polynomial)


@pytest.mark.parametrize("method", [None, Polynomial()])
def test_held_out_queries_are_refused_with_the_reason(method):
    with pytest.raises(RefusalError, match="a new key of one factor makes tuples"):
        made(problem(), method, guarantee="sampled")


def test_kept_keys_are_certified_by_rows():
    query, *factors = problem(dtype=np.float32)
    prepared = made((query, *factors), Exact(), guarantee="sampled", tol=1e-2)
    answer = prepared.query(query)
    assert answer.certificate.norm == "relative-frobenius"
    truth, _ = oracles.tensor_attention(query, *factors)
    assert oracles.frobenius_error(answer.value, truth) <= answer.certificate.error


def test_methods_without_a_structure_are_named():
    with pytest.raises(TypeError, match="cannot be prepared for tensor attention"):
        made(problem(), Multipole())


def test_structures_of_other_plans_do_not_merge():
    one, other = (made(problem(), Polynomial(degree=g)) for g in (5, 6))
    with pytest.raises(ValueError, match="was planned apart from"):
        one.merge(other)
    exact = [made(problem(seed=seed), Exact()) for seed in (0, 1)]
    np.testing.assert_array_equal(exact[0].merge(exact[1]).count, (80, 60))
