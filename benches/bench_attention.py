"""pytest-benchmark cases of exact and polynomial attention against torch.

Every answer is checked before it is timed, and its error is stored with the time.
"""

from functools import partial

import numpy as np
import pytest

import fastattn
from benches.cases import CASES, packaged_heads
from benches.measure import exact_rows, sdpa, torch_or_none


def _check(query, key, value, answer, scale):
    """Gate: the error of sampled rows, relative, before anything is timed."""
    rows = np.random.default_rng(1).choice(len(query), min(len(query), 128), False)
    truth = exact_rows(query, key, value, rows, scale=scale)
    return float(np.linalg.norm(answer[rows] - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.benchmark(group="exact")
def bench_exact(benchmark, d):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((4096, d)).astype(np.float32) for _ in range(3)
    )
    call = partial(
        fastattn.attention, query, key, value, method=fastattn.Exact(), rng=0
    )
    error = _check(query, key, value, call(), d**-0.5)
    assert error < 1e-5
    benchmark.extra_info.update(n=4096, d=d, error=error)
    benchmark(call)


@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.benchmark(group="exact")
@pytest.mark.skipif(torch_or_none() is None, reason="torch is not installed")
def bench_torch(benchmark, d):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((4096, d)).astype(np.float32) for _ in range(3)]
    call = sdpa(*arrays, scale=d**-0.5)
    error = _check(*arrays, call()[0, 0].numpy(), d**-0.5)
    assert error < 1e-5
    benchmark.extra_info.update(n=4096, d=d, error=error)
    benchmark(call)


@pytest.mark.parametrize("name", ["bounded", "unit", "worst"])
@pytest.mark.benchmark(group="polynomial")
def bench_polynomial(benchmark, name):
    case, n = CASES[name], 16384
    query, key, value = case.inputs(n, np.random.default_rng(0))
    call = partial(
        fastattn.approximate, query, key, value,
        scale=case.scale, tol=case.tol, rng=0, **case.options,
    )  # fmt: skip
    answer = call()
    assert isinstance(answer.plan.method, fastattn.Polynomial)
    error = _check(query, key, value, answer.value, case.scale)
    if not case.options:
        assert error <= answer.certificate.error
    benchmark.extra_info.update(
        n=n,
        error=error,
        certified=answer.certificate.error,
        method=str(answer.plan.method),
    )
    benchmark(call)


@pytest.mark.parametrize("tol", [1e-1, 1e-2])
@pytest.mark.benchmark(group="real heads")
def bench_real_heads(benchmark, tol):
    heads = [head for head in packaged_heads() if len(head[1]) >= 2048]

    def call():
        return [
            fastattn.approximate(q, k, v, scale=scale, tol=tol, rng=0)
            for _, q, k, v, scale in heads
        ]

    errors = [
        _check(q, k, v, answer.value, scale)
        for (_, q, k, v, scale), answer in zip(heads, call(), strict=True)
    ]
    assert max(errors) <= tol
    benchmark.extra_info.update(errors=errors)
    benchmark(call)
