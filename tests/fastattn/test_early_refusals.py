"""What cannot be served is refused before arrays are read; a refusal names the head."""

import dataclasses

import numpy as np
import pytest

import fastattn
from fastattn import (
    Exact,
    Multipole,
    Polynomial,
    Quantized,
    RefusalError,
    approximate,
    attention,
    explain,
)
from fastattn.problem.batch import Batch
from fastattn.problem.head import Head
from fastattn.tensor import problem as tensor_problem


def inputs(n=6, m=7, d=4, p=3):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s) for s in ((n, d), (m, d), (m, p))]


def prepared(query, key, value, **options):
    return fastattn.prepare(key, value, queries=query, **options)


def gradients(query, key, value, **options):
    grad = np.ones((*query.shape[:-1], value.shape[-1]))
    return fastattn.attention_vjp(query, key, value, grad, rng=0, **options)


def tensor(query, key, value, **options):
    return approximate(query, (key, key), (value, value), rng=0, **options)


def tensor_explained(query, key, value, **options):
    return explain(query, (key, key), (value, value), rng=0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "taylor", "landmarks": 8}, "landmarks=8, got 'taylor'"),
        ({"basis": "minimax", "landmarks": 8}, "landmarks=8, got 'minimax'"),
        ({"degree": 0, "rank": 2}, "rank: expected 1 with degree=0, got 2"),
        ({"degree": 2, "rank": 9, "basis": "hermite"}, "degree=2 and rank=9"),
        ({"degree": 2, "rank": 9, "landmarks": 3}, "degree=2 and rank=9"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_make_no_method(options, message):
    with pytest.raises(ValueError, match=message):
        Polynomial(**options)


def test_the_default_basis_of_landmarks_is_shown():
    method = Polynomial(landmarks=8)
    assert method == Polynomial(landmarks=8, basis="hermite")
    assert method == dataclasses.replace(Polynomial(), landmarks=8)
    assert repr(Polynomial().basis) == "'minimax'"


def test_windows_are_at_least_one():
    with pytest.raises(ValueError, match="sizes: expected at least one window"):
        fastattn.TensorWindow(())


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_plan_says_if_more_clusters_than_keys_are_asked_for(is_causal):
    options = {"method": Multipole(clusters=10**6), "is_causal": is_causal, "tol": 0.5}
    answer, found = (f(*inputs(), **options) for f in (approximate, explain))
    message = "requested; clusters=1000000 is more than one for each of 7 keys"
    message = message.replace("7", "6") if is_causal else message
    assert message in answer.plan.reason
    assert message in str(found)
    assert answer.plan.method.clusters <= 7


@pytest.fixture
def unread(monkeypatch):
    """Fail where arrays are read."""

    def read(*_, **__):
        raise AssertionError("arrays were read")

    for batch in (Batch, tensor_problem.TensorBatch):
        monkeypatch.setattr(batch, "of", read)


@pytest.mark.parametrize(
    ("call", "method", "error", "message"),
    [
        (approximate, Multipole(), TypeError, "is no method for tensor attention"),
        (explain, Quantized(), TypeError, "is no method for tensor attention"),
        (prepared, Multipole(), TypeError, "cannot be prepared for tensor attention"),
    ],
)
@pytest.mark.usefixtures("unread")
def test_methods_without_tuples_are_refused_before_arrays_are_read(
    call, method, error, message
):
    query, key, value = inputs()
    with pytest.raises(error, match=message):
        call(query, (key, key), (value, value), method=method)


@pytest.mark.parametrize(
    ("call", "method", "error", "message"),
    [
        (approximate, fastattn.PathAttention(), TypeError, "expected tuples of keys"),
        (explain, fastattn.PathAttention(), TypeError, "expected tuples of keys"),
        (prepared, Quantized(), TypeError, "cannot be prepared"),
        (gradients, Quantized(), RefusalError, "has no derivative"),
        (gradients, Polynomial(degree=2), RefusalError, "has no derivative"),
    ],
)
@pytest.mark.usefixtures("unread")
def test_methods_that_do_not_serve_are_refused_before_arrays_are_read(
    call, method, error, message
):
    with pytest.raises(error, match=message):
        call(*inputs(), method=method)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (attention, {"method": Polynomial(), "guarantee": "proven"}),
        (approximate, {"method": Polynomial(), "guarantee": "proven"}),
        (gradients, {"method": Polynomial(basis="hermite"), "tol": 1e-12}),
        (prepared, {"method": Polynomial(), "guarantee": "proven"}),
        (tensor, {"method": Polynomial(), "guarantee": "proven"}),
        (tensor_explained, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_refusal_names_the_head(call, options):
    query, key, value = (np.stack([[x] * 3] * 2) for x in inputs())
    query[1, 2] *= 1e9
    if call is tensor_explained:
        query[1, 2] *= 1e290
        key[1, 2] *= 1e290
    if call is not gradients:
        query[0] *= 1e-3
    with pytest.raises(RefusalError, match=r"^head [01],[012]: ") as refusal:
        call(query, key, value, **options)
    named = "1,2" if call is not gradients else "0,0"
    assert str(refusal.value).startswith(f"head {named}: ")
    # a single head has no name
    with pytest.raises(RefusalError, match=r"^(?!head)"):
        call(query[1, 2], key[1, 2], value[1, 2], **options)


@pytest.mark.parametrize("size", [1, 1e200])
def test_hopeless_tolerances_are_refused_before_logits_are_computed(monkeypatch, size):
    def attend(*_, **__):
        raise AssertionError("logits were computed")

    query, key, value = inputs()
    monkeypatch.setattr(Head, "attend", attend)
    with pytest.raises(RefusalError, match=r"tol=1e-17 (is below|cannot be met)"):
        approximate(size * query, size * key, value, tol=1e-17, method=Exact())
    monkeypatch.setattr(tensor_problem.TensorHead, "attend", attend)
    with pytest.raises(RefusalError, match="tol=1e-17 is below what float64 holds"):
        approximate(query, (key, key), (value, value), tol=1e-17, method=Exact())
