"""pytest-benchmark cases of linear attention, whole and causal."""

from functools import partial

import numpy as np
import pytest

import fastattn
from benches.cases import gaussian

_FEATURES = {
    "elu+1": (fastattn.EluPlusOne(), lambda x: np.where(x > 0, x + 1, np.exp(x))),
    "relu": (fastattn.Relu(), lambda x: np.maximum(x, 0)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", list(_FEATURES))
@pytest.mark.benchmark(group="linear")
def bench_linear(benchmark, name, is_causal):
    n, (feature_map, features) = 4096, _FEATURES[name]
    query, key, value = gaussian(n, np.random.default_rng(0))
    call = partial(
        fastattn.linear_attention, query, key, value,
        feature_map=feature_map, is_causal=is_causal,
    )  # fmt: skip
    rows = np.arange(0, n, 64)
    left, right = (features(x.astype(np.float64)) for x in (query[rows], key))
    weights = left @ right.T
    if is_causal:
        weights[np.arange(n) > rows[:, None]] = 0
    total = weights.sum(axis=1, keepdims=True)
    some = total[:, 0] > 0
    truth = (weights @ value)[some] / total[some]
    error = np.linalg.norm(call()[rows][some] - truth) / np.linalg.norm(truth)
    assert error < 1e-4
    benchmark.extra_info.update(n=n, error=float(error))
    benchmark(call)
