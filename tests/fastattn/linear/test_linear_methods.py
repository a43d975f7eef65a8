"""Feature maps as methods of softmax attention: certificates and refusals."""

import numpy as np
import pytest

import fastattn
from fastattn import (
    EluPlusOne,
    RandomFeatures,
    RandomMaclaurin,
    RefusalError,
    Taylor,
)
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.fastattn.linear.test_linear import problem

APPROXIMATE = [
    (Taylor(), 0.15),
    (RandomFeatures(2048), 0.2),
    (RandomFeatures(2048, "hyperbolic"), 0.2),
    (RandomFeatures(2048, "trigonometric"), 0.2),
    (RandomMaclaurin(8192), 0.5),
]


@pytest.mark.parametrize(("method", "tol"), APPROXIMATE, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_methods_keep_their_certificates(method, tol, is_causal):
    inputs = problem(n=300, m=300, seed=1)
    options = {"method": method, "is_causal": is_causal}
    answer = fastattn.approximate(*inputs, tol=tol, rng=0, **options)
    truth, log = oracles.attention(*inputs, is_causal=is_causal)
    assert oracles.frobenius_error(answer.value, truth) <= answer.certificate.error
    assert answer.certificate.error <= tol
    assert answer.plan.method == method
    np.testing.assert_allclose(answer.log_normalizer, log, rtol=0, atol=1.5 * tol)


def test_certificates_of_random_features_fail_rarely():
    inputs = problem(n=600, m=200, seed=2)
    truth, _ = oracles.attention(*inputs)

    def trial(rng):
        method = RandomFeatures(256, rng=rng)
        answer = fastattn.approximate(*inputs, tol=1.0, method=method, rng=rng)
        error = oracles.frobenius_error(answer.value, truth)
        return error <= answer.certificate.error

    assert_fails_rarely(trial, failure=0.05, trials=60)


@pytest.mark.parametrize("method", [Taylor(), RandomFeatures(64), RandomMaclaurin(64)])
def test_sharp_rows_are_refused(method):
    query, key, value = problem(n=300, m=300)
    with pytest.raises(RefusalError):
        fastattn.attention(9 * query, 9 * key, value, method=method, tol=1e-2, rng=0)


@pytest.mark.parametrize("method", [Taylor(), RandomFeatures(64), RandomMaclaurin(64)])
def test_nothing_is_proven(method):
    inputs = problem()
    with pytest.raises(RefusalError, match="has no proven bound"):
        fastattn.attention(*inputs, method=method, guarantee="proven")
    plan = fastattn.explain(*inputs, method=method, guarantee="proven").heads[0][0]
    assert not plan.accepted
    assert fastattn.explain(*inputs, method=method).heads[0][0].accepted


def test_maps_that_replace_softmax_are_no_methods():
    with pytest.raises(TypeError, match="method: expected a method object"):
        fastattn.attention(*problem(), method=EluPlusOne())
