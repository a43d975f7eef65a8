"""Sketched distances: error against size, and answers to an attacker."""

import numpy as np
from scipy.stats import binom

from sketching import Adaptive, MahalanobisIndex, MahalanobisMetric

_D, _POINTS, _QUERIES = 512, 2000, 32
# of an attack: the dimension, the points, and the length of a step
_ATTACKED, _OTHERS, _STEP = 200, 400, 0.15
# of an attack on all directions: dimensions, and queries that test its directions
_DIMENSIONS, _ASKED = (16, 64, 256), 2000


def sketch_error(*, quick):
    """Relative error of sketched distances against the rows of a sketch.

    Gaussian points under a metric of condition 10. `sqrt(1 / 2m)` is the standard
    deviation of one distance from m Gaussian rows. The median of nine sketches takes
    nine times the numbers.
    """
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((_D, _D)))[0] for _ in range(2))
    metric = MahalanobisMetric(left * np.geomspace(1, 0.1, _D) @ right)
    x, queries = (rng.standard_normal((m, _D)) for m in (_POINTS, _QUERIES))
    truth = _distances(metric, queries, x)
    sizes = (16, 64, 256) if quick else (16, 32, 64, 128, 256, 512)
    rows = []
    for sketches in (1, 9):
        for size in sizes:
            mode = Adaptive(rows=size, sketches=sketches, sampled=sketches)
            index = MahalanobisIndex(metric, mode=mode, eps=0.3, rng=0)
            index.insert(x)
            off = np.abs(index.query(queries).value / truth - 1)
            typical = float(np.sqrt(np.mean(off**2)))
            # the error of a sketch of Gaussian rows follows a chi-squared law
            assert typical <= 2 * size**-0.5, f"{size} rows err by {typical:.2g}"
            rows.append(
                {
                    "sketches": sketches,
                    "rows": size,
                    "numbers of a point": sketches * size,
                    "median error": float(np.median(off)),
                    "root mean square": typical,
                    "99 % of pairs within": float(np.quantile(off, 0.99)),
                    "largest": float(off.max()),
                    "sqrt(1 / 2m)": (2 * size) ** -0.5,
                }
            )
    return rows


def attack(*, quick):
    """Hill climbing on the answers about one point: answered over true distances.

    Each step queries a direction near the best so far, and accepts it if the answer is
    less. With one sketch the attack finds a direction that the sketch does not see;
    with a fresh sample of many sketches for every query it does not. The last rows are
    the worst directions that a hundred thousand answers teach, against as many sketches
    as `Adaptive()` takes for eps = 0.3: the share of answers there that exceed eps is
    within the claimed failure.
    """
    x = np.random.default_rng(1).standard_normal((_OTHERS, _ATTACKED))
    total = 400 if quick else 4000
    marks = sorted({0, *np.geomspace(10, total, 6 if quick else 16).astype(int)})
    modes = {
        "one sketch of 64 rows": Adaptive(rows=64, sketches=1, sampled=1),
        "16 sketches, 9 sampled": Adaptive(rows=64, sketches=16, sampled=9),
        "64 sketches, 9 sampled": Adaptive(rows=64, sketches=64, sampled=9),
    }
    rows = []
    for name, mode in modes.items():
        metric = MahalanobisMetric(np.eye(_ATTACKED))
        index = MahalanobisIndex(metric, mode=mode, eps=0.3, rng=0)
        index.insert(x)
        claim = index.guarantee().error
        for steps, answers in climb(index, x[0], marks, np.random.default_rng(4)):
            rows.append(
                {
                    "mode": name,
                    "steps": int(steps),
                    "told over the truth": float(np.median(answers)),
                    "least of five": float(min(answers)),
                    "most of five": float(max(answers)),
                    "claimed error": float(claim),
                    "missed": float(np.mean(np.abs(np.array(answers) - 1) > claim)),
                    "claimed failure": float(index.guarantee().failure),
                }
            )
    for k in _DIMENSIONS[: 1 if quick else None]:
        rows += _learned(k, 4000 if quick else 100_000)
    return rows


def _learned(k, total):
    """Answers in the directions that answers to other queries have taught."""
    rows = []
    for seed in range(3):
        metric = MahalanobisMetric(np.eye(k))
        index = MahalanobisIndex(metric, mode=Adaptive(), eps=0.3, rng=seed)
        index.insert(np.zeros((1, k)))
        claim = index.guarantee()
        assert claim.error == 0.3
        found = []
        for v in learned_directions(index, k, total, np.random.default_rng(seed)):
            found += [float(index.query(v[None]).value[0, 0]) for _ in range(_ASKED)]
        missed = np.abs(np.array(found) - 1) > claim.error
        assert missed.sum() <= binom.isf(1e-9, len(found), claim.failure)
        rows.append(
            {
                "mode": f"Adaptive(), k = {k}, draw {seed}",
                "steps": total,
                "told over the truth": float(np.median(found)),
                "least of five": float(min(found)),
                "most of five": float(max(found)),
                "claimed error": float(claim.error),
                "missed": float(missed.mean()),
                "claimed failure": float(claim.failure),
            }
        )
    return rows


def learned_directions(index, k, total, rng, batch=500):
    """Yield two directions about a point at zero, learned from so many answers.

    Half of them are about random directions, whose moments show where answers are most
    and least; the other half climbs from there, guided by answers nearby.
    """

    def told(directions):
        return index.query(directions).value[:, 0] ** 2 - 1

    moments = np.zeros((k, k))
    for _ in range(total // 2 // batch):
        u = rng.standard_normal((batch, k))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        moments += (u * told(u)[:, None]).T @ u
    _, vectors = np.linalg.eigh(moments)
    for sign, start in ((-1, vectors[:, 0]), (1, vectors[:, -1])):
        v = start
        for _ in range(total // 4 // batch):
            noise = rng.standard_normal((batch, k)) / np.sqrt(k)
            u = v + noise
            answers = told(u / np.linalg.norm(u, axis=1, keepdims=True))
            slope = (answers - answers.mean()) @ noise / batch * k
            v = v + sign * 0.5 * slope
            v = v / np.linalg.norm(v)
        yield v


def climb(index, target, marks, rng):
    """Yield, after so many steps, answers about the worst direction, five times."""
    d = len(target)
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)

    def told(v):
        return float(index.query(target[None] + 10 * v).value[0, 0]) / 10

    best = told(direction)
    for step in range(marks[-1] + 1):
        if step in marks:
            yield step, [told(direction) for _ in range(5)]
        other = direction + _STEP * rng.standard_normal(d) / np.sqrt(d)
        other /= np.linalg.norm(other)
        answer = told(other)
        if answer < best:
            direction, best = other, answer


def _distances(metric, queries, x):
    """Distances of all pairs, from the definition."""
    white, asked = (metric.whiten(z) for z in (x, queries))
    return np.stack([np.linalg.norm(white - row, axis=1) for row in asked])
