"""Derivatives of attention: exact ones, in any library, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from fastattn import (
    Exact,
    RefusalError,
    attention,
    attention_vjp,
)
from fastattn._ops.gradient import attend_vjp
from tests import oracles
from tests.derivatives import problem, slack_of, softmax_vjp
from tests.laws import DTYPES, OpLaws


def assert_right(inputs, **options):
    more = {k: options[k] for k in ("scale", "is_causal", "key_mask") if k in options}
    truth = softmax_vjp(*inputs, **more)
    got = attention_vjp(*inputs, rng=0, **options)
    slack = slack_of(*inputs, scale=options.get("scale"))
    for one, other, x in zip(got, truth, inputs, strict=False):
        assert one.shape == x.shape
        assert one.dtype == x.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=slack)
    return got


class TestAttendVjp(OpLaws):
    op = attend_vjp
    widths = 5, 3

    def inputs(self, rng, dtype, n, m):
        d, p = self.widths
        shapes = (n, d), (m, d), (m, p), (n, p)
        arrays = [rng.standard_normal(x).astype(dtype) for x in shapes]
        return arrays, {"scale": 0.4, "prefix_lengths": None}

    def slack(self, arrays, options):
        return slack_of(*arrays, scale=options["scale"])


class TestAttendVjpVisible(TestAttendVjp):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "prefix_lengths": rng.integers(0, m + 1, n)}


class TestAttendVjpOfSomeKeys(TestAttendVjp):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        # as if there were as many keys again
        query, key, value, grad = arrays
        out, normalizer = oracles.attention(query, key, value, scale=0.4)
        known = {"log_normalizer": normalizer + np.log(2), "delta": (grad * out).sum(1)}
        # one row that is to add nothing
        known["log_normalizer"][0] = np.inf
        return arrays, {**options, **{k: x.astype(dtype) for k, x in known.items()}}


class TestAttendVjpBeside(TestAttendVjp):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        # rows that see none of the keys, and rows that are to add nothing
        prefix_lengths, outlier_mask = rng.integers(0, m + 1, n), rng.random(n) < 0.1
        other, moved = rng.standard_normal((2, n)).astype(dtype)

        def beside(rows, log_normalizer, delta):
            both = np.logaddexp(log_normalizer, other[rows])
            share = np.exp(log_normalizer - both)
            both[outlier_mask[rows]] = np.inf
            return both, share * delta + (1 - share) * moved[rows]

        return arrays, {**options, "prefix_lengths": prefix_lengths, "beside": beside}

    def test_rows_beside_no_keys_are_asked_too(self, place):
        (query, key, value, grad), options = self.inputs(
            np.random.default_rng(0), np.float64, 40, 1
        )
        asked = []

        def beside(rows, log_normalizer, delta):
            assert np.all(log_normalizer == -np.inf)
            assert np.all(delta == 0)
            asked.extend(range(rows.start, rows.stop))
            return log_normalizer, delta

        gradients = self.op.kernel(place)(
            query, key[:0], value[:0], grad, **{**options, "beside": beside}
        )
        d, p = self.widths
        assert sorted(asked) == list(range(40))
        assert [x.shape for x in gradients] == [(40, d), (0, d), (0, p)]
        np.testing.assert_array_equal(gradients[0], 0)


@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(1, 5),
    p=st.integers(1, 4),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_derivatives_are_those_of_the_definition(n, m, d, p, is_causal, seed, dtype):
    assert_right(problem(n, m, d, p, seed, dtype), is_causal=is_causal)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_are_those_of_finite_differences(place, is_causal):
    *inputs, grad = problem(n=5, m=6)
    got = attention_vjp(*inputs, grad, is_causal=is_causal)[place]
    for entry in np.ndindex(*inputs[place].shape):
        values = []
        for step in (1e-6, -1e-6):
            moved = [x.copy() for x in inputs]
            moved[place][entry] += step
            values.append(np.sum(grad * attention(*moved, is_causal=is_causal)))
        assert got[entry] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_are_those_of_torch(is_causal):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    *inputs, grad = problem(n=600, m=600, d=16, p=8, dtype=np.float32, lead=(2,))
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(
        *tensors, is_causal=is_causal
    )
    wanted = torch.autograd.grad(out, tensors, torch.tensor(grad))
    got = attention_vjp(*inputs, grad, is_causal=is_causal)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0, 2.0**-30])
def test_any_scale_is_right(scale):
    assert_right(problem(), scale=scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "m"), [(9, 5), (5, 9), (600, 600)])
def test_causal_and_masked_keys(n, m, masked):
    mask = np.random.default_rng(1).random(m) < 0.6 if masked else None
    gradients = assert_right(problem(n=n, m=m), is_causal=True, key_mask=mask)
    if masked:
        np.testing.assert_array_equal(gradients[1][~mask], 0)
        np.testing.assert_array_equal(gradients[2][~mask], 0)


def test_broadcast_dimensions_are_summed_over():
    rng = np.random.default_rng(0)
    shapes = (2, 1, 1, 7, 4), (3, 1, 8, 4), (8, 5), (2, 3, 2, 7, 5)
    mask = rng.random((2, 8)) < 0.6
    inputs = [rng.standard_normal(x) for x in shapes]
    assert_right(inputs, key_mask=mask)


def test_rows_without_a_key_have_no_derivative():
    inputs = problem()
    mask = np.arange(15) >= 4
    gradients = assert_right(inputs, is_causal=True, key_mask=mask)
    np.testing.assert_array_equal(gradients[0][:4], 0)
    none = attention_vjp(*inputs, key_mask=np.zeros(15, bool))
    for slope in none:
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_leave_finite_derivatives(dtype):
    query, key, value, grad = problem(n=40, m=600, dtype=dtype)
    query *= 1000
    assert_right((query, key, value, grad))
    gradients = attention_vjp(1e12 * query, 1e12 * key, value, grad)
    assert all(np.isfinite(x).all() for x in gradients)


def test_derivatives_are_linear_in_that_of_the_output():
    *inputs, grad = problem()
    other = np.flip(grad)
    one, two = (attention_vjp(*inputs, x) for x in (grad, other))
    both = attention_vjp(*inputs, 2 * grad - 3 * other)
    for x, y, z in zip(one, two, both, strict=True):
        np.testing.assert_allclose(2 * x - 3 * y, z, rtol=0, atol=1e-13)


def test_rows_of_logits_move_together():
    # softmax is invariant to a constant added to a row, and so are gradients
    query, key, value, grad = problem()
    gradients = attention_vjp(query, key, value, grad)
    np.testing.assert_allclose(gradients[1].sum(axis=0), 0, atol=1e-13)
    moved = attention_vjp(query, key + 2.5, value, grad)
    np.testing.assert_allclose(moved[0], gradients[0], rtol=0, atol=1e-12)
    constant = attention_vjp(query, key, np.ones_like(value), grad)
    np.testing.assert_allclose(constant[0], 0, atol=1e-14)


def test_answer_does_not_depend_on_the_number_of_threads():
    inputs = problem(n=2100, m=700, d=8, p=8, dtype=np.float32)
    answers = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            answers.append(attention_vjp(*inputs))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_library_and_dtype_follow_the_inputs(xp):
    for dtype in DTYPES:
        inputs = problem(dtype=dtype)
        mask = np.arange(15) % 3 > 0
        got = attention_vjp(
            *xp.asarrays(*inputs), is_causal=True, key_mask=xp.asarray(mask)
        )
        truth = softmax_vjp(*inputs, is_causal=True, key_mask=mask)
        for one, other in zip(got, truth, strict=True):
            assert isinstance(one, xp.array_type)
            assert xp.dtype_name(one) == np.dtype(dtype).name
            slack = slack_of(*inputs)
            np.testing.assert_allclose(np.asarray(one), other, rtol=0, atol=slack)


def test_half_precision_is_computed_in_float32():
    inputs = problem(dtype=np.float16)
    truth = softmax_vjp(*inputs)
    for one, other in zip(attention_vjp(*inputs), truth, strict=True):
        assert one.dtype == np.float16
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_derivatives_beyond_a_dtype_are_refused():
    query, key, value, grad = problem(dtype=np.float16)
    with pytest.raises(RefusalError, match="overflows float16: scale grad_output"):
        attention_vjp(query, key, 200 * value, 6e4 * np.sign(grad))
    inputs = [1e200 * x for x in problem()]
    with pytest.raises(RefusalError, match="overflow float64: scale"):
        attention_vjp(*inputs)


BAD = {
    "shape": (
        lambda x: x[:-1],
        ValueError,
        r"expected shape \(12, 3\), .* got \(11, 3\)",
    ),
    "dimensions": (lambda x: x[None], ValueError, r"expected .* got \(1, 12, 3\)"),
    "dtype": (lambda x: x.astype("f4"), TypeError, "expected float64, .* got float32"),
    "NaN": (
        lambda x: np.where(np.eye(12, 3) > 0, np.nan, x),
        ValueError,
        r"expected finite numbers, got 3 NaN or infinite, the first at \(0, 0\)",
    ),
    "a list": (lambda x: x.tolist(), TypeError, "expected arrays .* got list"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_grad_output_is_refused_by_name(case):
    change, error, message = case
    *inputs, grad = problem()
    with pytest.raises(error, match=f"grad_output: {message}"):
        attention_vjp(*inputs, change(grad))


def test_bad_options_are_refused_by_name():
    inputs = problem()
    with pytest.raises(ValueError, match="tol: expected a number above 0"):
        attention_vjp(*inputs, tol=0)
    with pytest.raises(ValueError, match="guarantee: expected one of"):
        attention_vjp(*inputs, guarantee="maybe")
    with pytest.raises(TypeError, match="method: expected a method object"):
        attention_vjp(*inputs, method=Exact)
    with pytest.raises(ValueError, match="query: expected finite numbers"):
        attention_vjp(np.full((12, 4), np.nan), *inputs[1:])
