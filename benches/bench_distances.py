"""pytest-benchmark cases of Mahalanobis distances: queries, neighbours, updates."""

import numpy as np
import pytest

from sketching import Adaptive, Exact, Filter, MahalanobisIndex, MahalanobisMetric

_N, _D = 4000, 128
_MODES = {
    "exact": Exact(),
    "filter": Filter(),
    "adaptive": Adaptive(rows=64, sketches=32, sampled=9),
}


def _inputs():
    """Points, queries, a metric of condition 10, and true distances."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((_D, _D)))[0] for _ in range(2))
    metric = MahalanobisMetric(left * np.geomspace(1, 0.1, _D) @ right)
    x, queries = (rng.standard_normal((m, _D)) for m in (_N, 4))
    steps = [(x - row) @ metric.factor.T for row in queries]
    return metric, x, queries, np.stack([np.linalg.norm(z, axis=1) for z in steps])


def _index(metric, x, mode):
    index = MahalanobisIndex(metric, mode=mode, eps=0.3, rng=0)
    index.insert(x)
    return index


@pytest.mark.parametrize("name", list(_MODES))
@pytest.mark.benchmark(group="distances")
def bench_query(benchmark, name):
    metric, x, queries, truth = _inputs()
    index = _index(metric, x, _MODES[name])
    answer = index.query(queries)
    error = float(np.abs(answer.value / truth - 1).max())
    assert error <= answer.certificate.error + 1e-9
    benchmark.extra_info.update(n=_N, d=_D, error=error)
    benchmark(lambda: index.query(queries))


@pytest.mark.parametrize("name", ["exact", "filter"])
@pytest.mark.benchmark(group="distances")
def bench_neighbors(benchmark, name):
    metric, x, queries, truth = _inputs()
    index = _index(metric, x, _MODES[name])
    wanted = np.sort(truth, axis=1)[:, :10]
    found = index.kneighbors(queries, 10)
    error = float(np.abs(np.take_along_axis(truth, found[1], 1) / wanted - 1).max())
    assert error < 1e-9
    benchmark.extra_info.update(n=_N, d=_D, error=error)
    benchmark(lambda: index.kneighbors(queries, 10))


@pytest.mark.benchmark(group="distances")
def bench_update_metric(benchmark):
    metric, x, queries, _ = _inputs()
    index = _index(metric, x, Exact())
    left, right = 1e-3 * np.random.default_rng(1).standard_normal((2, _D))
    changed = metric.factor + np.outer(left, right)

    def call():
        index.update_metric(left, right)
        return index.query(queries[:1])

    truth = np.linalg.norm((x - queries[0]) @ changed.T, axis=1)
    error = float(np.abs(call().value[0] / truth - 1).max())
    assert error < 1e-9
    benchmark.extra_info.update(n=_N, d=_D, error=error)
    benchmark(call)
