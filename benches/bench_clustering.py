"""A pytest-benchmark case of k-means in a metric, against whitening and KMeans."""

import numpy as np
import pytest

from sketching import MahalanobisKMeans, MahalanobisMetric

_K, _RIDGE = 10, 1e-3


@pytest.mark.parametrize("which", ["ours", "scikit-learn"])
@pytest.mark.benchmark(group="clustering")
def bench_kmeans(benchmark, which):
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    x = (load_digits().data / 16).astype(np.float32)
    metric = MahalanobisMetric.from_data(x, ridge=_RIDGE)
    start = x[np.random.default_rng(0).choice(len(x), _K, replace=False)]
    options = {"n_clusters": _K, "max_iter": 20, "tol": 0}
    if which == "ours":
        model = MahalanobisKMeans(metric=metric, init=start, **options)
        points = x
    else:
        model = KMeans(init=metric.whiten(start), n_init=1, **options)
        points = metric.whiten(x)
    white = metric.whiten(x.astype(np.float64))
    labels = model.fit(points).labels_
    # the inertia of the labels themselves, from the definition
    inertia = sum(
        float(((some - some.mean(axis=0)) ** 2).sum())
        for some in (white[labels == label] for label in range(_K))
    )
    error = model.inertia_ / inertia - 1
    assert abs(error) < 1e-2
    benchmark.extra_info.update(n=len(x), inertia=inertia, error=error)
    benchmark(lambda: model.fit(points))
