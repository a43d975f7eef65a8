"""Attention by int8/bfloat16 matmuls: the kernel, its certificate, and refusals."""

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest

import fastattn.methods.quantized
from fastattn import (
    Auto,
    Exact,
    Quantized,
    RefusalError,
    approximate,
    attention,
    explain,
    load_sample,
)
from fastattn._ops.cpu.tiles import multiplies_bytes
from fastattn._ops.quantized import attend_quantized, rounded
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.planning import auto
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.fastattn.methods.multipole.test_near_keys import ROUNDING, slack
from tests.laws import OpLaws
from tests.pairwise import pairwise

needs_eight_bits = pytest.mark.skipif(
    not multiplies_bytes(), reason="the processor has no AVX-512 BF16 and VNNI"
)
both = pytest.mark.parametrize("integers", [False, True])


def problem(n, m, d=16, p=8, seed=0, spread=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    query, key = (rng.standard_normal((s, d)) for s in (n, m))
    arrays = spread * query, spread * key + shift, rng.standard_normal((m, p)) + shift
    return [x.astype(np.float32) for x in arrays]


@needs_eight_bits
class TestAttendQuantized(OpLaws):
    op = attend_quantized
    integers = False

    def inputs(self, rng, dtype, n, m):
        arrays = (rng.standard_normal(s) for s in ((n, 7), (m, 7), (m, 5)))
        options = {"scale": 0.4, "prefix_lengths": None, "integers": self.integers}
        return [x.astype(dtype) for x in arrays], options

    def slack(self, arrays, options):
        # both round alike, but for ties, and cut weights where the other rounds them
        query, key, value = arrays
        scaled = options["scale"] * query
        off = slack(scaled, scaled.mean(axis=0), key, self.integers)
        return off * max(1.0, np.abs(value).max())


class TestAttendQuantizedInIntegers(TestAttendQuantized):
    integers = True


@needs_eight_bits
class TestCausalAttendQuantized(TestAttendQuantized):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "prefix_lengths": np.arange(n) * m // n}


@both
@pytest.mark.parametrize("place", [None, pytest.param("cpu", marks=needs_eight_bits)])
@pytest.mark.parametrize("prefix_lengths", [None, "causal", "any"])
def test_errors_are_those_of_rounded_factors(place, prefix_lengths, integers):
    query, key, value = problem(300, 301, shift=3.0)
    seen = {
        None: None,
        "causal": np.arange(300) + 2,
        "any": np.random.default_rng(0).integers(0, 302, 300),
    }[prefix_lengths]
    out, norm = attend_quantized.kernel(place)(
        query, key, value, scale=0.25, prefix_lengths=seen, integers=integers
    )
    logits = 0.25 * query.astype(float) @ key.T.astype(float)
    sees = np.arange(301) < (np.full(300, 301) if seen is None else seen)[:, None]
    some = sees.any(axis=1)
    logits = np.where(sees, logits, -np.inf)[some]
    want, log_sum = oracles.softmax_mean(logits, value)
    off = slack(0.25 * query, 0.25 * query.mean(axis=0), key, integers)
    largest = np.abs(value - value.mean(axis=0)).max()
    np.testing.assert_allclose(out[some], want, atol=off * largest, rtol=0)
    np.testing.assert_allclose(norm[some], log_sum, atol=off, rtol=0)
    assert not out[~some].any()
    assert np.isneginf(norm[~some]).all()


def test_eight_bits_are_kept():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    kept = rounded(x)
    assert not np.any(kept.view(np.uint32) & np.uint32(0xFFFF))
    assert np.all(np.abs(kept - x) <= ROUNDING * 2 * np.abs(x))


@needs_eight_bits
@both
def test_weights_out_of_range_are_no_number(integers):
    # the one large logit is of a key that no row's weights are relative to
    query, key, value = problem(40, 200, d=4)
    key[:] = 0.1 * key
    key[101] = 3000
    query[:20] = np.abs(query[:20]) + 1
    _, norm = attend_quantized(
        query, key, value, scale=1.0, prefix_lengths=None, integers=integers
    )
    assert np.isnan(norm[:20]).all()


@needs_eight_bits
@pairwise(
    ("logits", "is_causal", "dtype"),
    [None, "int8", "bfloat16"],
    [False, True],
    [np.float32, np.float16],
)
def test_real_heads_keep_their_certificates(logits, is_causal, dtype):
    for name in fastattn.sample_names():
        query, key, value = (x[:2].astype(dtype) for x in load_sample(name))
        answer = approximate(
            query,
            key,
            value,
            tol=0.03,
            method=Quantized(logits),
            is_causal=is_causal,
            rng=0,
        )
        truth, _ = oracles.attention(query, key, value, is_causal=is_causal)
        errors = oracles.error_in("relative-frobenius", answer.value, truth)
        assert answer.value.dtype == dtype
        assert np.all(errors <= answer.certificate.error)
        assert np.all(answer.certificate.error <= 0.03)


@needs_eight_bits
@pytest.mark.parametrize("logits", ["int8", "bfloat16"])
@pytest.mark.parametrize(
    "is_causal", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_certificates_fail_no_more_often_than_they_say(logits, is_causal):
    query, key, value = (x[1, :1200] for x in load_sample("minilm-sharp"))
    truth, _ = oracles.attention(query, key, value, is_causal=is_causal)
    options = {"tol": 0.05, "method": Quantized(logits), "is_causal": is_causal}

    def trial(rng):
        answer = approximate(query, key, value, rng=rng, **options)
        error = oracles.frobenius_error(answer.value, truth)
        assert answer.certificate.failure == FAILURE
        return error <= answer.certificate.error

    assert_fails_rarely(trial, failure=FAILURE, trials=100, false_alarm=1e-6)


@needs_eight_bits
@pytest.mark.parametrize("count", [1, 2, 33])
def test_few_rows_and_keys_are_served(count):
    query, key, value = problem(count, 1 + count // 2, d=3, p=1)
    answer = approximate(query, key, value, tol=0.1, method=Quantized(), rng=0)
    truth, _ = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= answer.certificate.error


@needs_eight_bits
def test_low_precision_is_taken_where_it_suffices():
    query, key, value = problem(600, 600, spread=1.5)
    methods = [
        approximate(query, key, value, tol=tol, method=Quantized(), rng=0).plan.method
        for tol in (0.2, 0.02)
    ]
    assert [x.logits for x in methods] == ["int8", "bfloat16"]


@needs_eight_bits
def test_a_tolerance_beyond_eight_bits_is_refused_with_the_error():
    inputs = problem(600, 600, spread=1.5)
    with pytest.raises(RefusalError, match=r"err by \d\.\de-\d\d in a few rows"):
        attention(*inputs, tol=1e-5, method=Quantized(), rng=0)
    with pytest.raises(RefusalError, match=r"misses tol=1e-05: .* on sampled rows"):
        attention(*inputs, tol=1e-5, method=Quantized("int8"), rng=0)


@needs_eight_bits
def test_a_row_whose_weights_overflow_is_computed_exactly():
    query, key, value = problem(500, 500, spread=0.5)
    key[300] = 300 * query[7] / np.linalg.norm(query[7])
    inputs = query, key, value
    answer = approximate(*inputs, tol=0.1, method=Quantized("bfloat16"), rng=0)
    truth, _ = oracles.attention(*inputs)
    assert np.isfinite(answer.value).all()
    assert oracles.frobenius_error(answer.value, truth) <= answer.certificate.error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guarantee": "proven"}, "no proven bound"),
        ({"dtype": np.float64}, "too inaccurate for float64"),
        ({"here": False}, "AVX-512 BF16 and VNNI"),
    ],
)
def test_what_is_refused_says_why(change, message, monkeypatch):
    here = change.pop("here", True)
    monkeypatch.setattr(
        fastattn.methods.quantized, "multiplies_quantized", lambda _: here
    )
    dtype = change.pop("dtype", np.float32)
    inputs = [x.astype(dtype) for x in problem(50, 50)]
    with pytest.raises(RefusalError, match=message):
        attention(*inputs, method=Quantized(), rng=0, **change)


def test_other_libraries_are_refused():
    inputs = [array_api_strict.asarray(x) for x in problem(50, 50)]
    with pytest.raises(RefusalError, match="need NumPy arrays"):
        attention(*inputs, method=Quantized(), rng=0)


def test_an_unknown_rounding_names_the_choices():
    with pytest.raises(ValueError, match="logits: expected one of"):
        Quantized("int4")


@needs_eight_bits
def test_auto_takes_eight_bits_where_nothing_else_serves():
    query, key, value = (x[0] for x in load_sample("minilm-sharp"))
    answer = approximate(query, key, value, tol=0.02, rng=0)
    assert isinstance(answer.plan.method, Quantized)
    truth, _ = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= answer.certificate.error
    table = str(explain(query, key, value, tol=0.02, rng=0))
    assert "Quantized(logits=" in table


@needs_eight_bits
@pytest.mark.parametrize("tol", [1e-3, 1e-4])
def test_auto_leaves_small_tolerances_to_exact_attention(tol):
    query, key, value = problem(1600, 1600, spread=2.0)
    answer = approximate(query, key, value, tol=tol, rng=0)
    assert isinstance(answer.plan.method, Exact)
    assert "nothing cheaper" in answer.plan.reason


@needs_eight_bits
def test_eight_bits_come_before_exact_attention_where_others_miss(monkeypatch):
    rng = np.random.default_rng(0)
    query, key, value = (0.3 * rng.standard_normal((3, 6000, 8))).astype(np.float32)
    seen, real = [], auto.answer_of

    def missing(head, configured, tol, rng, shared):
        seen.append(type(configured.plan.method).__name__)
        answer = real(head, configured, tol, rng, shared)
        if isinstance(configured.plan.method, Quantized):
            return answer
        return replace(answer, error=2 * tol)

    monkeypatch.setattr(auto, "answer_of", missing)
    answer = approximate(query, key, value, tol=0.05, method=Auto(), rng=0)
    assert seen[0] == "Polynomial"
    assert seen[-1] == "Quantized"
    assert isinstance(answer.plan.method, Quantized)
    assert answer.certificate.error <= 0.05


@needs_eight_bits
@pytest.mark.parametrize("fault", ["misses", "fails"])
def test_eight_bits_that_miss_are_not_tried_again(fault, monkeypatch):
    query, key, value = (x[0] for x in load_sample("minilm-sharp"))
    seen, real = [], auto.answer_of

    def missing(head, configured, tol, rng, shared):
        seen.append(configured.plan.method)
        if fault == "fails":
            raise RefusalError("fails in all rows")
        return replace(real(head, configured, tol, rng, shared), error=2 * tol)

    monkeypatch.setattr(auto, "answer_of", missing)
    answer = approximate(query, key, value, tol=0.02, rng=0)
    assert isinstance(answer.plan.method, Exact)
    assert all(isinstance(x, Quantized) for x in seen)
    # another draw of rows would only give chance another chance
    assert len(seen) == 1
