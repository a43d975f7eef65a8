"""The planner: it keeps tolerances, says why, and does not depend on luck."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import fastattn
from fastattn import Auto, Exact, Polynomial, approximate, attention, explain
from fastattn.planning import auto
from tests import oracles


def smooth(n=1100, d=8, spread=0.3, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple((spread * rng.standard_normal((3, n, d))).astype(dtype))


@pytest.fixture(scope="module")
def real():
    return {name: fastattn.load_sample(name) for name in fastattn.sample_names()}


@pytest.mark.parametrize("name", fastattn.sample_names())
@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_real_heads_meet_the_tolerance(real, name, guarantee):
    inputs = tuple(x[:3] for x in real[name])
    answer = approximate(*inputs, tol=0.2, guarantee=guarantee, rng=0)
    truth, normalizer = oracles.attention(*inputs)
    errors = oracles.error_in(answer.certificate.norm, answer.value, truth)
    half = np.ptp(inputs[2], axis=1).max(axis=1) / 2
    unit = half if guarantee == "proven" else 1
    assert np.all(answer.certificate.error <= 0.2 * unit)
    assert np.all(errors <= 0.2 * unit)
    assert answer.log_normalizer.shape == normalizer.shape


def test_smooth_heads_take_the_polynomial():
    query, key, value = smooth(n=4096, spread=0.2)
    answer = approximate(query, key, value, tol=0.1, rng=0)
    assert isinstance(answer.plan.method, Polynomial)
    truth, _ = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= 0.1


@pytest.mark.parametrize("spread", [2.0, 4.0, 8.0, 30.0])
def test_sharp_heads_take_exact_without_a_warning(spread):
    query, key, value = smooth(spread=spread)
    answer = approximate(query, key, value, rng=0)
    assert isinstance(answer.plan.method, Exact)
    truth, _ = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= answer.certificate.error


@pytest.mark.parametrize("change", ["query", "key", "value", "all"])
def test_zeros_are_served(change):
    inputs = [
        0 * x if change in (name, "all") else x
        for name, x in zip(("query", "key", "value"), smooth(), strict=True)
    ]
    answer = approximate(*inputs, rng=0)
    truth, _ = oracles.attention(*inputs)
    np.testing.assert_allclose(answer.value, truth, atol=1e-6)
    assert answer.certificate.error <= 1e-2


def test_small_causal_heads_are_exact():
    query, key, value = smooth(n=1300)
    answer = approximate(query, key, value, is_causal=True, rng=0)
    assert isinstance(answer.plan.method, Exact)
    assert f"{1300 * 1301 // 2} logits are too few" in answer.plan.reason


def test_small_heads_are_exact_and_say_so():
    answer = approximate(*smooth(n=100), rng=0)
    assert isinstance(answer.plan.method, Exact)
    assert "too few" in answer.plan.reason


def test_auto_is_the_default():
    inputs = smooth()
    np.testing.assert_array_equal(
        attention(*inputs, rng=0), attention(*inputs, method=Auto(), rng=0)
    )


def test_attention_is_the_value_of_approximate():
    inputs = smooth()
    np.testing.assert_array_equal(
        attention(*inputs, rng=3), approximate(*inputs, rng=3).value
    )


def test_an_int_makes_it_reproducible():
    inputs = smooth(n=1500)
    first, second = (approximate(*inputs, tol=0.1, rng=11) for _ in range(2))
    np.testing.assert_array_equal(first.value, second.value)
    assert first.certificate == second.certificate
    assert first.plan.method == second.plan.method


@pytest.mark.parametrize(
    "source", [np.random.default_rng(3), np.random.SeedSequence(3), np.random.PCG64(3)]
)
def test_any_source_of_numbers_is_taken(source):
    inputs = smooth()
    want = attention(*inputs, rng=3)
    np.testing.assert_array_equal(attention(*inputs, rng=source), want)


@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_four_threads_give_the_same_answers(guarantee):
    problems = [smooth(n=1100, seed=seed) for seed in range(4)]

    def solve(inputs):
        return attention(*inputs, tol=0.1, guarantee=guarantee, rng=0)

    alone = [solve(inputs) for inputs in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solve, problems * 2))
    for one, other in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_explain_tells_what_would_run(guarantee):
    inputs = smooth(n=2048, spread=0.2)
    options = {"tol": 0.1, "guarantee": guarantee, "rng": 0}
    (candidates,) = explain(*inputs, **options).heads
    taken = next(c for c in candidates if c.accepted)
    assert approximate(*inputs, **options).plan.method == taken.plan.method


def test_explain_is_a_table_with_a_line_a_candidate(real):
    inputs = tuple(x[:2] for x in real["minilm-sharp"])
    explanation = explain(*inputs, rng=0)
    lines = str(explanation).splitlines()
    assert explanation.lead == (2,)
    assert len(lines) == 1 + sum(len(c) for c in explanation.heads)
    assert sum("->" in line for line in lines) == 2
    assert all(any(c.accepted for c in heads) for heads in explanation.heads)


def test_a_batch_plans_each_head_for_itself():
    heads = [smooth(n=8192, spread=s) for s in (0.2, 6.0)]
    batch = [np.stack(parts) for parts in zip(*heads, strict=True)]
    answer = approximate(*batch, tol=0.1, rng=0)
    assert [type(plan.method) for plan in answer.plan] == [Polynomial, Exact]
    assert answer.certificate.error.shape == answer.certificate.source.shape == (2,)


@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_libraries_get_their_own_arrays_back(xp, guarantee):
    inputs = smooth()
    answer = approximate(*xp.asarrays(*inputs), tol=0.2, guarantee=guarantee, rng=0)
    assert isinstance(answer.value, xp.array_type)
    assert isinstance(answer.log_normalizer, xp.array_type)
    assert xp.dtype_name(answer.value) == "float32"
    truth, normalizer = oracles.attention(*inputs)
    error = oracles.error_in(answer.certificate.norm, np.asarray(answer.value), truth)
    assert error <= answer.certificate.error
    np.testing.assert_allclose(np.asarray(answer.log_normalizer), normalizer, atol=0.2)


@pytest.mark.parametrize("method", [Exact(), Polynomial(degree=2)], ids=str)
@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_half_precision(dtype, guarantee, method):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    inputs = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in smooth(n=60)]
    answer = approximate(*inputs, tol=0.5, guarantee=guarantee, method=method, rng=0)
    assert answer.value.dtype == getattr(torch, dtype)
    assert answer.log_normalizer.dtype == torch.float32
    truth, _ = oracles.attention(*(x.double().numpy() for x in inputs))
    error = oracles.error_in(
        answer.certificate.norm, answer.value.double().numpy(), truth
    )
    assert error <= answer.certificate.error


def test_torch_tensors_that_want_gradients_are_served_without_a_warning():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    inputs = [torch.from_numpy(x).requires_grad_() for x in smooth(n=60)]
    want = attention(*smooth(n=60), rng=0)
    with torch.no_grad():
        got = attention(*inputs, rng=0)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_follow_the_library(xp, causal):
    query, key, value = smooth(n=50)
    mask = np.random.default_rng(1).random(50) < 0.5
    answer = approximate(
        *xp.asarrays(query, key, value),
        key_mask=xp.asarray(mask),
        is_causal=causal,
        rng=0,
    )
    truth, _ = oracles.attention(query, key, value, key_mask=mask, is_causal=causal)
    np.testing.assert_allclose(np.asarray(answer.value), truth, atol=1e-5)


def test_masked_heads_may_still_be_fast():
    query, key, value = smooth(n=4096, spread=0.2)
    mask = np.random.default_rng(1).random(4096) < 0.7
    answer = approximate(query, key, value, key_mask=mask, tol=0.1, rng=0)
    truth, _ = oracles.attention(query, key, value, key_mask=mask)
    assert oracles.frobenius_error(answer.value, truth) <= 0.1


def large(bound, d=2, n=4100, m=4100, p=3):
    """A head with enough logits to be planned, none beyond ``bound``."""
    rng = np.random.default_rng(0)
    query, key = rng.uniform(-1, 1, (n, d)), rng.uniform(-1, 1, (m, d))
    # the default scale is undone
    return bound / d**0.5 * query, key, rng.standard_normal((m, p))


@pytest.mark.parametrize(
    ("bound", "d", "reason"),
    [(0.5, 24, "times as long as Exact"), (400.0, 2, "")],
)
def test_proven_polynomials_that_do_not_pay_are_left(bound, d, reason):
    inputs = large(bound, d)
    answer = approximate(*inputs, tol=1e-6, guarantee="proven")
    assert isinstance(answer.plan.method, Exact)
    assert answer.certificate.failure == 0
    assert reason in str(explain(*inputs, tol=1e-6, guarantee="proven"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proven_polynomials_that_pay_are_taken(dtype):
    inputs = [x.astype(dtype) for x in large(0.5, m=4200)]
    answer = approximate(*inputs, tol=1e-3, guarantee="proven", rng=0)
    assert isinstance(answer.plan.method, Polynomial)
    assert answer.plan.reason == "proven"
    assert answer.certificate.failure == 0
    half = np.ptp(inputs[2], axis=0).max() / 2
    truth, _ = oracles.attention(*inputs)
    error = oracles.largest_error(answer.value, truth)
    assert 0 < error <= answer.certificate.error <= 1e-3 * half
    # what it was compared with stands behind it
    first, last = explain(*inputs, tol=1e-3, guarantee="proven", rng=0).heads[0]
    assert first.accepted
    assert first.plan.method == answer.plan.method
    assert isinstance(last.plan.method, Exact)


@pytest.fixture
def without_eight_bits(monkeypatch):
    """The same choices on every processor."""
    monkeypatch.setattr(auto, "why_not", lambda _: "not here")


@pytest.mark.usefixtures("without_eight_bits")
def test_certificates_that_miss_end_in_exact_attention(monkeypatch):
    inputs = [x.astype(np.float32) for x in large(1.0, d=4)]
    seen = []

    def missing(head, configured, tol, rng, shared):
        answer = real_answer(head, configured, tol, rng, shared)
        seen.append(configured.plan.method)
        return replace(answer, error=1.5 * tol)

    real_answer = auto.answer_of
    monkeypatch.setattr(auto, "answer_of", missing)
    answer = approximate(*inputs, tol=1e-2, rng=0)
    assert isinstance(answer.plan.method, Exact)
    assert "certified 1.50e-02 where" in answer.plan.reason
    # the second asks for more than the first
    assert len(seen) == 2
    assert seen[1].rank + seen[1].landmarks >= seen[0].rank + seen[0].landmarks
