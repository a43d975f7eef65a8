"""Windows, Strassen and path attention: their definitions, and what is refused."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import (
    Exact,
    PathAttention,
    RefusalError,
    StrassenAttention,
    TensorWindow,
    approximate,
    tensor_attention,
)
from fastattn._ops.tensor_mechanisms import attend_windows
from tests import oracles
from tests.laws import DTYPES
from tests.tensor_inputs import problem

PROVEN = {"guarantee": "proven", "rng": 0}


def by_pairs(query, keys, values, pairs, *, scale=None):
    """Softmax over tuples with scores that are sums over pairs of sides."""
    sides = [np.asarray(x, np.float64) for x in (query, *keys)]
    scale = 1 / sides[0].shape[1] if scale is None else scale
    logits = np.zeros([len(x) for x in sides])
    for one, other in (sorted(pair) for pair in pairs):
        score = scale * sides[one] @ sides[other].T
        shape = [len(x) if s in (one, other) else 1 for s, x in enumerate(sides)]
        logits = logits + score.reshape(shape)
    product = np.ones((1, values[0].shape[1]))
    for value in values:
        product = (product[:, None] * value.astype(np.float64)).reshape(
            -1, product.shape[1]
        )
    return oracles.softmax_mean(logits.reshape(len(query), -1), product)


def assert_true(answer, truth, normalizer):
    assert answer.certificate.norm == "max"
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error
    # a logit and its rounding, in the dtype of the log-sum-exps
    eps = np.finfo(answer.log_normalizer.dtype).eps
    np.testing.assert_allclose(
        answer.log_normalizer, normalizer, rtol=100 * eps, atol=100 * eps
    )


class TestWindow:
    """Tuples of the last keys of each factor."""

    @given(
        lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
        window=st.integers(1, 16),
        other=st.integers(1, 5),
        n=st.integers(1, 14),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(DTYPES),
    )
    def test_is_the_definition(self, lengths, window, other, n, seed, dtype):
        inputs = problem(tuple(lengths), n, 4, 2, seed, dtype)
        sizes = (window, other, 3)[: len(lengths)]
        answer = approximate(*inputs, method=TensorWindow(sizes), **PROVEN)
        truth = oracles.tensor_attention(*inputs, is_causal=True, window=sizes)
        assert_true(answer, *truth)

    def test_masked_keys_keep_their_place(self):
        inputs = problem((20, 20), n=20)
        rng = np.random.default_rng(2)
        masks = (rng.random(20) < 0.5, None)
        method = TensorWindow((6, 3))
        answer = approximate(*inputs, method=method, key_mask=masks, **PROVEN)
        truth = oracles.tensor_attention(
            *inputs, is_causal=True, window=(6, 3), key_mask=masks
        )
        assert_true(answer, *truth)

    def test_causal_changes_nothing(self):
        inputs = problem((9, 20), n=20)
        method = TensorWindow((4, 5))
        one, other = (
            tensor_attention(*inputs, method=method, is_causal=causal, **PROVEN)
            for causal in (False, True)
        )
        np.testing.assert_array_equal(one, other)

    def test_a_wide_window_is_causal_attention(self):
        inputs = problem((20, 20), n=20)
        one = tensor_attention(*inputs, method=TensorWindow((20, 99)), **PROVEN)
        other = tensor_attention(*inputs, method=Exact(), is_causal=True, **PROVEN)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)

    def test_the_published_kernel_contains_ordinary_attention(self):
        # k2 + 1/d and v2 + 1: with zeros there it is pairwise attention
        d, n = 5, 30
        query, (key,), (value,) = problem((n,), n, d)
        zero = np.zeros((n, d)), np.zeros((n, 3))
        keys, values = (key, zero[0] + 1 / d), (value, zero[1] + 1)
        method = TensorWindow((n, 4))
        answer = tensor_attention(
            query, keys, values, scale=d**-0.5, method=method, **PROVEN
        )
        truth, _ = oracles.attention(
            query, key, value, scale=d**-0.5 / d, is_causal=True
        )
        np.testing.assert_allclose(answer, truth, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("sizes", [(5,), (40, 33), (2, 300), (3, 4, 5)])
    def test_fast_kernel_agrees_with_reference(self, dtype, sizes):
        lengths = (290, 310, 300)[: len(sizes)]
        query, keys, values = problem(lengths, n=301, dtype=dtype)
        number = np.arange(301)
        stops = tuple(np.minimum(number + 1, m) for m in lengths)
        starts = tuple(
            np.clip(number - w + 1, 0, m) for w, m in zip(sizes, lengths, strict=True)
        )
        arrays = query, keys, values, starts, stops
        options = {"sizes": sizes, "scale": 0.3}
        got = attend_windows(*arrays, **options)
        want = attend_windows.reference(*arrays, **options)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            slack = 50 * np.finfo(dtype).eps
            np.testing.assert_allclose(one, other, rtol=slack, atol=slack)

    def test_blocks_of_rows_join(self):
        inputs = problem((700, 700), n=700, d=3, p=2, dtype=np.float32)
        answer = approximate(*inputs, method=TensorWindow((64, 40)), rng=0)
        assert answer.value.shape == (700, 2)
        # from the keys that a row sees
        for i in (500, 699):
            near = slice(i - 63, i + 1), slice(i - 39, i + 1)
            truth, _ = oracles.tensor_attention(
                inputs[0][i : i + 1],
                tuple(x[rows] for x, rows in zip(inputs[1], near, strict=True)),
                tuple(x[rows] for x, rows in zip(inputs[2], near, strict=True)),
            )
            np.testing.assert_allclose(answer.value[i : i + 1], truth, atol=1e-5)


STRASSEN = ((0, 1), (1, 2), (2, 0))


class TestStrassen:
    """Scores over the three pairs of a triple."""

    @given(
        lengths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        n=st.integers(1, 9),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(DTYPES),
        size=st.sampled_from([1.0, 10.0, 100.0]),
    )
    def test_is_the_definition(self, lengths, n, seed, dtype, size):
        inputs = problem(lengths, n, 4, 2, seed, dtype, size)
        answer = approximate(*inputs, method=StrassenAttention(), tol=1e-2, **PROVEN)
        assert_true(answer, *by_pairs(*inputs, STRASSEN))

    def test_rows_that_underflow_are_computed_pair_by_pair(self):
        # the best first and last keys do not go together: their joint logit is far
        # below the largest of each part
        inputs = problem((6, 7), n=5, d=2, size=60.0)
        answer = approximate(
            *inputs, scale=1.0, method=StrassenAttention(), tol=1e-2, **PROVEN
        )
        truth = by_pairs(*inputs, STRASSEN, scale=1.0)
        assert_true(answer, *truth)
        pair = inputs[1][0] @ inputs[1][1].T
        own = [inputs[0] @ key.T for key in inputs[1]]
        top = own[0].max(axis=1) + own[1].max(axis=1) + pair.max()
        # the test bites: exp of the difference is no number of float64
        assert (truth[1] - top).min() < -745

    def test_blocks_of_rows_and_keys_join(self):
        inputs = problem((70, 600), n=150, d=3)
        answer = approximate(*inputs, method=StrassenAttention(), **PROVEN)
        assert_true(answer, *by_pairs(*inputs, STRASSEN))

    def test_tensor_attention_contains_it(self):
        query, (g, h), values = problem()
        one = [np.ones_like(x) for x in (query, g, h)]
        contained = tensor_attention(
            np.hstack([query, one[0], query]),
            (np.hstack([g, g, one[1]]), np.hstack([one[2], h, h])),
            values,
            scale=0.2,
            method=Exact(),
            **PROVEN,
        )
        own = tensor_attention(
            query, (g, h), values, scale=0.2, method=StrassenAttention(), **PROVEN
        )
        np.testing.assert_allclose(own, contained, rtol=0, atol=1e-13)


class TestPath:
    """Scores along the path from the query through all factors."""

    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        n=st.integers(1, 9),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(DTYPES),
        size=st.sampled_from([1.0, 10.0, 100.0]),
    )
    def test_is_the_definition(self, lengths, n, seed, dtype, size):
        inputs = problem(tuple(lengths), n, 4, 2, seed, dtype, size)
        answer = approximate(*inputs, method=PathAttention(), tol=1e-2, **PROVEN)
        pairs = tuple((s, s + 1) for s in range(len(lengths)))
        assert_true(answer, *by_pairs(*inputs, pairs))

    def test_one_factor_is_pairwise_attention(self):
        query, (key,), (value,) = inputs = problem((30,), n=20)
        one = tensor_attention(*inputs, method=PathAttention(), **PROVEN)
        other = fastattn.attention(query, key, value, scale=0.2, **PROVEN)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


METHODS = [TensorWindow((4, 5)), StrassenAttention(), PathAttention()]


@pytest.mark.parametrize("method", METHODS, ids=lambda x: type(x).__name__)
class TestEvery:
    """What holds for each of the methods."""

    def test_library_and_dtype_follow_the_inputs(self, method, xp):
        for dtype in DTYPES:
            query, keys, values = inputs = problem(dtype=dtype)
            asked = xp.asarray(query), xp.asarrays(*keys), xp.asarrays(*values)
            answer = approximate(*asked, method=method, **PROVEN)
            wanted = approximate(*inputs, method=method, **PROVEN)
            assert isinstance(answer.value, xp.array_type)
            assert xp.dtype_name(answer.value) == np.dtype(dtype).name
            np.testing.assert_allclose(
                np.asarray(answer.value), wanted.value, atol=wanted.certificate.error
            )

    def test_sampled_guarantees_are_relative(self, method):
        inputs = problem(dtype=np.float32)
        answer = approximate(*inputs, method=method, rng=0)
        assert answer.certificate.norm == "relative-frobenius"
        assert 0 < answer.certificate.error < 1e-2
        assert answer.certificate.failure == 0

    def test_no_tuple_gives_zeros(self, method):
        masks = (None, np.zeros(9, bool))
        answer = approximate(*problem(), method=method, key_mask=masks, **PROVEN)
        np.testing.assert_array_equal(answer.value, 0)
        np.testing.assert_array_equal(answer.log_normalizer, -np.inf)

    def test_batches_broadcast(self, method):
        query, keys, values = problem(n=8)
        batch = (np.stack([query, -query]), keys, values)
        whole = tensor_attention(*batch, method=method, **PROVEN)
        for x, one in zip(batch[0], whole, strict=True):
            alone = tensor_attention(x, keys, values, method=method, **PROVEN)
            np.testing.assert_array_equal(one, alone)

    def test_pairwise_attention_is_refused(self, method):
        x = np.ones((3, 4))
        for call in (fastattn.attention, fastattn.explain):
            with pytest.raises(TypeError, match="expected tuples of keys"):
                call(x, x, x, method=method)

    def test_a_tolerance_below_rounding_is_refused(self, method):
        for guarantee in ("proven", "sampled"):
            with pytest.raises(RefusalError, match="tol=1e-19 cannot be "):
                tensor_attention(
                    *problem(), tol=1e-19, method=method, guarantee=guarantee
                )


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ((5, 6), {"method": TensorWindow((3,))}, "sizes: expected 2 windows"),
        ((5, 6, 7), {"method": StrassenAttention()}, "expected two factors, got 3"),
        ((5, 6), {"method": PathAttention(), "is_causal": True}, "is_causal"),
        ((5, 6), {"method": StrassenAttention(), "is_causal": True}, "is_causal"),
    ],
)
def test_what_does_not_fit_is_named(lengths, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tensor_attention(*problem(lengths), **options)


@pytest.mark.parametrize(
    ("sizes", "kind"), [(3, TypeError), ((0, 2), ValueError), ((2.0, 1), TypeError)]
)
def test_windows_are_whole_numbers(sizes, kind):
    with pytest.raises(kind, match="sizes"):
        TensorWindow(sizes)
