"""Bounds that meet a tolerance before any row is computed exactly certify alone."""

import math

import pytest

from fastattn import Exact, Polynomial, approximate
from fastattn.certificates.apriori import apriori_certificate, relative_of_max
from fastattn.certificates.sampled import scaled_frobenius
from fastattn.tensor.problem import TensorHead
from tests import oracles


def test_bound_on_every_entry_is_one_relative_to_the_truth(rng):
    truth = rng.standard_normal((30, 4))
    answer = truth + rng.uniform(-0.05, 0.05, truth.shape)
    certificate = apriori_certificate(
        0.05, scaled_frobenius(answer), answer.size, 0.1, "theorem"
    )
    error = oracles.frobenius_error(answer, truth)
    assert error <= certificate.error < 3 * error
    assert (certificate.failure, certificate.norm) == (0.0, "relative-frobenius")
    assert certificate.source.startswith("theorem")


def test_bound_that_misses_the_tolerance_certifies_nothing(rng):
    size = scaled_frobenius(rng.standard_normal((30, 4)))
    assert apriori_certificate(0.05, size, 120, 0.01, "theorem") is None
    assert apriori_certificate(math.nan, size, 120, 0.01, "theorem") is None


@pytest.mark.parametrize(
    ("bound", "size", "error"),
    [
        (0.0, (0.0, 0.0), 0.0),
        (1e-300, (0.0, 0.0), math.inf),
        (0.1, (math.inf, 0.0), math.inf),
        # all of it may be error
        (1.0, (1.0, 2.0), math.inf),
        (math.inf, (1.0, 2.0), math.inf),
    ],
)
def test_answers_that_may_be_all_error(bound, size, error):
    assert relative_of_max(bound, size, 4) == error


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", [None, Polynomial()])
def test_sampled_tensor_attention_computes_no_row_where_all_is_proven(
    rng, monkeypatch, method, is_causal
):
    query, *keys = rng.uniform(-1, 1, (3, 300, 4))
    values = tuple(rng.uniform(-1, 1, (2, 300, 3)))
    options = {"tol": 1e-2, "is_causal": is_causal, "rng": 0}
    inputs = query, tuple(keys), values
    truth = approximate(*inputs, method=Exact(), **options).value

    def never(*_):
        raise AssertionError("a row was computed exactly")

    monkeypatch.setattr(TensorHead, "attend", never)
    answer = approximate(*inputs, method=method, **options)
    error = oracles.frobenius_error(answer.value, truth)
    assert error <= answer.certificate.error <= 1e-2
    assert answer.certificate.failure == 0
    assert answer.certificate.norm == "relative-frobenius"
    assert "a bound on every entry" in answer.certificate.source
    assert answer.plan.method.rank < 2000


def test_sampled_tensor_polynomials_take_arrays_of_any_library(rng, xp):
    arrays = (rng.uniform(-0.3, 0.3, (n, 4)) for n in (60, 40, 50, 40, 50))
    query, key, other, value, weight = (xp.asarray(x) for x in arrays)
    answer = approximate(
        query, (key, other), (value, weight), method=Polynomial(), tol=0.1, rng=0
    )
    assert answer.certificate.failure == 0
    assert 0 < answer.certificate.error <= 0.1
    assert isinstance(answer.value, xp.array_type)
