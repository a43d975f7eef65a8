"""Tensor attention: the definition, its symmetries, and bad input."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import (
    Exact,
    Multipole,
    Polynomial,
    RefusalError,
    approximate,
    tensor_attention,
)
from tests import oracles
from tests.laws import DTYPES
from tests.tensor_inputs import problem

PROVEN = {"guarantee": "proven", "rng": 0}


def assert_true(answer, inputs, **options):
    truth, normalizer = oracles.tensor_attention(*inputs, **options)
    assert answer.certificate.norm == "max"
    assert answer.value.shape == truth.shape
    error = oracles.largest_error(np.asarray(answer.value), truth)
    assert error <= answer.certificate.error
    return normalizer


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    n=st.integers(1, 9),
    d=st.integers(1, 6),
    p=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_exact_is_the_definition_within_its_rounding(
    lengths, n, d, p, seed, dtype, size
):
    inputs = problem(tuple(lengths), n, d, p, seed, dtype, size)
    answer = approximate(*inputs, tol=1e-2, method=Exact(), **PROVEN)
    normalizer = assert_true(answer, inputs)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(
        answer.log_normalizer, normalizer, atol=200 * eps * (1 + size**3), rtol=50 * eps
    )


@pytest.mark.parametrize("lengths", [(64,), (64, 64), (24, 20, 33), (40, 1, 50)])
def test_exact_in_float64_agrees_to_rounding(lengths):
    inputs = problem(lengths, n=64, d=8)
    answer = approximate(*inputs, method=Exact(), **PROVEN)
    truth, _ = oracles.tensor_attention(*inputs)
    np.testing.assert_allclose(answer.value, truth, rtol=0, atol=1e-13)
    assert answer.certificate.error < 1e-11


@pytest.mark.parametrize("lengths", [(300, 1030), (2000, 3), (17000, 2)])
def test_exact_around_the_blocks_of_the_nested_queries(lengths):
    inputs = problem(lengths, n=7, d=3, dtype=np.float32)
    answer = approximate(*inputs, tol=0.1, method=Exact(), **PROVEN)
    assert_true(answer, inputs)


def test_rounding_bound_is_not_vacuous():
    inputs = problem((40, 50), n=30, d=8, dtype=np.float32)
    answer = approximate(*inputs, tol=1e-2, method=Exact(), **PROVEN)
    assert answer.certificate.error < 1e-4


def test_logits_of_any_size_are_right():
    query, keys, values = problem(size=3.0)
    inputs = (100 * query, keys, values)
    answer = approximate(*inputs, scale=1.0, method=Exact(), **PROVEN)
    assert_true(answer, inputs, scale=1.0)


def test_order_two_is_pairwise_attention():
    query, (key,), (value,) = inputs = problem((30,), n=20)
    one = tensor_attention(*inputs, method=Exact(), **PROVEN)
    other = fastattn.attention(query, key, value, scale=1 / 5, method=Exact(), **PROVEN)
    np.testing.assert_array_equal(one, other)


METHODS = [
    pytest.param(Exact(), id="exact"),
    pytest.param(Polynomial(), id="polynomial"),
    pytest.param(None, id="auto"),
]


@pytest.mark.parametrize("method", METHODS)
class TestSymmetries:
    """What every method owes the definition, within its proven bound."""

    def answer(self, inputs, method, **options):
        return approximate(*inputs, tol=1e-3, method=method, **{**PROVEN, **options})

    def assert_same(self, one, other):
        slack = one.certificate.error + other.certificate.error
        np.testing.assert_allclose(one.value, other.value, rtol=0, atol=slack)

    def test_factors_may_change_places(self, method):
        query, keys, values = problem((13, 9, 4))
        self.assert_same(
            self.answer((query, keys, values), method),
            self.answer((query, keys[::-1], values[::-1]), method),
        )

    def test_coordinates_rescale_between_factors(self, method):
        query, keys, values = problem((13, 9))
        c = 2.0 ** np.array([-9, 4, 0, 30, -2])
        self.assert_same(
            self.answer((query, keys, values), method),
            self.answer((query * c, (keys[0] / c**2, keys[1] * c), values), method),
        )

    def test_scale_moves_into_the_query(self, method):
        query, keys, values = problem()
        self.assert_same(
            self.answer((query, keys, values), method, scale=0.5),
            self.answer((-2 * query, keys, values), method, scale=-0.25),
        )

    def test_a_factor_that_is_constant_falls_out(self, method):
        query, keys, values = problem((13, 9))
        ones = (np.ones((6, 5)), np.ones((6, 3)))
        self.assert_same(
            self.answer((query, keys, values), method),
            self.answer((query, (*keys, ones[0]), (*values, ones[1])), method),
        )

    def test_masked_keys_do_not_count(self, method):
        query, keys, values = inputs = problem((13, 9))
        mask = np.arange(13) % 3 != 0
        loud = (np.where(mask[:, None], values[0], 1e9), values[1])
        answer = self.answer((query, keys, loud), method, key_mask=(mask, None))
        assert_true(answer, inputs, key_mask=(mask, None))

    def test_no_tuple_gives_zeros_and_minus_infinity(self, method):
        masks = (None, np.zeros(9, bool))
        answer = self.answer(problem((13, 9)), method, key_mask=masks)
        np.testing.assert_array_equal(answer.value, 0)
        np.testing.assert_array_equal(answer.log_normalizer, -np.inf)

    def test_leading_dimensions_broadcast(self, method):
        rng = np.random.default_rng(1)
        query = rng.uniform(-1, 1, (2, 3, 6, 4))
        keys = (rng.uniform(-1, 1, (3, 8, 4)), rng.uniform(-1, 1, (2, 1, 5, 4)))
        values = (rng.uniform(-1, 1, (8, 2)), rng.uniform(-1, 1, (2, 1, 5, 2)))
        mask = rng.random((3, 8)) < 0.7
        answer = self.answer((query, keys, values), method, key_mask=(mask, None))
        assert answer.value.shape == (2, 3, 6, 2)
        assert answer.log_normalizer.shape == (2, 3, 6)
        for i, j in np.ndindex(2, 3):
            truth, _ = oracles.tensor_attention(
                query[i, j],
                (keys[0][j], keys[1][i, 0]),
                (values[0], values[1][i, 0]),
                key_mask=(mask[j], None),
            )
            error = oracles.largest_error(answer.value[i, j], truth)
            assert error <= answer.certificate.error[i, j]

    def test_library_and_dtype_follow_the_inputs(self, method, xp):
        for dtype in DTYPES:
            query, keys, values = inputs = problem(dtype=dtype)
            asked = xp.asarray(query), xp.asarrays(*keys), xp.asarrays(*values)
            answer = self.answer(asked, method)
            for x in (answer.value, answer.log_normalizer):
                assert isinstance(x, xp.array_type)
                assert xp.dtype_name(x) == np.dtype(dtype).name
            assert_true(answer, inputs)

    def test_half_precision_stays_half(self, method):
        inputs = problem(dtype=np.float16)
        answer = approximate(*inputs, tol=1e-2, method=method, **PROVEN)
        assert answer.value.dtype == np.float16
        assert answer.log_normalizer.dtype == np.float32
        assert_true(answer, inputs)

    def test_inputs_are_left_as_they_were(self, method):
        query, keys, values = inputs = problem()
        before = [x.copy() for x in (query, *keys, *values)]
        self.answer(inputs, method)
        for x, old in zip((query, *keys, *values), before, strict=True):
            np.testing.assert_array_equal(x, old)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [(12,), (12, 12), (5, 14), (12, 7, 12)])
def test_causal_rows_see_tuples_of_earlier_keys(lengths, masked):
    inputs = problem(lengths, n=12)
    rng = np.random.default_rng(3)
    mask = tuple(rng.random(m) < 0.6 for m in lengths) if masked else None
    options = {"is_causal": True, "key_mask": mask}
    answer = approximate(*inputs, **options, **PROVEN)
    normalizer = assert_true(answer, inputs, **options)
    np.testing.assert_allclose(answer.log_normalizer, normalizer, rtol=1e-12)


def nan_in(x):
    x = x.copy()
    x[2, 1] = np.nan
    return x


BAD = {
    "keys that are an array": (
        lambda q, k, v: (q, k[0], v),
        TypeError,
        "keys: expected a tuple",
    ),
    "values that are an array": (
        lambda q, k, v: (q, k, v[0]),
        TypeError,
        "values: expected a tuple",
    ),
    "no factor": (
        lambda q, k, v: (q, k[:0], v[:0]),
        ValueError,
        "keys: expected at least",
    ),
    "factors without values": (
        lambda q, k, v: (q, k, v[:1]),
        ValueError,
        "values: expected 2 entries, one for each of keys, got 1",
    ),
    "other columns of keys": (
        lambda q, k, v: (q, (k[0], k[1][:, :4]), v),
        ValueError,
        "query has 5 columns and keys[1] has 4",
    ),
    "other columns of values": (
        lambda q, k, v: (q, k, (v[0], v[1][:, :2])),
        ValueError,
        "values[0] has 3 columns and values[1] has 2",
    ),
    "a value short": (
        lambda q, k, v: (q, k, (v[0], v[1][:8])),
        ValueError,
        "factor 1: key has 9 rows and value has 8",
    ),
    "NaN": (
        lambda q, k, v: (q, (k[0], nan_in(k[1])), v),
        ValueError,
        "keys[1]: expected finite numbers, got 1 NaN or infinite, the first at (2, 1)",
    ),
    "two dtypes": (
        lambda q, k, v: (q, (k[0], k[1].astype(np.float32)), v),
        TypeError,
        "'keys[1]': 'float32'",
    ),
    "integers": (
        lambda q, k, v: (q, (k[0].astype(int), k[1]), v),
        TypeError,
        "keys[0]: expected a floating-point dtype",
    ),
    "an empty factor": (
        lambda q, k, v: (q, (k[0], k[1][:0]), (v[0], v[1][:0])),
        ValueError,
        "keys[1]: expected a non-empty array",
    ),
    "a masked array": (
        lambda q, k, v: (q, (np.ma.array(k[0]), k[1]), v),
        TypeError,
        "keys[0]: expected an array without a mask",
    ),
    "leading dimensions": (
        lambda q, k, v: (np.stack([q] * 2), (np.stack([k[0]] * 3), k[1]), v),
        ValueError,
        "do not broadcast",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_named(name):
    change, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)):
        tensor_attention(*change(*problem((13, 9))))


def test_a_mix_of_libraries_is_refused():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict missing")
    query, keys, values = problem()
    with pytest.raises(TypeError, match="arrays of one library expected"):
        tensor_attention(query, (keys[0], strict.asarray(keys[1])), values)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"key_mask": (None,)}, ValueError, "key_mask: expected 2 entries"),
        ({"key_mask": np.ones(13, bool)}, TypeError, "key_mask: expected a tuple"),
        ({"key_mask": (np.ones(12, bool), None)}, ValueError, "expected 13 entries"),
        ({"is_causal": 1}, TypeError, "is_causal: expected True or False"),
        ({"method": Multipole()}, TypeError, "no method for tensor attention"),
        ({"method": Exact}, TypeError, "method: expected a method object"),
        ({"tol": 0}, ValueError, "tol: expected a number above 0"),
        ({"scale": np.inf}, ValueError, "scale: expected a finite number"),
    ],
)
def test_bad_options_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        tensor_attention(*problem((13, 9)), **options)


def test_a_tolerance_below_rounding_is_refused():
    with pytest.raises(RefusalError, match=r"tol=1e-18 cannot be proven: rounding in"):
        tensor_attention(*problem(), tol=1e-18, method=Exact(), **PROVEN)
    inputs = problem(dtype=np.float32)
    with pytest.raises(RefusalError, match=r"tol=1e-12 is below what float32 holds"):
        tensor_attention(*inputs, tol=1e-12, method=Exact(), rng=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_overflow_are_refused(dtype):
    large = np.finfo(dtype).max ** 0.6
    query, keys, values = problem(dtype=dtype)
    for method in (Exact(), Polynomial(), None):
        with pytest.raises(RefusalError):
            tensor_attention(
                query * large, (keys[0] * large, keys[1]), values, method=method, rng=0
            )


def test_tuples_whose_weights_underflow_are_not_certified_away():
    # only they have values: the answer is about 1e-546
    query, key, value = np.ones((64, 1)), np.full((50, 1), -1261.0), np.ones((50, 1))
    key[0] = value[0] = 0
    keys, values = (key, np.ones((3, 1))), (value, np.ones((3, 1)))
    options = {"scale": 1.0, "rng": 0, "tol": 0.1}
    for method in (None, Exact()):
        with pytest.raises(RefusalError, match="underflows"):
            approximate(query, keys, values, method=method, **options)
