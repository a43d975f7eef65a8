"""Proven bounds of polynomials, where a tolerance is relative to the answer."""

import math

import numpy as np
import pytest

from fastattn import Polynomial, approximate
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import certify_rows
from fastattn.problem.head import Head
from tests import oracles
from tests.chance import assert_fails_rarely


def bounded(n=1024, d=4, dtype=np.float64, mean=1.0):
    """Entries in [-1, 1], values whose mean does not vanish."""
    rng = np.random.default_rng(0)
    query, key, value = rng.uniform(-1, 1, (3, n, d))
    return [x.astype(dtype) for x in (query, key, value + mean)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("degree", [4, 5])
def test_bound_that_meets_the_tolerance_is_the_certificate(degree, dtype):
    inputs = bounded(dtype=dtype)
    method = Polynomial(degree=degree)
    answer = approximate(*inputs, tol=0.05, method=method, rng=0)
    truth, logarithm = oracles.attention(*inputs)
    assert answer.certificate.failure == 0
    assert answer.certificate.norm == "relative-frobenius"
    assert "computed exactly" not in answer.certificate.source
    error = oracles.frobenius_error(answer.value, truth)
    assert 0 < error <= answer.certificate.error <= 0.05
    off = np.abs(answer.log_normalizer - logarithm)
    assert np.all(off <= answer.log_normalizer_error)


def test_rows_are_sampled_where_the_bound_is_too_large():
    inputs = bounded(mean=0.0)
    answer = approximate(*inputs, tol=0.05, method=Polynomial(degree=4), rng=0)
    truth, _ = oracles.attention(*inputs)
    assert answer.certificate.failure == FAILURE
    assert "computed exactly" in answer.certificate.source
    error = oracles.frobenius_error(answer.value, truth)
    assert error <= answer.certificate.error <= 0.05


def test_finite_sample_bound_is_named_and_holds():
    query, key, value = bounded(2048)
    head = Head(query, key, value, 0.5)
    truth, _ = head.attend()
    rng = np.random.default_rng(1)
    # errors near a bound that is the same for every row
    limit = 0.02
    off = rng.standard_normal(truth.shape)
    off *= (limit * rng.uniform(0.5, 1, 2048) / np.linalg.norm(off, axis=1))[:, None]
    answer = truth + off
    error = oracles.frobenius_error(answer, truth)

    def draw(rng, limit=limit):
        return certify_rows(
            head,
            answer,
            1e-9,
            rng,
            exact_rows=np.zeros(0, int),
            limit=limit,
            expected=error,
        )

    assert "finite-sample" in draw(rng).source
    assert "margin" in draw(rng, math.inf).source
    assert "margin" in draw(rng, 20 * limit).source
    assert draw(rng).upper <= 1.15 * draw(rng, math.inf).upper
    assert_fails_rarely(
        lambda rng: error <= draw(rng).upper,
        failure=FAILURE,
        trials=100,
        false_alarm=1e-6,
    )
