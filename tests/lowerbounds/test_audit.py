"""Methods as deciders: never wrong inside a certificate, wrong without one."""

import functools

import numpy as np
import pytest

import fastattn
from fastattn import Approximation, Certificate, RefusalError
from lowerbounds import (
    at_allowed_error,
    audit_methods,
    from_cnf,
    gap_inner_product,
    least_dimension,
    orthogonal_vectors,
    random_formula,
    reduce_to_attention,
)

PROVEN = {
    "Auto": at_allowed_error(),
    "Exact": at_allowed_error(fastattn.Exact()),
    "Polynomial": at_allowed_error(fastattn.Polynomial()),
    "Multipole": at_allowed_error(fastattn.Multipole()),
}


def linear(feature_map):
    def decider(made):
        return fastattn.linear_attention(
            *made.arguments, scale=made.scale, feature_map=feature_map
        )

    return decider


BASELINES = {
    "EluPlusOne": linear(fastattn.EluPlusOne()),
    "Relu": linear(fastattn.Relu()),
    "mean of the values": lambda made: np.full((len(made.query), 1), 0.5),
}


def pairs(count, *, n=16, d=None, parts=2):
    """Random instances, every other one with a planted solution."""
    d = d or least_dimension(n, parts=parts, expected=1e-3)
    return [
        orthogonal_vectors(n, d, parts=parts, planted=seed % 2 == 0, rng=seed)
        for seed in range(count)
    ]


FAMILIES = {
    "planted": functools.partial(pairs, 20),
    # so few and short vectors that their logits are small
    "tiny": functools.partial(pairs, 20, n=3, d=2),
    "gap": lambda: [
        gap_inner_product(12, 96, planted=seed % 2 == 0, correlation=0.9, rng=seed)
        for seed in range(10)
    ],
    "satisfiability": lambda: [
        from_cnf(random_formula(8, rng=seed)) for seed in range(10)
    ],
}


@pytest.mark.parametrize("construction", ["calibrated", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_proven_method_is_wrong(family, construction):
    rows = audit_methods(
        PROVEN, {family: FAMILIES[family]()}, construction=construction
    )
    for row in rows:
        assert (row.wrong, row.broken, row.certified_wrong) == (0, 0, 0)
        assert row.right + row.refused == row.instances
        assert row.certified == row.right
    by_method = {row.method: row for row in rows}
    if construction == "calibrated":
        assert by_method["Exact"].refused == by_method["Auto"].refused == 0
        if family == "tiny":
            assert by_method["Polynomial"].right > 0
        else:
            assert by_method["Polynomial"].refused == by_method["Polynomial"].instances


def test_no_proven_method_is_wrong_on_tensors():
    methods = {name: PROVEN[name] for name in ("Auto", "Exact", "Polynomial")}
    families = {
        "planted": pairs(10, n=8, parts=3),
        "tiny": pairs(10, n=2, d=2, parts=3),
    }
    for construction in ("calibrated", "direct"):
        for row in audit_methods(methods, families, construction=construction):
            assert (row.wrong, row.broken, row.certified_wrong) == (0, 0, 0)
            assert row.certified == row.right
            assert row.method == "Polynomial" or row.refused == 0


def test_baselines_without_a_certificate_fail():
    rows = audit_methods(BASELINES, {"planted": pairs(40)})
    for row in rows:
        assert (row.certified, row.refused) == (0, 0)
        # no better than a constant answer
        assert 0.4 <= row.accuracy <= 0.6


def test_a_sampled_answer_is_not_counted_as_certified():
    methods = {
        "Auto": at_allowed_error(guarantee="sampled", tol=0.1),
        "Polynomial": at_allowed_error(
            fastattn.Polynomial(degree=1), guarantee="sampled", tol=1.0
        ),
    }
    auto, polynomial = audit_methods(methods, {"planted": pairs(20)})
    assert (auto.right, auto.certified) == (20, 0)
    # rows sampled afterwards show the error
    assert (polynomial.certified, polynomial.broken) == (0, 0)
    assert polynomial.refused > 0


def certified(shift, error):
    """A method that is off by a shift and certifies an error."""

    def decider(made):
        output = np.exp(made.log_output())[:, None] + shift
        return Approximation(
            output, Certificate(error, 0.0, "max", "said so"), "", None
        )

    return decider


def test_a_certificate_that_lies_is_found():
    methods = {"liar": certified(-0.9, 0.1), "honest": certified(-0.9, 0.9)}
    liar, honest = audit_methods(methods, {"planted": pairs(2)})
    assert (liar.wrong, liar.broken, liar.certified_wrong) == (1, 2, 1)
    assert (honest.wrong, honest.broken, honest.certified_wrong) == (1, 0, 0)


@pytest.mark.parametrize(("error", "broken"), [(0.9, 2), (1.1, 0)])
def test_a_relative_certificate_is_checked_in_its_own_norm(error, broken):
    def decider(made):
        output = 2 * np.exp(made.log_output())[:, None]
        certificate = Certificate(error, 0.0, "relative-frobenius", "said so")
        return Approximation(output, certificate, "", None)

    (row,) = audit_methods({"twice": decider}, {"planted": pairs(2)})
    assert (row.broken, row.certified) == (broken, 0)


def test_refusals_are_counted_and_other_errors_are_not_hidden():
    def refuses(made):
        raise RefusalError("no")

    def fails(made):
        raise ValueError("a mistake")

    (row,) = audit_methods({"refuses": refuses}, {"planted": pairs(3)})
    assert (row.refused, row.instances) == (3, 3)
    assert np.isnan(row.accuracy)
    with pytest.raises(ValueError, match="a mistake"):
        audit_methods({"fails": fails}, {"planted": pairs(1)})


def test_inputs_made_before_are_taken_as_they_are():
    made = [reduce_to_attention(x, construction="direct") for x in pairs(2)]
    (row,) = audit_methods({"Exact": PROVEN["Exact"]}, {"direct": made})
    assert (row.right, row.certified) == (2, 2)


def test_an_allowed_error_that_underflows_is_refused():
    instance = orthogonal_vectors(8, 400, rng=0)
    made = reduce_to_attention(instance, construction="padded")
    with pytest.raises(RefusalError, match="underflows"):
        PROVEN["Exact"](made)
