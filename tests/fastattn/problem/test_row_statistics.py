"""Rows that can hurt are known before any row is sampled."""

import numpy as np
import pytest

from fastattn import Auto, Exact, Polynomial, approximate
from fastattn._ops.quantized import attend_quantized, factors
from fastattn.certificates.certify import repaired
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import SharedSampling, certify_rows
from fastattn.methods.quantized import Quantized, _configured, _logit_deviation
from fastattn.problem.head import Head
from fastattn.problem.row_statistics import (
    SeenKeys,
    outlying_rows,
    profile_errors,
    row_statistics,
)
from tests import oracles
from tests.chance import assert_fails_rarely

ALARM = 1e-6


def plain(n, d, seed):
    rng = np.random.default_rng(seed)
    query, key, value = rng.standard_normal((3, n, d))
    return 0.4 * query, 0.6 * key, value, rng


def head_of(query, key, value, prefix_lengths=None):
    arrays = (np.ascontiguousarray(x, np.float32) for x in (query, key, value))
    return Head(*arrays, query.shape[1] ** -0.5, prefix_lengths)


def key_of_few_queries(n=2048, d=32):
    """One key that six queries see, and no other."""
    query, key, value, rng = plain(n, d, 2)
    e = rng.standard_normal(d)
    e /= np.linalg.norm(e)
    query -= np.outer(query @ e, e)
    key -= np.outer(key @ e, e)
    rows = rng.choice(n, 6, replace=False)
    key[1234], value[1234] = 4 * e, 15 * value[1234]
    query[rows] += 16 * e
    return head_of(query, key, value), rows, 1234


def heavy_key_of_common_spread(n=2048, d=32):
    """Eight rows that see one key although their logits vary as those of others."""
    query, key, value, rng = plain(n, d, 4)
    query[:, 0], key[:, 0] = -12, 0
    rows = rng.choice(n, 8, replace=False)
    query[rows, 0] = 12
    key[777] = 0
    key[777, 0] = 5
    value[777] *= 3
    return head_of(query, key, value), rows, 777


def student_entries(n=2048, d=32):
    rng = np.random.default_rng(3)
    return head_of(*(c * rng.standard_t(2.5, (n, d)) for c in (0.4, 0.5, 1.0)))


def truth_of(head):
    return oracles.attention(head.query, head.key, head.value, scale=head.scale)[0]


def relative(value, truth):
    off = np.asarray(value, np.float64) - truth
    return np.linalg.norm(off) / np.linalg.norm(truth)


@pytest.mark.parametrize("make", [key_of_few_queries, heavy_key_of_common_spread])
def test_rows_that_see_a_rare_key_are_found(make):
    head, rows, key = make()
    found = row_statistics(head, np.random.default_rng(0))
    assert key in found.extreme
    seen = SeenKeys.of(head, found, *head.attend())
    profiled = profile_errors(found, seen)
    assert np.isin(rows, profiled.outlier_rows).all()


@pytest.mark.parametrize("make", [key_of_few_queries, heavy_key_of_common_spread])
def test_sums_of_weights_that_miss_a_key_are_too_small(make):
    head, rows, key = make()
    found = row_statistics(head, np.random.default_rng(0))
    rest = np.delete(np.arange(2048), key)
    few = Head(head.query, head.key[rest], head.value[rest], head.scale)
    seen = SeenKeys.of(head, found, *few.attend())
    assert np.all(seen.share[rows] > 1)
    exact = SeenKeys.of(head, found, *head.attend())
    assert np.all(exact.share <= 1 + 1e-4)


@pytest.mark.parametrize("make", [key_of_few_queries, heavy_key_of_common_spread])
def test_default_call_is_within_its_certificate(make):
    head, _, _ = make(4096)
    truth = truth_of(head)

    def trial(rng):
        answer = approximate(head.query, head.key, head.value, tol=0.1, rng=rng)
        return relative(answer.value, truth) <= answer.certificate.error

    assert_fails_rarely(trial, failure=FAILURE, trials=20, false_alarm=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: key_of_few_queries()[0],
        lambda: heavy_key_of_common_spread()[0],
        student_entries,
    ],
    ids=["key of few queries", "heavy key", "student"],
)
@pytest.mark.parametrize(
    "logits", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_certificate_of_rounded_logits_holds_at_its_rate(make, logits, monkeypatch):
    # by the reference: not every processor has int8/bfloat16 matmuls
    monkeypatch.setattr(
        "fastattn.methods.quantized.attend_quantized", attend_quantized.reference
    )
    head = make()
    configured = _configured(Quantized(logits), head, 0.0, "requested")
    with np.errstate(over="ignore", invalid="ignore"):
        # rows whose weights overflow are computed exactly
        found = repaired(
            head, configured, 0.1, SharedSampling(), np.random.default_rng(0)
        )
    error = relative(found.value, truth_of(head))

    def trial(rng):
        drawn = certify_rows(
            head,
            found.value,
            1e-9,
            rng,
            exact_rows=found.exact_rows,
            error_profile=found.squares,
            first=64,
        )
        return error <= drawn.upper

    assert error > 1e-5
    assert_fails_rarely(trial, failure=FAILURE, trials=200, false_alarm=ALARM)


@pytest.mark.parametrize("logits", ["int8", "bfloat16"])
def test_log_sum_exps_of_rounded_logits_are_within_their_bound(logits, monkeypatch):
    monkeypatch.setattr(
        "fastattn.methods.quantized.attend_quantized", attend_quantized.reference
    )
    for head in (student_entries(), key_of_few_queries()[0]):
        configured = _configured(Quantized(logits), head, 0.0, "requested")
        with np.errstate(over="ignore", invalid="ignore"):
            _, logarithm, reliable = configured.run(head)
        _, truth = oracles.attention(head.query, head.key, head.value, scale=head.scale)
        bound = configured.log_errors(head, logarithm)
        off = np.abs(logarithm.astype(np.float64) - truth)[reliable]
        assert np.all(off <= bound[reliable])
        # useful where logits are small
        assert np.median(bound) < 0.5


@pytest.mark.parametrize("logits", ["int8", "bfloat16"])
def test_deviation_of_rounded_logits_is_that_of_the_factors(logits):
    head = student_entries(512)
    query = head.scale * (head.query - head.query.mean(axis=0))
    key = head.key - head.key.mean(axis=0)
    left, right = factors(query, key, integers=logits == "int8")
    off = (left.astype(float) @ right.T.astype(float)) - query.astype(float) @ key.T
    measured = np.sqrt(np.mean(off**2, axis=1))
    predicted = _logit_deviation(head, logits=logits)
    ratio = measured / predicted
    assert 0.5 < np.median(ratio) < 1.3
    assert np.quantile(ratio, 0.99) < 2


def test_outlying_rows_are_few_and_the_largest():
    sizes = np.ones(1000)
    sizes[[5, 17]] = 10, np.nan
    np.testing.assert_array_equal(outlying_rows(sizes, 8), [5, 17])
    assert len(outlying_rows(sizes, 1)) == 1
    assert len(outlying_rows(np.ones(1000), 8)) == 0


def test_hidden_keys_are_not_seen():
    head, rows, key = key_of_few_queries()
    prefix_lengths = np.arange(1, 2049)
    causal = Head(head.query, head.key, head.value, head.scale, prefix_lengths)
    found = row_statistics(causal, np.random.default_rng(0))
    seen = SeenKeys.of(causal, found, *causal.attend())
    assert np.all(seen.share[prefix_lengths <= key] <= 1 + 1e-4)
    later = rows[prefix_lengths[rows] > key]
    assert np.all(seen.share[later] > 0.5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_statistics_of_extreme_inputs_are_numbers(scale):
    head = student_entries(256)
    huge = Head(head.query * np.float32(scale), head.key, head.value, head.scale)
    found = row_statistics(huge, np.random.default_rng(0))
    assert not np.isnan(found.variance).any()
    seen = SeenKeys.of(huge, found, *head.attend())
    profiled = profile_errors(found, seen)
    assert not np.isnan(profiled.squares).any()


def test_configured_methods_share_one_chance_of_failure():
    shared = SharedSampling()
    head, _, _ = key_of_few_queries()
    rng = np.random.default_rng(0)
    spent = []
    for rank in (20, 60):
        configured = Polynomial(rank=rank, basis="hermite").configure(
            head, 1.0, "sampled", rng
        )
        found = repaired(head, configured, 1.0, shared, rng)
        drawn = certify_rows(
            head,
            found.value,
            1.0,
            rng,
            exact_rows=found.exact_rows,
            error_profile=found.squares,
            budget=shared.budget,
        )
        spent.append(float(drawn.source.split("confidence ")[1].split("%")[0]))
    assert spent == [98.3, 98.9]


def test_exact_answers_that_cancel_are_within_their_certificate():
    # values that cancel leave answers so small that rounding shows
    query, key, value, rng = plain(2048, 32, 0)
    query *= 0.3
    value[1::2], key[1::2] = -value[::2], key[::2]
    key += 0.02 * rng.standard_normal(key.shape)
    query[rng.choice(2048, 10, replace=False)] *= 25
    head = head_of(query, key, value)
    truth = truth_of(head)

    def trial(rng):
        answer = approximate(
            head.query, head.key, head.value, tol=1e-2, method=Exact(), rng=rng
        )
        return relative(answer.value, truth) <= answer.certificate.error

    assert_fails_rarely(trial, failure=FAILURE, trials=40, false_alarm=1e-3)


def test_auto_gives_the_failure_of_all_samplings():
    head = student_entries(4096)
    answer = approximate(
        head.query, head.key, head.value, tol=0.1, method=Auto(), rng=0
    )
    assert answer.certificate.failure in (0.0, FAILURE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("share", [1e-3, 0.9])
def test_statistics_of_numbers_at_the_end_of_the_range_are_made(dtype, part, share):
    rng = np.random.default_rng(0)
    arrays = dict(
        zip(
            ("query", "key", "value"),
            rng.uniform(-1, 1, (3, 300, 4)).astype(dtype),
            strict=True,
        )
    )
    arrays[part] *= dtype(share) * np.finfo(dtype).max
    head = Head(**arrays, scale=0.5)
    found = row_statistics(head, rng)
    assert not np.isnan(found.variance).any()
    value, normalizer = np.zeros((300, 4), dtype), np.zeros(300, dtype)
    profiled = profile_errors(found, SeenKeys.of(head, found, value, normalizer))
    assert not np.isnan(profiled.squares).any()
    assert len(profiled.outlier_rows) <= 300
