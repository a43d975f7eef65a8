"""Certificates whose rows are drawn by the error profile of a low rank."""

import numpy as np
import pytest

from fastattn import Polynomial, load_sample
from fastattn.certificates.certify import repaired
from fastattn.certificates.sampled import ROWS, SharedSampling, certify_rows
from fastattn.problem.batch import Batch
from tests import oracles
from tests.chance import assert_fails_rarely

METHODS = [
    Polynomial(rank=60, basis="hermite"),
    Polynomial(rank=1, landmarks=96, basis="hermite"),
    Polynomial(degree=2, basis="taylor"),
]


def certified(inputs, method):
    """True error of one answer, and a certificate of it for each source."""
    truth, _ = oracles.attention(*inputs)
    (head,) = Batch.of(*inputs, None, False, None).heads()
    rng = np.random.default_rng(0)
    configured = method.configure(head, 1e9, "sampled", rng)
    found = repaired(head, configured, 1e9, SharedSampling(), rng)

    def draw(rng, error_profile=found.squares, tol=1e-9):
        return certify_rows(
            head,
            found.value,
            tol,
            rng,
            exact_rows=found.exact_rows,
            error_profile=error_profile,
            first=ROWS,
        )

    return oracles.frobenius_error(found.value, truth), draw


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("second", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("head", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_certificate_by_an_error_profile_holds_at_its_rate(head, second, method):
    inputs = [x[head, :2048] for x in load_sample("minilm-diffuse")]
    error, draw = certified(inputs, method)
    # where the estimate meets the tolerance and the margin does not, more are drawn
    tol = 1.05 * error if second else 1e-9

    def trial(rng):
        return error <= draw(rng, tol=tol).upper

    assert_fails_rarely(trial, failure=0.05, trials=200, false_alarm=1e-6)


def test_error_profile_tightens_the_certificate_of_a_few_coordinates():
    rng = np.random.default_rng(0)
    query, key = 0.8 * rng.standard_normal((2, 2048, 8))
    inputs = query, key, rng.standard_normal((2048, 8))
    error, draw = certified(inputs, Polynomial(rank=165, basis="hermite"))
    plain, profiled = (
        [draw(np.random.default_rng(i), **options).upper for i in range(60)]
        for options in ({"error_profile": None}, {})
    )
    assert np.mean(profiled) < np.mean(plain)
    assert np.std(profiled) < 0.7 * np.std(plain)
    assert error < np.mean(profiled) < 1.4 * error
