"""A metric is learned from a stream while an index under this metric answers queries.

Measurements arrive as pairs of items and a distance that people assign to them, with an
error of some per cent. A metric learner turns each measurement into a rank-one update
of the index. In every round new items are inserted, old ones deleted, and the ten
nearest neighbours queried: the index is never rebuilt.

    pip install fastattn
    python examples/learned_metric.py

Jain, Kulis, Dhillon and Grauman, Online Metric Learning and Fast Similarity Search,
NIPS 2008.
"""

import sys
from collections.abc import Iterator

import numpy as np

from sketching import Lego, MahalanobisIndex, MahalanobisMetric

D, ITEMS, MOVES, QUERIES = 24, 1000, 50, 100
ROUNDS, PAIRS, RATE = 8, 400, 0.03
NEIGHBOURS, NOISE = 10, 0.05


def hidden_metric(rng: np.random.Generator) -> MahalanobisMetric:
    """The metric to be learned: a few directions matter, most do not."""
    axes = np.linalg.qr(rng.standard_normal((D, D)))[0]
    return MahalanobisMetric(np.geomspace(3.0, 0.1, D)[:, None] * axes)


def judgements(
    truth: MahalanobisMetric, items: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Pairs of items and their squared distances, with noise."""
    for i, j in rng.integers(len(items), size=(PAIRS, 2)):
        said = truth.distances(items[i : i + 1], items[j : j + 1])[0]
        said *= np.exp(NOISE * rng.standard_normal())
        yield items[i], items[j], float(said) ** 2


def nearest(metric: MahalanobisMetric, items: np.ndarray, queries: np.ndarray) -> list:
    """Sets of the nearest rows, by an index that is built for this call."""
    index = MahalanobisIndex(metric)
    index.insert(items)
    return [{*row} for row in index.kneighbors(queries, NEIGHBOURS)[1]]


def recall(found: list, wanted: list) -> float:
    """Share of the true neighbours that were found."""
    return sum(len(a & b) for a, b in zip(found, wanted, strict=True)) / sum(
        len(b) for b in wanted
    )


def stream(seed: int) -> Iterator[tuple[float, bool]]:
    """Learn for some rounds; yield the recall, and whether the index is up to date."""
    rng = np.random.default_rng(seed)
    truth = hidden_metric(rng)
    index = MahalanobisIndex(MahalanobisMetric(np.eye(D)), rng=seed)
    learner = Lego(index, rate=RATE)
    # row i is the item of number i
    items = rng.standard_normal((ITEMS, D))
    index.insert(items)
    queries = rng.standard_normal((QUERIES, D))
    for _ in range(ROUNDS + 1):
        numbers = index.numbers
        found = [{*row} for row in index.kneighbors(queries, NEIGHBOURS)[1]]
        anew = nearest(index.metric, items[numbers], queries)
        is_current = found == [{*numbers[[*row]]} for row in anew]
        wanted = nearest(truth, items[numbers], queries)
        yield recall(found, [{*numbers[[*row]]} for row in wanted]), is_current
        for x, x2, square in judgements(truth, items[numbers], rng):
            learner.update(x, x2, square)
        arrived = rng.standard_normal((MOVES, D))
        index.delete(rng.choice(numbers, MOVES, replace=False))
        index.insert(arrived)
        items = np.concatenate([items, arrived])


def main() -> int:
    """Print the recall of each round; 0 if it improves and every round was current."""
    rounds = list(stream(0))
    for i, (share, is_current) in enumerate(rounds):
        state = "as from an index built anew" if is_current else "out of date"
        sys.stdout.write(
            f"{i * PAIRS:5d} pairs seen: {share:4.0%} of the {NEIGHBOURS} nearest "
            f"found, {state}\n"
        )
    improved = rounds[0][0] < 0.2 and rounds[-1][0] > 0.7
    return 0 if improved and all(x for _, x in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
