"""k-means and k-medians in a metric: seeds, steps, bounds, medians, their ops."""

import itertools
import sys

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import chi2
from sklearn.cluster import KMeans

from sketching import MahalanobisKMeans, MahalanobisKMedians, MahalanobisMetric
from sketching._ops.assign import cluster_sums, own_distances, two_nearest
from sketching.clustering.kmeans import lloyd
from sketching.clustering.seeding import drawn_by_distance, first_centers

ADVANCE = {"advance": lambda: None}


def blobs(rng, count, each, d, spread=0.1):
    """Centres on a grid far apart, and points around them."""
    centers = 5 * rng.permutation(3 * count)[:count, None] * np.ones(d)
    centers = centers + rng.standard_normal((count, d))
    noise = spread * rng.standard_normal((count, each, d))
    return centers, (centers[:, None] + noise).reshape(-1, d)


def plain_lloyd(points, centers, steps):
    """Lloyd's steps from the definition: labels and means, without empty clusters."""
    labels = cdist(points, centers).argmin(axis=1)
    for _ in range(steps):
        centers = np.array(
            [points[labels == j].mean(axis=0) for j in np.unique(labels)]
        )
        labels = cdist(points, centers).argmin(axis=1)
    return centers, labels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_fast_kernels_agree_with_references(rng, dtype, k):
    # whole numbers: sums are exact, ties included
    points = rng.integers(-3, 4, (700, 5)).astype(dtype)
    centers = rng.integers(-3, 4, (k, 5)).astype(dtype)
    squares = (centers**2).sum(axis=1)
    slots = rng.integers(700, size=600)
    got = two_nearest.kernel("cpu")(points, centers, squares, slots)
    want = two_nearest.reference(points, centers, squares, slots)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert got[1].dtype == want[1].dtype == dtype
    labels = got[0]
    args = points, centers, labels, slots
    np.testing.assert_allclose(
        own_distances.kernel("cpu")(*args), own_distances.reference(*args), rtol=1e-14
    )
    weights = rng.integers(5, size=600).astype(dtype)
    args = points[slots], labels, weights
    np.testing.assert_array_equal(
        cluster_sums.kernel("cpu")(*args, n_clusters=k),
        cluster_sums.reference(*args, n_clusters=k),
    )


def test_references_follow_the_library_of_the_arrays(rng, xp):
    points, centers = rng.standard_normal((20, 3)), rng.standard_normal((4, 3))
    squares, slots = (centers**2).sum(axis=1), np.arange(5, 15)
    arrays = xp.asarrays(points, centers, squares, slots)
    labels, least, second = two_nearest.reference(*arrays)
    assert isinstance(labels, xp.array_type)
    apart = np.sort(cdist(points[slots], centers) ** 2)
    norms = (points[slots] ** 2).sum(axis=1)
    np.testing.assert_allclose(np.asarray(least) + norms, apart[:, 0], atol=1e-12)
    np.testing.assert_allclose(np.asarray(second) + norms, apart[:, 1], atol=1e-12)
    own = own_distances.reference(*arrays[:2], labels, arrays[3])
    np.testing.assert_allclose(np.asarray(own) ** 2, apart[:, 0], atol=1e-12)
    ones = xp.asarray(np.ones(10))
    sums = cluster_sums.reference(xp.asarray(points[slots]), labels, ones, n_clusters=4)
    want = [points[slots][np.asarray(labels) == j].sum(axis=0) for j in range(4)]
    np.testing.assert_allclose(np.asarray(sums), want, atol=1e-12)


def test_seeds_have_exactly_the_distribution_of_kmeans_plus_plus(rng):
    """Sets of four of six points, of which two are drawn in one batch."""
    points = rng.standard_normal((6, 2)) * [1.0, 3.0]
    squares = cdist(points, points) ** 2
    truth = {}
    for order in itertools.permutations(range(6), 4):
        chance = 1 / 6
        for i in range(1, 4):
            near = squares[list(order[:i])].min(axis=0)
            chance *= near[order[i]] / near.sum()
        truth[frozenset(order)] = truth.get(frozenset(order), 0) + chance
    assert sum(truth.values()) == pytest.approx(1)
    trials, counts = 4000, dict.fromkeys(truth, 0)
    for _ in range(trials):
        counts[frozenset(drawn_by_distance(points, 4, rng).tolist())] += 1
    statistic = sum(
        (counts[x] - trials * p) ** 2 / (trials * p) for x, p in truth.items()
    )
    assert chi2.sf(statistic, len(truth) - 1) > 1e-4
    # the test can tell: uniform sets would be found out
    uniform = trials / len(truth)
    wrong = sum((uniform - trials * p) ** 2 / (trials * p) for p in truth.values())
    assert chi2.sf(wrong, len(truth) - 1) < 1e-9


def test_first_centers_find_every_blob(rng):
    for seed in range(20):
        _, points = blobs(rng, 15, 40, 3)
        found = first_centers(points, 15, np.random.default_rng(seed))
        assert len(np.unique(cdist(points, found).argmin(axis=1))) == 15
        assert cdist(points, found).min(axis=1).max() < 1


def test_first_centers_start_below_single_draws(rng):
    points = rng.standard_t(4, (3000, 10))

    def start(centers):
        return (cdist(points, centers).min(axis=1) ** 2).sum()

    ours, theirs = [], []
    for seed in range(10):
        stream = np.random.default_rng(seed)
        ours.append(start(first_centers(points, 12, stream)))
        theirs.append(start(points[drawn_by_distance(points, 12, stream)]))
    assert max(ours) < min(theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_bounds_skip_no_point_that_changes(rng, dtype, k):
    points = rng.standard_normal((800, 4)).astype(dtype)
    start = points[:k]
    for steps in (1, 2, 3, 5, 8, 13, 40):
        found = lloyd(points, start, max_iter=steps, tol=0.0, **ADVANCE)
        centers, labels = plain_lloyd(points.astype(np.float64), start, found.n_iter)
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_allclose(found.centers, centers, atol=1e-5)
        truth = (cdist(points, found.centers).min(axis=1) ** 2).sum()
        assert found.inertia == pytest.approx(truth, rel=1e-6)


def test_no_cluster_stays_empty(rng):
    points = rng.standard_normal((50, 2))
    far = np.concatenate([points[:2], 1e3 + points[:3]])
    found = lloyd(points, far, max_iter=50, tol=0.0, **ADVANCE)
    assert len(np.unique(found.labels)) == 5
    # the members of the centres are returned, points that were moved included
    means = [points[found.members == j].mean(axis=0) for j in range(5)]
    np.testing.assert_allclose(found.centers, means)


@pytest.mark.parametrize("make", [MahalanobisKMeans, MahalanobisKMedians])
def test_fewer_places_than_clusters(make):
    X = np.repeat([[0.0, 1.0], [2.0, 3.0], [9.0, 0.0]], 4, axis=0)
    model = make(5, metric=np.eye(2), random_state=0).fit(X)
    assert model.inertia_ < 1e-12
    assert np.isfinite(model.cluster_centers_).all()
    np.testing.assert_allclose(X, model.cluster_centers_[model.labels_], atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kmeans_is_scikit_learns_on_whitened_points(rng, dtype):
    X = (rng.standard_normal((1500, 5)) @ rng.standard_normal((5, 5)) + 30).astype(
        dtype
    )
    metric = MahalanobisMetric.from_data(X)
    start = X[:6]
    model = MahalanobisKMeans(6, init=start, tol=0).fit(X)
    theirs = KMeans(6, init=metric.whiten(start), n_init=1, tol=0)
    theirs.fit(metric.whiten(X.astype(np.float64)))
    assert model.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    assert np.mean(model.labels_ == theirs.labels_) > 0.995
    assert model.cluster_centers_.dtype == model.transform(X).dtype == dtype
    np.testing.assert_allclose(
        metric.whiten(model.cluster_centers_), theirs.cluster_centers_, atol=0.02
    )
    assert model.score(X) == pytest.approx(-model.inertia_, rel=1e-3)
    apart = cdist(X, model.cluster_centers_, "mahalanobis", VI=metric.matrix)
    np.testing.assert_allclose(model.transform(X), apart, rtol=1e-3)
    assert np.mean(model.predict(X) == model.labels_) > 0.999


def test_a_metric_of_low_rank_has_centres_in_the_space_of_the_points(rng):
    X = rng.standard_normal((400, 6))
    X[:, 0] += np.repeat([0.0, 20.0], 200)
    model = MahalanobisKMeans(2, metric=np.eye(1, 6), random_state=0).fit(X)
    means = [X[:200].mean(axis=0), X[200:].mean(axis=0)]
    order = np.argsort(model.cluster_centers_[:, 0])
    np.testing.assert_allclose(model.cluster_centers_[order], means)


def test_more_starts_are_not_worse(rng):
    X = rng.standard_normal((500, 3))
    one, many = (
        MahalanobisKMeans(9, init="random", n_init=n, random_state=0).fit(X)
        for n in (1, 8)
    )
    assert many.inertia_ < one.inertia_


def test_fitting_in_parts_gives_means_of_all(rng):
    # a seed for which the first batch meets every blob
    _, X = blobs(rng, 4, 100, 3)
    order = rng.permutation(len(X))
    model = MahalanobisKMeans(4, metric=np.eye(3), random_state=0)
    for part in np.array_split(order, 5):
        model.partial_fit(X[part])
    labels = model.predict(X)
    means = [X[labels == j].mean(axis=0) for j in range(4)]
    np.testing.assert_allclose(model.cluster_centers_, means, rtol=1e-9)
    np.testing.assert_array_equal(model.counts_, [100] * 4)
    assert model.n_iter_ == 5


def test_parts_go_on_from_a_whole_fit(rng):
    _, X = blobs(rng, 3, 60, 2)
    model = MahalanobisKMeans(3, metric=np.eye(2), random_state=0).fit(X[::2])
    model.partial_fit(X[1::2])
    whole = MahalanobisKMeans(3, metric=np.eye(2), random_state=0).fit(X)
    got, want = (np.sort(m.cluster_centers_, axis=0) for m in (model, whole))
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("on_a_point", [False, True])
def test_one_median_is_the_geometric_median(rng, on_a_point):
    X = rng.standard_normal((61, 3)) * [1, 2, 3]
    if on_a_point:
        # twenty at one place hold the median there
        X[:41] = X[0]
    factor = rng.standard_normal((3, 3))

    def total(c):
        return cdist((c @ factor.T)[None], X @ factor.T).sum()

    best = minimize(
        total, X.mean(axis=0), method="Nelder-Mead", options={"xatol": 1e-9}
    )
    start = X[:1] if on_a_point else "k-means++"
    model = MahalanobisKMedians(1, metric=factor, init=start, tol=1e-14, max_iter=2000)
    model.fit(X)
    assert total(model.cluster_centers_[0]) <= best.fun * (1 + 1e-7)
    assert model.inertia_ == pytest.approx(total(model.cluster_centers_[0]))
    if on_a_point:
        np.testing.assert_allclose(model.cluster_centers_[0], X[0])


def test_a_median_that_starts_on_a_point_leaves_it(rng):
    X = rng.standard_normal((40, 2))
    far = np.linalg.norm(X, axis=1).argmax()
    stuck, free = (
        MahalanobisKMedians(1, metric=np.eye(2), init=x[None], tol=1e-12, max_iter=500)
        for x in (X[far], X.mean(axis=0))
    )
    assert stuck.fit(X).inertia_ == pytest.approx(free.fit(X).inertia_, rel=1e-6)


def test_steps_of_medians_never_raise_the_sum(rng):
    X = np.concatenate([rng.standard_normal((200, 3)), rng.standard_cauchy((50, 3))])
    sums = [
        MahalanobisKMedians(5, metric=np.eye(3), init=X[:5], max_iter=steps, tol=0)
        .fit(X)
        .inertia_
        for steps in range(1, 15)
    ]
    assert (np.diff(sums) <= 1e-9 * sums[0]).all()
    assert sums[-1] < 0.99 * sums[0]


def test_medians_resist_outliers_that_move_means(rng):
    _, X = blobs(rng, 3, 50, 2)
    truth = [X[i : i + 50].mean(axis=0) for i in (0, 50, 100)]
    X[:3] += 40
    start = np.array(truth)
    means, medians = (
        make(3, metric=np.eye(2), init=start).fit(X)
        for make in (MahalanobisKMeans, MahalanobisKMedians)
    )
    off = [
        np.linalg.norm(m.cluster_centers_ - truth, axis=1).max()
        for m in (means, medians)
    ]
    assert off[1] < 0.1 < off[0]


def test_progress_is_shown_with_rich_and_without(rng, monkeypatch, capsys):
    X = rng.standard_normal((60, 2))
    model = MahalanobisKMeans(3, progress=True, random_state=0, max_iter=5)
    model.fit(X)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    model.fit(X)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == model.n_iter_
    assert lines[0] == "MahalanobisKMeans: step 1 of at most 5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters: expected an integer"),
        ({"n_clusters": 21}, "expected at least n_clusters = 21 rows"),
        ({"init": "kmeans"}, "init: expected one of"),
        ({"init": np.ones((2, 2)), "n_clusters": 3}, r"init: expected shape \(3, 2\)"),
        ({"init": np.full((3, 2), np.nan), "n_clusters": 3}, "expected finite numbers"),
        ({"tol": -1.0}, "tol: expected a number"),
        ({"max_iter": 0}, "max_iter: expected an integer"),
        ({"n_init": 0}, "n_init: expected an integer"),
    ],
)
def test_bad_settings_are_named(rng, options, message):
    with pytest.raises(ValueError, match=message):
        MahalanobisKMeans(**options).fit(rng.standard_normal((20, 2)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_are_those_of_the_nearest_centre_whatever_the_start(seed, dtype):
    rng = np.random.default_rng(seed)
    if seed % 2:
        # centres of yesterday; one group has left
        places = 4 * rng.standard_normal((3, 5))
        start = places + 0.1 * rng.standard_normal((3, 5))
        x = np.concatenate([rng.standard_normal((100, 5)) + places[0]] * 2)
        x[100:] += 1.5 * rng.standard_normal(5)
    else:
        corners = (0, 0), (20, 0), (0, 20)
        x = np.concatenate([rng.standard_normal((50, 2)) + c for c in corners])
        start = rng.uniform(x.min(axis=0), x.max(axis=0), (5, 2))
    x = x.astype(dtype)
    metric = np.eye(x.shape[1])
    model = MahalanobisKMeans(len(start), metric=metric, init=start, tol=0).fit(x)
    apart = x[:, None].astype(np.float64) - model.cluster_centers_
    squares = (apart**2).sum(axis=2)
    own = np.take_along_axis(squares, model.labels_[:, None], axis=1)[:, 0]
    assert (own <= squares.min(axis=1) * (1 + 1e-5) + 1e-9).all()
    np.testing.assert_array_equal(model.labels_, model.predict(x))
    assert model.inertia_ == pytest.approx(squares.min(axis=1).sum(), rel=1e-4)


@pytest.mark.parametrize("make", [MahalanobisKMeans, MahalanobisKMedians])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_rows_have_equal_labels(make, dtype, rng):
    places = rng.integers(0, 1200, (7, 2)).astype(dtype)
    x = places[rng.integers(7, size=300)]
    model = make(10, metric=np.eye(2), random_state=0).fit(x)
    np.testing.assert_array_equal(model.labels_, model.predict(x))
    single = [model.predict(row[None])[0] for row in x]
    np.testing.assert_array_equal(model.labels_, single)
    _, where = np.unique(x, axis=0, return_inverse=True)
    assert all(len(set(model.labels_[where == i])) == 1 for i in range(7))
    assert model.n_distinct_ == len(set(model.labels_)) <= 7
    assert np.isfinite(model.cluster_centers_).all()
