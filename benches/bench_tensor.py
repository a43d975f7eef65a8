"""pytest-benchmark cases of tensor attention: exact, and by a proven polynomial."""

from functools import partial

import numpy as np
import pytest

from benches.tensor import inputs, proven
from fastattn import Exact, Polynomial


@pytest.mark.parametrize(
    ("method", "n"), [(Exact(), 128), (Polynomial(), 128), (Polynomial(), 4096)]
)
@pytest.mark.benchmark(group="tensor")
def bench_tensor(benchmark, method, n):
    arrays = inputs(n, 8, np.random.default_rng(0))
    call = partial(proven, arrays, 1e-3, method)
    answer = call()
    error = None
    if n <= 128:
        truth = _definition(*arrays)
        error = float(np.abs(answer.value - truth).max())
        assert error <= answer.certificate.error
    benchmark.extra_info.update(n=n, error=error, certified=answer.certificate.error)
    benchmark(call)


def _definition(query, keys, values):
    """Attention over all pairs of keys, in float64."""
    query, *rest = (x.astype(np.float64) for x in (query, *keys, *values))
    first, second, left, right = rest
    logits = np.einsum("ia,ja,ka->ijk", query, first, second) / query.shape[1]
    weights = np.exp(logits)
    sums = np.einsum("ijk,jp,kp->ip", weights, left, right, optimize=True)
    return sums / weights.sum(axis=(1, 2))[:, None]
