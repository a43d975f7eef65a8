"""Tensors whose gradients are tracked are refused; without tracking they are served."""

import numpy as np
import pytest

import fastattn
from fastattn import (
    EluPlusOne,
    Exact,
    LinearState,
    approximate,
    attention,
    attention_vjp,
    linear_attention,
    linear_attention_vjp,
    loss_gradient,
    prepare,
    tensor_attention,
)

torch = pytest.importorskip("torch", reason="torch is not installed")

CALLS = {
    "attention": lambda x: attention(x, x, x, rng=0),
    "approximate": lambda x: approximate(x, x, x, rng=0).value,
    "explain": lambda x: fastattn.explain(x, x, x).heads[0][0].plan,
    "only the value": lambda x: attention(x.detach(), x.detach(), x, method=Exact()),
    "tensor_attention": lambda x: tensor_attention(x, (x, x), (x, x), rng=0),
    "prepare": lambda x: prepare(x, x, queries=x, rng=0).count,
    "query": lambda x: PREPARED().query(x).value,
    "insert": lambda x: PREPARED().insert(x, x).count,
    "attention_vjp": lambda x: attention_vjp(x, x, x, x, rng=0)[0],
    "grad_output": lambda x: attention_vjp(*3 * [x.detach()], x, rng=0)[0],
    "loss_gradient": lambda x: loss_gradient(x, x, x, x[:8], x[:8], x, rng=0),
    "linear": lambda x: linear_attention(x, x, x, feature_map=EluPlusOne()),
    "linear_vjp": lambda x: linear_attention_vjp(x, x, x, x, feature_map=EluPlusOne())[
        0
    ],
    "state": lambda x: LinearState(EluPlusOne()).insert(x, x).query(x),
}


def PREPARED():
    x = tensor().detach()
    return prepare(x, x, queries=x, rng=0)


def tensor():
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    return torch.tensor(x, requires_grad=True)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_tracked_gradients_are_refused_with_what_to_use(call):
    with pytest.raises(TypeError, match=r"requires gradients.*attention_vjp.*no_grad"):
        call(tensor())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_tracking_the_answer_is_that_of_the_numbers(call, mode):
    with getattr(torch, mode)():
        got = call(tensor())
    want = call(tensor().detach())
    if isinstance(want, torch.Tensor):
        assert not got.requires_grad
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    else:
        assert type(got) is type(want)


def test_the_error_comes_from_heads_in_threads_too():
    x = torch.randn((4, 64, 8), requires_grad=True)
    with torch.no_grad():
        assert attention(x, x, x).shape == x.shape
    with pytest.raises(TypeError, match="attention_vjp"):
        attention(x, x, x)
