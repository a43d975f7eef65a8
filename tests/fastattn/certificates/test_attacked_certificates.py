"""Inputs built against certificates: a bound holds or the answer is refused."""

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from fastattn import Exact, Polynomial, RefusalError, approximate
from tests.fastattn.certificates.test_certificates import PROVEN, gaussian, holds


def one_huge(which, factor=50.0):
    inputs = list(gaussian(3, 200, 0.2, d=4))
    inputs[["query", "key", "value"].index(which)][11] *= factor
    return inputs


def along_a_line():
    query, key, value = gaussian(4, 100, 0.3, d=5)
    return query, key[:, :1] * np.array([1, -2, 0.5, 0, 3]), value


def duplicated():
    query, key, value = gaussian(5, 90, 0.4, d=3)
    return query, np.repeat(key[:9], 10, axis=0), value


def constant(which):
    inputs = list(gaussian(6, 50, 0.4, d=3))
    for i in which:
        inputs[i][:] = inputs[i][0]
    return inputs


def with_offset(which, offset):
    inputs = list(gaussian(7, 80, 0.3, d=4))
    inputs[which] += offset
    return inputs


def opposite_signs():
    # queries and keys at the corners, values by the sign of the logit
    corners = np.array(np.meshgrid(*[[-0.6, 0.6]] * 4)).reshape(4, -1).T
    return corners, corners, np.sign(corners @ corners[0])[:, None]


ATTACKS = {
    "one huge query": lambda: one_huge("query"),
    "one huge key": lambda: one_huge("key"),
    "one huge value": lambda: one_huge("value", 1e6),
    "keys along a line": along_a_line,
    "duplicate keys": duplicated,
    "constant queries": lambda: constant([0]),
    "constant keys": lambda: constant([1]),
    "constant queries and keys": lambda: constant([0, 1]),
    "everything constant": lambda: constant([0, 1, 2]),
    "constant values": lambda: constant([2]),
    "queries far away": lambda: with_offset(0, 30.0),
    "keys far away": lambda: with_offset(1, 1e3),
    "values far away": lambda: with_offset(2, 1e5),
    "corners": opposite_signs,
    "one query": lambda: [gaussian(8, 60, 0.5)[0][:1], *gaussian(8, 60, 0.5)[1:]],
    "one key": lambda: [
        gaussian(8, 60, 0.5)[0],
        *(x[:1] for x in gaussian(9, 60, 1)[1:]),
    ],
    "one feature": lambda: gaussian(10, 60, 0.9, d=1),
    "zeros": lambda: [np.zeros((9, 2)), np.zeros((7, 2)), np.ones((7, 1))],
}
METHODS = [Exact(), Polynomial(), Polynomial(degree=3), Polynomial(5, rank=30), None]


# heads that a polynomial of a given degree, or rank, refuses
TOO_LARGE = {
    ("one huge key", Polynomial(degree=3)),
    ("one huge key", Polynomial(5, rank=30)),
    ("one huge query", Polynomial(5, rank=30)),
}


def check(inputs, is_refused, **options):
    """An answer holds, or a refusal is one that is expected."""
    if is_refused:
        with pytest.raises(RefusalError):
            approximate(*inputs, **options)
    else:
        assert holds(inputs, **options)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("attack", ATTACKS)
def test_proven_bound_survives(attack, method):
    for dtype in (np.float16, np.float32, np.float64):
        limit = np.finfo(dtype).max / 4
        inputs = [np.clip(x, -limit, limit).astype(dtype) for x in ATTACKS[attack]()]
        is_refused = (attack, method) in TOO_LARGE
        check(inputs, is_refused, method=method, tol=5.0, **PROVEN)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("attack", ATTACKS)
def test_sampled_certificate_survives_where_every_row_is_sampled(attack, method):
    inputs = [x[:128] if i == 0 else x for i, x in enumerate(ATTACKS[attack]())]
    # series of logits around thirty
    is_refused = attack == "queries far away" and isinstance(method, Polynomial)
    check(inputs, is_refused, method=method, tol=1e9, rng=0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_proven_bound_holds_for_any_scale(method):
    for scale in (-0.7, 0.0, 1e-6, 3.0):
        is_refused = method == Polynomial(5, rank=30) and abs(scale) > 0.5
        options = {"method": method, "scale": scale, "tol": 5.0, **PROVEN}
        check(gaussian(11, 60, 0.3), is_refused, **options)


def test_constant_values_have_a_finite_certificate():
    query, key, value = gaussian(12, 40, 3.0)
    inputs = query, key * 1e5, np.ones_like(value)
    answer = approximate(*inputs, method=Exact(), **PROVEN)
    assert np.isfinite(answer.certificate.error)
    for method in (Polynomial(degree=1), Polynomial()):
        with pytest.raises(RefusalError):
            approximate(*inputs, method=method, **PROVEN)


@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(1, 4),
    logs=st.tuples(*[st.floats(-12, 12)] * 2, st.floats(-30, 30)),
    offsets=st.tuples(*[st.sampled_from([0.0, 1.0, 1e3])] * 3),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    tol=st.sampled_from([1e-9, 1e-4, 1e-2, 1.0, 100.0]),
    method=st.sampled_from(METHODS),
    guarantee=st.sampled_from(["proven", "sampled"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_input_gets_a_wrong_certificate(
    n, m, d, logs, offsets, dtype, tol, method, guarantee, seed
):
    # few queries: the sample contains all of them, and has no sampling error
    rng = np.random.default_rng(seed)
    limit = np.finfo(dtype).max / 8
    with np.errstate(over="ignore", under="ignore"):
        inputs = [
            np.clip(10.0**log * (rng.standard_normal(shape) + offset), -limit, limit)
            for log, offset, shape in zip(
                logs, offsets, [(n, d), (m, d), (m, 2)], strict=True
            )
        ]
        inputs = [x.astype(dtype) for x in inputs]
    options = {"tol": tol, "method": method, "guarantee": guarantee, "rng": seed}
    try:
        is_true = holds(inputs, **options)
    except RefusalError:
        # does not count: too few answers fail the test
        reject()
    assert is_true
