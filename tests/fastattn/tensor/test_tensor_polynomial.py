"""Polynomials for tensor attention: bounds that hold, certificates that keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import Auto, Exact, Polynomial, RefusalError, approximate
from fastattn._ops.tensor_prefixes import prefix_means
from fastattn.methods.polynomial.expansions import (
    rank_of,
    relative_minimax,
    total_degree,
)
from fastattn.tensor.degree_search import sampled_expansion
from fastattn.tensor.polynomial import proven_expansion
from fastattn.tensor.problem import TensorHead
from fastattn.tensor.sampled import certify_few_rows, certify_tuples
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.laws import DTYPES
from tests.pairwise import pairwise


def problem(lengths=(40, 30), n=50, d=4, p=3, seed=0, dtype=np.float64, size=1.0):
    rng = np.random.default_rng(seed)
    query, *keys = (rng.uniform(-size, size, (m, d)) for m in (n, *lengths))
    values = tuple(rng.uniform(0, 1, (m, p)).astype(dtype) for m in lengths)
    return query.astype(dtype), tuple(x.astype(dtype) for x in keys), values


def proven(inputs, tol=1e-3, method=None, **options):
    method = Polynomial() if method is None else method
    return approximate(*inputs, tol=tol, method=method, guarantee="proven", **options)


def error_of(answer, inputs, **options):
    truth, _ = oracles.tensor_attention(*inputs, **options)
    return oracles.error_in(answer.certificate.norm, answer.value, truth)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    tol=st.sampled_from([1e-1, 1e-3, 1e-5]),
    shift=st.sampled_from([0.0, 0.7]),
)
def test_error_is_within_the_proven_bound(lengths, d, seed, dtype, tol, shift):
    query, keys, values = problem(tuple(lengths), 9, d, 2, seed, dtype)
    keys = tuple((key + shift).astype(dtype) for key in keys)
    inputs = (query, keys, values)
    answer = proven(inputs, tol)
    assert error_of(answer, inputs) <= answer.certificate.error
    assert answer.certificate.failure == 0
    # within the tolerance in half ranges of the products of values
    assert answer.certificate.error <= tol * (1 + 1e-9) / 2 * np.ptp([0, 1])


@pytest.mark.parametrize("order", [2, 3, 4])
def test_worst_values_come_near_the_bound(order):
    # one coordinate: every logit of the interval is met, and values have the sign of
    # the polynomial's error there
    grid = np.linspace(-1, 1, 4001)[:, None]
    ones = np.ones((1, 1))
    coefficients, _ = relative_minimax(3, 1.0)
    sign = np.sign(oracles.relative_error_of_exp(coefficients, grid)).astype(float)
    keys = (grid,) + (ones,) * (order - 2)
    inputs = (ones, keys, (sign,) + (ones,) * (order - 2))
    answer = proven(inputs, tol=1e-1, method=Polynomial(degree=3))
    error = error_of(answer, inputs)
    assert 0.3 * answer.certificate.error <= error <= answer.certificate.error


@given(
    order=st.integers(2, 4),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([-0.3, 0.25, 2.0]),
    shift=st.sampled_from([0.0, 1.0, -3.0]),
    binary=st.booleans(),
)
def test_logit_bounds_hold_every_logit(order, d, seed, scale, shift, binary):
    rng = np.random.default_rng(seed)
    sides = [
        rng.standard_normal((6, d)) * rng.exponential(size=d) for _ in range(order)
    ]
    if binary:
        sides = [np.sign(x) for x in sides]
    query, *keys = (x + shift for x in sides)
    head = TensorHead(query, tuple(keys), tuple(keys), scale)
    logit_bounds = head.logit_bounds
    terms = scale * query
    for key in keys:
        terms = (terms[:, None] * key).reshape(-1, d)
    logits = terms.sum(axis=1)
    assert logit_bounds.low <= logits.min() <= logits.max() <= logit_bounds.high
    assert np.abs(terms).sum(axis=1).max() <= logit_bounds.logit_bound
    assert np.all(np.abs(terms).max(axis=0) <= logit_bounds.terms)
    wanted = np.where(logit_bounds.terms > 0, scale, 0)
    np.testing.assert_allclose(np.prod(logit_bounds.maps, axis=0), wanted, rtol=1e-12)


def test_coordinates_are_balanced_before_logits_are_bounded():
    query, keys, values = problem()
    c = 10.0 ** np.array([3, -4, 0, 8])
    plain = TensorHead(query, keys, values, 0.25).logit_bounds
    keys = (keys[0] * c, keys[1])
    scaled = TensorHead(query / c, keys, values, 0.25).logit_bounds
    np.testing.assert_allclose(scaled.bound, plain.bound, rtol=1e-9)
    for one, other in zip(scaled.maps[1:], plain.maps[1:], strict=True):
        np.testing.assert_allclose(one[[2]], other[[2]], rtol=1e-9)


def test_logits_of_one_sign_need_a_lower_degree():
    # only a constant may be subtracted: the interval is centred, not a factor
    inputs = problem(size=2.0)
    positive = (np.abs(inputs[0]), tuple(np.abs(x) for x in inputs[1]), inputs[2])
    answers = [proven(x, 1e-4) for x in (inputs, positive)]
    degrees = [answer.plan.method.degree for answer in answers]
    assert degrees[1] < degrees[0]
    assert error_of(answers[1], positive) <= answers[1].certificate.error
    _, normalizer = oracles.tensor_attention(*positive)
    np.testing.assert_allclose(answers[1].log_normalizer, normalizer, atol=1e-3)


def test_shifting_one_factor_changes_the_answer():
    query, keys, values = problem()
    moved = (query, (keys[0] + 0.5, keys[1]), values)
    one, other = (
        oracles.tensor_attention(*x)[0] for x in ((query, keys, values), moved)
    )
    assert oracles.largest_error(one, other) > 5e-3
    assert error_of(proven(moved), moved) <= 1e-3


def test_a_smaller_rank_is_proven_with_what_it_drops():
    query, keys, values = inputs = problem(d=6)
    weak = np.array([1, 1, 0.1, 0.1, 0.01, 0.01])
    inputs = (query * weak, keys, values)
    rank = 40
    answer = proven(inputs, 1e-1, Polynomial(degree=3, rank=rank))
    assert answer.plan.method.rank == rank < rank_of(6, 3)
    assert error_of(answer, inputs) <= answer.certificate.error
    whole = proven(inputs, 1e-1, Polynomial(degree=3))
    assert whole.certificate.error < answer.certificate.error


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Polynomial(degree=1), {"tol": 1e-4}, r"degree 1, rank 5 are proven to \d"),
        (Polynomial(degree=2, rank=3), {"tol": 1e-4}, r"rank 3 are proven to"),
        (Polynomial(), {"scale": 30.0}, r"are wider than \+-8"),
        (Polynomial(basis="taylor"), {}, "basis='taylor' has no proven bound"),
        (Polynomial(landmarks=4), {}, "no landmarks"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_numbers(method, options, message):
    with pytest.raises(RefusalError, match=message):
        proven(problem(), **{"method": method, **options})


def test_a_sampled_miss_is_refused_with_numbers():
    with pytest.raises(RefusalError, match=r"misses tol=1e-05: \d"):
        approximate(*problem(), tol=1e-5, method=Polynomial(degree=1), rng=0)
    with pytest.raises(RefusalError, match="sampled logits lie between"):
        approximate(*problem(), scale=60.0, method=Polynomial(), rng=0)


@pytest.mark.parametrize("guarantee", ["proven", "sampled"])
def test_auto_takes_the_polynomial_where_it_pays(guarantee):
    inputs = problem((300, 300), n=300, dtype=np.float32)
    answer = approximate(*inputs, tol=1e-2, guarantee=guarantee, rng=0)
    assert isinstance(answer.plan.method, Polynomial)
    assert error_of(answer, inputs) <= answer.certificate.error
    assert answer.certificate.error <= 1e-2


@pytest.mark.parametrize("guarantee", ["proven", "sampled"])
def test_auto_is_exact_where_no_polynomial_serves(guarantee):
    inputs = problem((200, 200), n=200, dtype=np.float32, size=4.0)
    answer = approximate(*inputs, tol=1e-2, guarantee=guarantee, rng=0, method=Auto())
    assert answer.plan.method == Exact()
    assert "wider than" in answer.plan.reason
    assert error_of(answer, inputs) <= answer.certificate.error


@pairwise(
    ("lengths", "masked", "dtype"),
    [(70,), (70, 70), (20, 90), (70, 33, 70)],
    [False, True],
    DTYPES,
)
def test_causal_rows_see_products_of_prefixes(lengths, masked, dtype, xp):
    query, keys, values = inputs = problem(lengths, n=70, dtype=dtype)
    rng = np.random.default_rng(3)
    mask = tuple(rng.random(m) < 0.5 for m in lengths) if masked else None
    asked = xp.asarray(query), xp.asarrays(*keys), xp.asarrays(*values)
    asked_mask = None if mask is None else xp.asarrays(*mask)
    answer = proven(asked, is_causal=True, key_mask=asked_mask)
    assert isinstance(answer.plan.method, Polynomial)
    options = {"is_causal": True, "key_mask": mask}
    truth, normalizer = oracles.tensor_attention(*inputs, **options)
    error = oracles.largest_error(np.asarray(answer.value), truth)
    assert error <= answer.certificate.error
    np.testing.assert_allclose(answer.log_normalizer, normalizer, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_prefixes_agree_with_the_reference(dtype):
    query, keys, values = problem((40, 99), n=100, d=3, dtype=dtype)
    index = total_degree(3, 3)
    prefix_lengths = tuple(np.minimum(np.arange(1, 101) // 2, m) for m in (40, 99))
    weights = np.random.default_rng(0).uniform(0.1, 1, len(index))
    arrays = query, keys, values, (np.ones(3, dtype),) * 3, weights, prefix_lengths
    options = {"parent": index.parent, "coordinate": index.coordinate}
    got = prefix_means(*arrays, **options)
    want = prefix_means.reference(*arrays, **options)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def test_sampled_causal_answers_are_certified_by_rows():
    inputs = problem((90, 90), n=90)
    # the bound of a larger degree would certify it alone
    method = Polynomial(degree=2)
    answer = approximate(*inputs, method=method, is_causal=True, rng=0)
    assert "64 of 90 rows" in answer.certificate.source
    error = error_of(answer, inputs, is_causal=True)
    assert error <= answer.certificate.error <= 1e-2


def test_auto_begins_no_exact_attention_of_hours():
    inputs = problem((40000, 40000), n=40000, dtype=np.float32, size=4.0)
    with pytest.raises(RefusalError, match="would take hours: raise tol"):
        approximate(*inputs, rng=0)


def head_and_answer(inputs, tol, seed=0):
    rng = np.random.default_rng(seed)
    head = TensorHead(*inputs, 1 / inputs[0].shape[1])
    expansion = sampled_expansion(head, Polynomial(), tol, rng)
    value, normalizer, reliable = expansion.answer(head)
    assert reliable.all()
    return head, expansion, value, normalizer


@pytest.mark.parametrize("rank", [None, 25])
def test_sampled_tuples_estimate_the_error(rank):
    inputs = problem((60, 50), n=80)
    head = TensorHead(*inputs, 0.25)
    rng = np.random.default_rng(0)
    expansion = sampled_expansion(head, Polynomial(degree=3, rank=rank), 1e-2, rng)
    value, normalizer, _ = expansion.answer(head)
    truth, _ = oracles.tensor_attention(*inputs)
    error = oracles.frobenius_error(value, truth)
    found = certify_tuples(head, expansion, value, normalizer, rng)
    assert error <= found.upper
    # the scatter of 1024 tuples adds to the square
    assert found.estimate <= 3 * error
    assert "24 x 8 rows, 1024 of 3000 tuples" in found.source


def test_sampled_promises_are_kept():
    def kept(rng):
        inputs = problem((40, 40), n=64, d=3, p=2, seed=rng, dtype=np.float32)
        truth, _ = oracles.tensor_attention(*inputs)
        head, expansion, value, normalizer = head_and_answer(inputs, 1e-2)
        error = oracles.frobenius_error(value, truth)
        tuples = certify_tuples(head, expansion, value, normalizer, rng)
        rows = certify_few_rows(head, expansion, value, 16, 1e-2, rng)
        return error <= min(tuples.upper, rows.upper)

    # either certificate may fail
    assert_fails_rarely(kept, failure=0.1, trials=60)


def test_a_tuple_too_rare_to_be_sampled_is_not_overlooked():
    # one pair of keys has a twentieth of the weight: no sample of tuples shows it
    query, keys, values = problem((600, 600), n=40, d=2)
    query = np.abs(query) + 0.5
    for key, value in zip(keys, values, strict=True):
        key[17], value[17] = 4.0, 30.0
    inputs = (query, keys, values)
    head = TensorHead(query, keys, values, 0.5)
    rng = np.random.default_rng(0)
    for degree in (2, 4):
        expansion = sampled_expansion(head, Polynomial(degree=degree), 1e-2, rng)
        value, normalizer, _ = expansion.answer(head)
        truth, _ = oracles.tensor_attention(*inputs)
        error = oracles.frobenius_error(value, truth)
        assert error > 0.1
        found = certify_tuples(head, expansion, value, normalizer, rng)
        assert error <= found.upper


def test_a_query_too_rare_to_be_sampled_is_not_overlooked():
    query, keys, values = problem((30, 30), n=4000, d=2)
    query[123] = 9.0
    inputs = (query, keys, values)
    head = TensorHead(query, keys, values, 0.5)
    rng = np.random.default_rng(0)
    expansion = sampled_expansion(head, Polynomial(degree=2), 1e-2, rng)
    truth, _ = oracles.tensor_attention(*inputs)
    value, normalizer, _ = expansion.answer(head)
    error = oracles.frobenius_error(value, truth)
    assert error <= certify_tuples(head, expansion, value, normalizer, rng).upper
    assert error <= certify_few_rows(head, expansion, value, 64, 1e-2, rng).upper


def test_rows_are_computed_where_tuples_scatter_too_much():
    # values of mean 0: the answer is far smaller than what it averages
    query, keys, values = problem((150, 150), n=200, d=3)
    values = tuple(x - 0.5 for x in values)
    inputs = (query, keys, values)
    answer = approximate(*inputs, tol=1e-2, method=Polynomial(degree=2), rng=0)
    assert answer.certificate.source.startswith("64 of 200 rows of 22500 tuples")
    assert error_of(answer, inputs) <= answer.certificate.error <= 1e-2


def test_proven_expansion_takes_the_least_degree():
    inputs = problem()
    head = TensorHead(*inputs, 0.25)
    expansion = proven_expansion(head, 1e-4)
    with pytest.raises(RefusalError):
        proven_expansion(head, 1e-4, expansion.degree - 1)


def test_an_int_makes_it_reproducible():
    inputs = problem((300, 300), n=100, dtype=np.float32)
    answers = [approximate(*inputs, method=Polynomial(), rng=7) for _ in range(2)]
    np.testing.assert_array_equal(answers[0].value, answers[1].value)
    assert answers[0].certificate == answers[1].certificate
