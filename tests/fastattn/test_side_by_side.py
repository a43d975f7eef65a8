"""Many heads at once: the bits of one after the other, on any number of threads."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from fastattn import (
    Exact,
    Multipole,
    Polynomial,
    RefusalError,
    approximate,
    attention,
    explain,
)
from fastattn.costs.policy import POLICY


def heads(count=5, n=900, d=8, dtype=np.float32):
    rng = np.random.default_rng(3)
    query, key, value = rng.standard_normal((3, count, n, d)).astype(dtype)
    # flat ones and less flat ones
    return query * np.linspace(0.2, 1, count, dtype=dtype)[:, None, None], key, value


METHODS = [
    None,
    Exact(),
    Polynomial(degree=4),
    Polynomial(rank=40, landmarks=30),
    Multipole(threshold=1e-3),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_answers_are_those_of_the_heads_alone(monkeypatch, method, dtype):
    monkeypatch.setitem(vars(POLICY.auto), "few_logits", 0)
    inputs = heads(dtype=dtype)
    # calls spawn their streams from it as one call for all heads does
    rng = np.random.default_rng(7)
    alone = [
        approximate(*(x[i] for x in inputs), tol=99.0, method=method, rng=rng)
        for i in range(len(inputs[0]))
    ]
    for threads in (1, 2, 4):
        with threadpool_limits(threads, user_api="blas"):
            found = approximate(*inputs, tol=99.0, method=method, rng=7)
        for i, one in enumerate(alone):
            np.testing.assert_array_equal(found.value[i], one.value)
            np.testing.assert_array_equal(found.log_normalizer[i], one.log_normalizer)
            assert found.certificate.error[i] == one.certificate.error
            assert found.plan[i].method == one.plan.method


def test_masked_and_causal_heads_keep_their_places():
    query, key, value = heads(count=4, n=70)
    mask = np.random.default_rng(0).random((4, 70)) < np.array([[0.9], [0.5], [0], [1]])
    mask[:2, 0] = True
    found = attention(query, key, value, key_mask=mask, is_causal=True, rng=0)
    for i in range(4):
        one = attention(
            query[i], key[i], value[i], key_mask=mask[i], is_causal=True, rng=0
        )
        np.testing.assert_array_equal(found[i], one)
    assert not found[2].any()


def test_the_first_refusal_is_raised():
    query, key, value = heads(count=4)
    query[2:] *= 100
    with pytest.raises(RefusalError) as side_by_side:
        attention(query, key, value, method=Polynomial(), guarantee="proven", rng=0)
    with threadpool_limits(1, user_api="blas"), pytest.raises(RefusalError) as alone:
        attention(query, key, value, method=Polynomial(), guarantee="proven", rng=0)
    assert str(side_by_side.value) == str(alone.value)


class _Counting:
    """A method that counts the heads that are in flight."""

    def __init__(self):
        self.lock, self.now, self.most, self.threads = threading.Lock(), 0, 0, set()

    def solve(self, head, tol, guarantee, rng):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(threading.get_ident())
        answer = Exact().solve(head, tol, guarantee, rng)
        with self.lock:
            self.now -= 1
        return answer


@pytest.mark.parametrize("threads", [1, 3])
def test_few_heads_are_in_flight(threads):
    method = _Counting()
    with threadpool_limits(threads, user_api="blas"):
        attention(*heads(count=9, n=64), method=method)
    assert method.most <= threads


def test_heads_of_other_libraries_run_one_after_the_other():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    method = _Counting()
    arrays = [torch.from_numpy(x) for x in heads(count=3, n=64)]
    with threadpool_limits(2, user_api="blas"):
        attention(*arrays, method=method)
    assert method.threads == {threading.get_ident()}


def test_explanations_come_in_order():
    query, key, value = heads(count=5, n=64)
    found = explain(query, key, value, method=Polynomial(degree=1), rng=0)
    for i in range(5):
        one = explain(
            query[i], key[i], value[i], method=Polynomial(degree=1), rng=0
        ).heads[0]
        assert found.heads[i][0].plan.method == one[0].plan.method
