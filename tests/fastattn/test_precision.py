"""A museum of numerical accidents, each under the name of what went wrong."""

import numpy as np
import pytest

from fastattn import Exact, Polynomial, RefusalError, approximate
from tests import oracles


def problem(n=300, d=8, spread=1.0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [(spread * rng.standard_normal((n, w))).astype(dtype) for w in (d, d, 3)]


def assert_kept(inputs, **options):
    """The realised error is within the certificate, or the head is refused."""
    options = {"rng": 0, **options}
    try:
        answer = approximate(*inputs, **options)
    except RefusalError:
        return None
    precise = np.longdouble
    truth, _ = oracles.attention(*inputs, scale=options.get("scale"), dtype=precise)
    certificate = answer.certificate
    off = answer.value.astype(precise) - truth
    if certificate.norm == "max":
        error = np.abs(off).max()
    else:
        size = np.abs(truth).max()
        error = np.sqrt(np.sum((off / size) ** 2) / np.sum((truth / size) ** 2))
    # NaN fails too
    assert error <= certificate.error
    return answer


GUARANTEES = pytest.mark.parametrize("guarantee", ["sampled", "proven"])


@GUARANTEES
def test_exact_sum_of_values_near_the_largest_float_overflows(guarantee):
    query, key, value = problem()
    value = np.where(value > 0, 3e38, 1.5e38).astype(np.float32)
    assert_kept([query, key, value], method=Exact(), guarantee=guarantee)


@GUARANTEES
def test_polynomial_sum_of_values_near_the_largest_float_overflows(guarantee):
    query, key, value = problem(spread=0.3)
    value = np.where(value > 0, 3e38, 1.5e38).astype(np.float32)
    method = Polynomial(degree=3)
    assert_kept([query, key, value], tol=0.1, method=method, guarantee=guarantee)


def test_norm_of_an_answer_whose_squares_overflow_makes_no_error_of_zero():
    query, key, value = problem(dtype=np.float64)
    assert_kept([query, key, value * 1e200])


@GUARANTEES
def test_range_of_values_that_overflows_makes_no_tolerance_infinite(guarantee):
    query, key, value = problem(dtype=np.float64)
    assert_kept([query, key, np.sign(value) * 1.7e308], guarantee=guarantee)


@GUARANTEES
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_outputs_below_the_least_normal_number_round_by_more_than_eps(dtype, guarantee):
    query, key, value = problem()
    least = float(np.finfo(dtype).smallest_normal)
    inputs = [
        query.astype(dtype),
        key.astype(dtype),
        (value.astype(np.float64) * least / 60).astype(dtype),
    ]
    assert_kept(inputs, tol=0.9, method=Exact(), guarantee=guarantee)


@GUARANTEES
@pytest.mark.parametrize("power", [50, -50])
def test_a_scale_beyond_float32_is_no_infinity_and_no_zero(guarantee, power):
    query, key, value = problem()
    factor = 10.0 ** (-power / 2)
    inputs = [query * np.float32(factor), key * np.float32(factor), value]
    assert_kept(inputs, scale=10.0**power, method=Exact(), guarantee=guarantee)


@GUARANTEES
def test_logits_that_overflow_are_refused_without_a_warning(guarantee):
    query, key, value = problem()
    huge = [query * np.float32(1e25), key * np.float32(1e25), value]
    with pytest.raises(RefusalError, match=r"tol=0\.01"):
        approximate(*huge, guarantee=guarantee, rng=0)


@pytest.mark.parametrize("method", [None, Exact(), Polynomial()], ids=str)
@GUARANTEES
def test_entries_whose_squares_overflow_raise_nothing_unclear(guarantee, method):
    query, key, value = problem(dtype=np.float64)
    inputs = [query * 1e160, key * 1e-161, value]
    assert_kept(inputs, guarantee=guarantee, method=method, tol=0.1)


@pytest.mark.parametrize(
    ("method", "factor"), [(Exact(), 3e5), (Polynomial(degree=1), 0.3)], ids=str
)
def test_infinite_bound_times_no_range_is_not_nan(method, factor):
    query, key, value = problem(spread=1)
    query = query * np.float32(factor)
    answer = approximate(
        query, key, np.ones_like(value), method=method, guarantee="proven"
    )
    assert np.isfinite(answer.certificate.error)


@pytest.mark.parametrize("dtype", ["longdouble", ">f8", ">f4"])
@pytest.mark.parametrize("method", [Exact(), Polynomial()], ids=str)
def test_unusual_floats_are_served_in_full_or_refused_clearly(method, dtype):
    inputs = [x.astype(dtype) for x in problem(spread=0.3, dtype=np.float64)]
    try:
        answer = approximate(*inputs, tol=0.1, method=method, guarantee="proven", rng=0)
    except TypeError as error:
        assert "dtype" in str(error)  # noqa: PT017
        return
    truth, _ = oracles.attention(*inputs)
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error


def test_big_endian_double_is_not_computed_in_single():
    inputs = problem(dtype=np.float64)
    want = approximate(*inputs, tol=1e-9, rng=0)
    got = approximate(*(x.astype(">f8") for x in inputs), tol=1e-9, rng=0)
    np.testing.assert_allclose(got.value, want.value, rtol=1e-12)


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("method", [None, Exact(), Polynomial(degree=4)], ids=str)
@GUARANTEES
def test_common_offset_is_not_lost_in_rounding(guarantee, method, which, offset):
    inputs = problem(spread=0.3)
    inputs[which] += np.float32(offset)
    if which == 0:
        # a large query sees the keys through a large factor
        inputs[1] = inputs[1] / np.float32(offset)
    assert_kept(inputs, tol=0.5, method=method, guarantee=guarantee)


@pytest.mark.parametrize("method", [Exact(), Polynomial(degree=4)], ids=str)
def test_offset_of_the_keys_costs_the_log_normalizer_its_own_rounding_only(method):
    query, key, value = problem(spread=0.3)
    key += np.float32(1e3)
    answer = approximate(query, key, value, tol=0.5, method=method, rng=0)
    _, truth = oracles.attention(query, key, value)
    largest = np.abs(truth).max()
    slack = 1e-3 + 32 * np.finfo(np.float32).eps * largest
    np.testing.assert_allclose(answer.log_normalizer, truth, atol=slack, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 0.0])
@pytest.mark.parametrize("method", [None, Exact(), Polynomial()], ids=str)
@GUARANTEES
def test_tiny_scale_gives_plain_means(guarantee, method, scale):
    inputs = problem(n=1100)
    answer = approximate(
        *inputs, scale=scale, method=method, guarantee=guarantee, rng=0
    )
    want = np.tile(inputs[2].astype(float).mean(axis=0), (1100, 1))
    np.testing.assert_allclose(answer.value, want, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-42, 1e-30])
@GUARANTEES
def test_subnormal_inputs_are_served(guarantee, factor):
    query, key, value = problem(n=1100)
    tiny = (query.astype(float) * factor).astype(np.float32)
    assert_kept([tiny, key, value], guarantee=guarantee, tol=0.1)


def test_weights_below_the_least_float_do_not_become_nan():
    # one key is far below the rest: its weight underflows
    query = np.ones((3, 1), np.float32)
    key = np.array([[0.0], [-1000.0], [-80.0]], np.float32)
    value = np.array([[1.0], [1e30], [2.0]], np.float32)
    answer = approximate(query, key, value, scale=1.0, tol=0.5, guarantee="proven")
    truth, _ = oracles.attention(query, key, value, scale=1.0)
    assert oracles.largest_error(answer.value, truth) <= answer.certificate.error


@pytest.mark.parametrize("source", ["RandomState", "legacy Generator"])
def test_a_generator_without_a_seed_sequence_is_served_or_refused_by_name(source):
    state = np.random.RandomState(0)
    rng = (
        state if source == "RandomState" else np.random.Generator(state._bit_generator)
    )
    inputs = problem(n=20)
    try:
        answer = approximate(*inputs, rng=rng)
    except TypeError as error:
        assert str(error).startswith("rng:")  # noqa: PT017
        return
    assert answer.value.shape == (20, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_strided_inputs_are_read_right(dtype):
    inputs = problem(spread=0.3, dtype=dtype)
    awkward = [np.repeat(np.asfortranarray(x), 2, axis=0)[::-2][::-1] for x in inputs]
    for method in (Exact(), Polynomial(degree=3)):
        want = approximate(*inputs, tol=1, method=method, rng=0).value
        got = approximate(*awkward, tol=1, method=method, rng=0).value
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(
            got.astype(float), want.astype(float), atol=64 * eps, rtol=0
        )
