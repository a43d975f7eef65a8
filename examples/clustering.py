"""Clusters that Euclidean distances do not show, and points that lie far away.

Four groups differ along one direction and have ten times the spread along all others:
Euclidean k-means splits them along the wrong directions. A few pairs of points of the
same group suffice for a metric in which k-means finds the groups: the inverse
covariance of their differences. Then some points are outliers: centers that are means
follow the outliers, medians hardly move. Last, the points arrive in batches, each of
which moves the centers a little.

    pip install fastattn
    python examples/clustering.py

Bar-Hillel, Hertz, Shental and Weinshall, Learning a Mahalanobis Metric from Equivalence
Constraints, JMLR 6, 2005.
"""

import sys

import numpy as np
from sklearn.metrics import adjusted_rand_score

from sketching import MahalanobisKMeans, MahalanobisKMedians, MahalanobisMetric

N, D, GROUPS, SPREAD = 2000, 16, 4, 10.0
PAIRS, FAR = 100, 60


def points(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of groups along one hidden direction, and the group of each."""
    groups = rng.integers(GROUPS, size=N)
    x = SPREAD * rng.standard_normal((N, D))
    x[:, 0] = 6.0 * groups + rng.standard_normal(N)
    return x @ np.linalg.qr(rng.standard_normal((D, D)))[0], groups


def metric_of_pairs(
    x: np.ndarray, groups: np.ndarray, rng: np.random.Generator
) -> MahalanobisMetric:
    """The metric under which differences of pairs of one group have covariance I."""
    one = rng.integers(len(x), size=PAIRS)
    two = [rng.choice(np.flatnonzero(groups == groups[i])) for i in one]
    differences = x[one] - x[two]
    return MahalanobisMetric.from_covariance(differences.T @ differences / PAIRS)


def agreement(groups: np.ndarray, labels: np.ndarray) -> float:
    """How well labels match groups, whatever their names: 1 if they do, 0 by chance."""
    return float(adjusted_rand_score(groups, labels))


def thrown(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points, and outliers a hundred times as far out in one direction."""
    direction = rng.standard_normal(x.shape[1])
    place = 100 * SPREAD * direction / np.linalg.norm(direction)
    return np.vstack([x, place + SPREAD * rng.standard_normal((FAR, x.shape[1]))])


def compare(seed: int) -> dict[str, float]:
    """Cluster with every method; return the agreement of each with the groups."""
    rng = np.random.default_rng(seed)
    x, groups = points(rng)
    metric = metric_of_pairs(x, groups, rng)
    options = {"n_clusters": GROUPS, "random_state": seed, "n_init": 3}
    found = {
        "Euclidean": MahalanobisKMeans(metric=np.eye(D), **options).fit(x).labels_,
        "covariance of the points": MahalanobisKMeans(**options).fit(x).labels_,
        f"{PAIRS} pairs": MahalanobisKMeans(metric=metric, **options).fit(x).labels_,
    }
    batches = MahalanobisKMeans(metric=metric, **options)
    for rows in np.array_split(x, 20):
        batches.partial_fit(rows)
    found[f"{PAIRS} pairs, in 20 batches"] = batches.predict(x)
    far = thrown(x, rng)
    start = {**options, "n_init": 1, "init": centres(x, groups)}
    for kind in (MahalanobisKMeans, MahalanobisKMedians):
        name = "means" if kind is MahalanobisKMeans else "medians"
        labels = kind(metric=metric, **start).fit(far).labels_
        found[f"{PAIRS} pairs, far points, {name}"] = labels[: len(x)]
    return {name: agreement(groups, labels) for name, labels in found.items()}


def centres(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean of each group: a good initialization."""
    return np.stack([x[groups == group].mean(axis=0) for group in range(GROUPS)])


def main() -> int:
    """Print how well clusters match the groups; 0 if the metric and medians help."""
    found = compare(0)
    lines = ["agreement with the groups (adjusted Rand index)"]
    lines += [f"  {name:34} {share:5.2f}" for name, share in found.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    euclidean, _, pairs, batches, means, medians = found.values()
    helped = euclidean < 0.3 and min(pairs, batches, medians) > 0.9
    return 0 if helped and means < medians else 1


if __name__ == "__main__":
    sys.exit(main())
