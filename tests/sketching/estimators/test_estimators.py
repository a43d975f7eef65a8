"""scikit-learn wrappers of neighbours: the checks, brute force, pipelines."""

import pickle

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.cluster import DBSCAN
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE, Isomap
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    KNeighborsTransformer,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sketching import (
    Adaptive,
    Exact,
    Filter,
    MahalanobisKMeans,
    MahalanobisKMedians,
    MahalanobisKNeighborsClassifier,
    MahalanobisKNeighborsRegressor,
    MahalanobisKNeighborsTransformer,
    MahalanobisMetric,
    MahalanobisNeighbors,
)

ESTIMATORS = [
    MahalanobisNeighbors(),
    MahalanobisKNeighborsTransformer(),
    MahalanobisKNeighborsTransformer("connectivity", shrinkage="oas"),
    MahalanobisKNeighborsClassifier(),
    MahalanobisKNeighborsClassifier(weights="distance", ridge=1e-3),
    MahalanobisKNeighborsRegressor(),
    MahalanobisKNeighborsRegressor(weights="distance", index_mode=Exact()),
    MahalanobisKMeans(random_state=0),
    MahalanobisKMedians(n_clusters=3, ridge=1e-3, random_state=0),
]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture
def data(rng):
    """Correlated points far from the origin, and the inverse of their covariance."""
    X = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)) + 50
    return X[:250], X[250:], np.linalg.inv(np.cov(X[:250].T))


def brute(Q, X, inverse):
    return cdist(Q, X, metric="mahalanobis", VI=inverse)


@pytest.mark.parametrize("mode", [None, Exact(), Filter(size=3)], ids=str)
def test_neighbors_are_those_of_brute_force(data, mode):
    X, Q, inverse = data
    truth = brute(Q, X, inverse)
    model = MahalanobisNeighbors(4, radius=2.0, index_mode=mode).fit(X)
    distances, numbers = model.kneighbors(Q)
    np.testing.assert_array_equal(numbers, np.argsort(truth, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(truth, axis=1)[:, :4], rtol=1e-7)
    found = model.radius_neighbors(Q, sort_results=True)
    for near, apart, row in zip(found[1], found[0], truth, strict=True):
        np.testing.assert_array_equal(np.sort(near), np.flatnonzero(row <= 2.0))
        np.testing.assert_allclose(apart, np.sort(row[row <= 2.0]), rtol=1e-7)
    alone = model.radius_neighbors(Q, radius=1.0, return_distance=False)
    assert [len(x) for x in alone] == [int(x) for x in (truth <= 1).sum(axis=1)]


def test_a_point_is_not_its_own_neighbor(data):
    X, _, inverse = data
    # four of a place: more duplicates than neighbours
    X = np.concatenate([X, X[:1], X[:1], X[:1]])
    truth = brute(X, X, inverse)
    np.fill_diagonal(truth, np.inf)
    metric = MahalanobisMetric.from_matrix(inverse)
    model = MahalanobisNeighbors(2, radius=1.5, metric=metric).fit(X)
    distances, numbers = model.kneighbors()
    np.testing.assert_allclose(distances, np.sort(truth)[:, :2], atol=1e-9)
    others = np.arange(len(X)) != numbers.T
    assert others[:, :250].all()
    for i, near in enumerate(model.radius_neighbors(return_distance=False)):
        np.testing.assert_array_equal(np.sort(near), np.flatnonzero(truth[i] <= 1.5))


def test_the_graph_holds_the_neighbors(data):
    X, Q, inverse = data
    model = MahalanobisNeighbors(3).fit(X)
    truth = brute(Q, X, inverse)
    is_near = truth <= np.sort(truth)[:, 2:3]
    ones = model.kneighbors_graph(Q).toarray()
    np.testing.assert_array_equal(ones, is_near)
    weighted = model.kneighbors_graph(Q, mode="distance").toarray()
    np.testing.assert_allclose(weighted, truth * is_near, rtol=1e-7)
    assert model.kneighbors_graph(n_neighbors=5).nnz == 5 * len(X)


@pytest.mark.parametrize("kind", ["factor", "matrix", "metric", "low rank"])
def test_every_kind_of_metric_is_taken(data, rng, kind):
    X, Q, _ = data
    factor = rng.standard_normal((2 if kind == "low rank" else 6, 6))
    given = {
        "factor": factor,
        "low rank": factor,
        "matrix": factor.T @ factor,
        "metric": MahalanobisMetric(factor),
    }[kind]
    got = MahalanobisNeighbors(5, metric=given).fit(X).kneighbors(Q)[0]
    want = np.sort(brute(Q, X, factor.T @ factor))[:, :5]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_update_of_the_metric_reaches_predictions(rng):
    X = rng.standard_normal((400, 2))
    y = (X[:, 0] > 0).astype(int)
    # the metric measures along the wrong axis until it is turned
    model = MahalanobisKNeighborsClassifier(metric=np.array([[0.0, 1.0]]))
    model.fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) < 0.7
    model.index_.update_metric(np.array([1.0]), np.array([1.0, -1.0]))
    assert model.score(X[200:], y[200:]) > 0.95


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_predictions_are_those_of_neighbors_in_whitened_space(data, weights):
    X, Q, inverse = data
    metric = MahalanobisMetric.from_matrix(inverse)
    y = np.digitize(X[:, 0], np.quantile(X[:, 0], [0.3, 0.6]))
    ours = MahalanobisKNeighborsClassifier(7, weights=weights, metric=metric)
    theirs = KNeighborsClassifier(7, weights=weights)
    ours.fit(X, y)
    theirs.fit(metric.whiten(X), y)
    np.testing.assert_allclose(
        ours.predict_proba(Q), theirs.predict_proba(metric.whiten(Q)), atol=1e-7
    )
    # a point at distance 0 has all the weight
    np.testing.assert_allclose(
        ours.predict_proba(X[:9]), theirs.predict_proba(metric.whiten(X[:9])), atol=1e-7
    )
    targets = np.stack([X[:, 0] ** 2, X[:, 1]], axis=1)
    for target in (targets, targets[:, 0]):
        got = MahalanobisKNeighborsRegressor(7, weights=weights).fit(X, target)
        want = KNeighborsRegressor(7, weights=weights).fit(metric.whiten(X), target)
        np.testing.assert_allclose(
            got.predict(Q), want.predict(metric.whiten(Q)), rtol=1e-6
        )


def test_fitting_in_parts_is_fitting_at_once(data):
    X, Q, inverse = data
    y = np.array(["low", "high"])[(X[:, 0] > np.median(X[:, 0])).astype(int)]
    whole, parts = (
        MahalanobisKNeighborsClassifier(metric=inverse, weights="distance")
        for _ in range(2)
    )
    whole.fit(X, y)
    parts.partial_fit(X[:80], y[:80], classes=["low", "high"])
    parts.partial_fit(X[80:], y[80:])
    assert parts.n_samples_fit_ == len(X)
    np.testing.assert_allclose(parts.predict_proba(Q), whole.predict_proba(Q))
    regressors = [MahalanobisKNeighborsRegressor(metric=inverse) for _ in range(2)]
    regressors[0].fit(X, X[:, 0])
    for rows in (slice(0, 80), slice(80, None)):
        regressors[1].partial_fit(X[rows], X[rows, 0])
    np.testing.assert_allclose(regressors[1].predict(Q), regressors[0].predict(Q))
    neighbors = MahalanobisNeighbors(metric=inverse)
    neighbors.partial_fit(X[:80]).partial_fit(X[80:])
    np.testing.assert_array_equal(
        neighbors.kneighbors()[1],
        MahalanobisNeighbors(metric=inverse).fit(X).kneighbors()[1],
    )


def test_the_transformer_is_a_twin_of_scikit_learns(data):
    X, Q, inverse = data
    metric = MahalanobisMetric.from_matrix(inverse)
    for mode in ("distance", "connectivity"):
        ours = MahalanobisKNeighborsTransformer(mode, n_neighbors=4, metric=inverse)
        theirs = KNeighborsTransformer(mode=mode, n_neighbors=4)
        fitted = ours.fit_transform(X).toarray()
        np.testing.assert_allclose(
            fitted, theirs.fit_transform(metric.whiten(X)).toarray(), atol=1e-6
        )
        got = ours.transform(Q).toarray()
        want = theirs.transform(metric.whiten(Q)).toarray()
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert len(ours.get_feature_names_out()) == len(X)


@pytest.mark.parametrize(
    "last",
    [
        DBSCAN(eps=2.0, metric="precomputed"),
        Isomap(n_neighbors=20, metric="precomputed"),
        TSNE(
            metric="precomputed",
            init="random",
            perplexity=8,
            max_iter=250,
            random_state=0,
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_graph_feeds_pipelines(data, last):
    X, _, inverse = data
    X = X[:120]
    ours = MahalanobisKNeighborsTransformer(n_neighbors=30, metric=inverse)
    theirs = make_pipeline(KNeighborsTransformer(n_neighbors=30), clone(last))
    model = make_pipeline(StandardScaler(with_std=False), ours, last)
    call = "fit_predict" if isinstance(last, DBSCAN) else "fit_transform"
    got = getattr(model, call)(X)
    if isinstance(last, TSNE):
        # its steps are chaotic: rounding alone moves the picture
        assert got.shape == (len(X), 2)
        assert np.isfinite(got).all()
        return
    want = getattr(theirs, call)(MahalanobisMetric.from_matrix(inverse).whiten(X))
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=1e-5)


def test_a_grid_over_metrics_finds_the_better_one():
    X, y = load_digits(return_X_y=True)
    X, _, y, _ = train_test_split(X / 16, y, train_size=600, random_state=0)
    euclid = MahalanobisMetric(np.eye(64))
    broken = np.eye(1, 64, 20)
    search = GridSearchCV(
        MahalanobisKNeighborsClassifier(3), {"metric": [broken, euclid]}, cv=2
    )
    search.fit(X, y)
    assert search.best_params_["metric"].shape == (64, 64)
    assert search.best_score_ > 0.9


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_pickles_answer_alike(data, estimator):
    X, Q, _ = data
    fitted = clone(estimator).fit(X, (X[:, 0] > 50).astype(int))
    again = pickle.loads(pickle.dumps(fitted))
    for call in ("kneighbors", "predict", "transform"):
        if hasattr(fitted, call):
            got, want = getattr(again, call)(Q), getattr(fitted, call)(Q)
            if hasattr(got, "toarray"):
                got, want = got.toarray(), want.toarray()
            np.testing.assert_array_equal(got, want)


def test_names_of_features_are_checked(data):
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    X, Q, _ = data
    names = list("abcdef")
    X, Q = (pd.DataFrame(z, columns=names) for z in (X, Q))
    model = MahalanobisKMeans(3, random_state=0).set_output(transform="pandas").fit(X)
    assert list(model.feature_names_in_) == names
    assert list(model.transform(Q).columns) == [
        f"mahalanobiskmeans{i}" for i in range(3)
    ]
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(Q[names[::-1]])


X = np.random.default_rng(0).standard_normal((30, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MahalanobisNeighbors(metric="euclidean").fit(X), "'covariance', a"),
        (lambda: MahalanobisNeighbors(metric=np.eye(2)).fit(X), "expected 3 columns"),
        (
            lambda: MahalanobisNeighbors(metric=np.eye(3), ridge=1.0).fit(X),
            "expected 0 with a metric that is given",
        ),
        (lambda: MahalanobisNeighbors(metric=-np.eye(3)).fit(X), "positive semidef"),
        (
            lambda: MahalanobisNeighbors(metric=np.cov((9 * X).T)).fit(9 * X),
            "is the covariance of the points",
        ),
        (
            lambda: MahalanobisKMeans(metric=np.cov((9 * X).T)).fit(9 * X),
            "is the covariance of the points",
        ),
        (lambda: MahalanobisNeighbors(index_mode=Adaptive()).fit(X), "index_mode: ex"),
        (lambda: MahalanobisNeighbors(0).fit(X), "n_neighbors: expected an integer"),
        (lambda: MahalanobisNeighbors(radius=-1.0).fit(X), "radius: expected a num"),
        (lambda: MahalanobisNeighbors(30).fit(X).kneighbors(), "left out itself"),
        (lambda: MahalanobisNeighbors(31).fit(X).kneighbors(X), "n_samples_fit = 30"),
        (
            lambda: MahalanobisNeighbors(metric=np.eye(3) + 1e-5 * X[:3]).fit(X),
            "expected a symmetric matrix",
        ),
        (
            lambda: MahalanobisNeighbors().fit(np.ones((5, 2))),
            "give a ridge or a shrinkage",
        ),
        (
            lambda: MahalanobisKNeighborsTransformer("distances").fit(X),
            "mode: expected one of",
        ),
        (
            lambda: MahalanobisKNeighborsClassifier(weights="all").fit(X, X[:, 0] > 0),
            "weights: expected one of",
        ),
        (
            lambda: MahalanobisKNeighborsClassifier().partial_fit(X, X[:, 0] > 0),
            "classes must be passed",
        ),
        (
            lambda: MahalanobisKNeighborsClassifier().partial_fit(
                X, np.arange(30) % 3, classes=[0, 1]
            ),
            r"y: expected classes of \[0 1\], got \[2\]",
        ),
        (
            lambda: (
                MahalanobisKNeighborsRegressor()
                .partial_fit(X, X)
                .partial_fit(X, X[:, 0])
            ),
            "y: expected shape",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
