"""
A metric that changes
=====================

Neighbours and clusters under a metric that changes while points are inserted and
deleted.
"""

# %%
# An index under a metric
# -----------------------
# A Mahalanobis metric is ``|U (x - y)|`` with a matrix ``U``. The index stores points
# and computes distances under the current metric. The points here are images of digits
# whose pixels have unknown units.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from sketching import (
    Adaptive,
    HingeGradient,
    MahalanobisIndex,
    MahalanobisKMeans,
    MahalanobisMetric,
)

rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
images = images / 16 * np.exp(1.3 * rng.standard_normal(64))
points, queries = images[:1300], images[1300:]

index = MahalanobisIndex(MahalanobisMetric(np.eye(64)), rng=0)
numbers = index.insert(points)
distances, found = index.kneighbors(queries[:3], 5)
print(found)
print("certified", index.kneighbors(queries[:3], 5).certificate.source)

# %%
# Learning the metric, in place
# -----------------------------
# A metric learner takes pairs or triplets of points and makes one rank-one update of U
# for each, applied to the index itself. Here a triplet states that the second image, of
# the same digit as the first, should be nearer than the third, of another digit.


def accuracy():
    votes = labels[:1300][index.kneighbors(queries, 5)[1]]
    guess = np.array([np.bincount(row, minlength=10).argmax() for row in votes])
    return np.mean(guess == labels[1300:])


# squared distances of about 4: the margin between near and far is 1
scale = 2 / np.sqrt(2 * points.var(axis=0).sum())
index = MahalanobisIndex(MahalanobisMetric(scale * np.eye(64)), rng=0)
index.insert(points)
learner = HingeGradient(index, rate=3e-3)
same = labels[:1300, None] == labels[None, :1300]
squares = np.sum((points[:, None] - points) ** 2, axis=2)
np.fill_diagonal(squares, np.inf)
near = np.where(same, squares, np.inf).argsort(axis=1)[:, :3]
far = np.where(same, np.inf, squares).argsort(axis=1)[:, :10]

seen, history = [0], [accuracy()]
for _ in range(6):
    for _ in range(1000):
        i = rng.integers(len(points))
        one, two = rng.choice(near[i]), rng.choice(far[i])
        learner.update_triplet(points[i], points[one], points[two])
    seen.append(seen[-1] + 1000)
    history.append(accuracy())
print("accuracy before", f"{history[0]:.4f}", "and after", f"{history[-1]:.4f}")

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(seen, history, "o-")
axes.set(xlabel="triplets seen", ylabel="accuracy of five neighbours")
plt.show()

# %%
# The index was never rebuilt, and its neighbours equal those of a rebuilt index:

anew = MahalanobisIndex(index.metric)
anew.insert(points)
print(np.array_equal(index.kneighbors(queries, 5)[1], anew.kneighbors(queries, 5)[1]))

# %%
# In the original units of the images Euclidean neighbours are more accurate than all of
# these: learning compensates for unknown units, and is not better than knowing them.
#
# Clusters in a metric
# --------------------
# k-means in the metric of the covariance is k-means of whitened points, without
# computing these; a ridge keeps directions without variance from dominating. Any other
# metric can be used, such as the learned one.


def purity(**options):
    model = MahalanobisKMeans(10, random_state=0, **options).fit(images)
    counts = [np.bincount(labels[model.labels_ == j]).max() for j in range(10)]
    return sum(counts) / len(labels)


print("share of the largest digit in its cluster")
print(f"  Euclidean  {purity(metric=np.eye(64)):.2f}")
print(f"  covariance {purity(ridge=0.1):.2f}")
print(f"  learned    {purity(metric=index.metric):.2f}")

# %%
# Adversarial queries
# -------------------
# An adversary who chooses queries by earlier outputs can defeat one fixed sketch.
# ``Adaptive`` keeps many sketches and draws a few of them for each query; ``guarantee``
# returns the error that this certifies.

for sketches in (4, 400):
    mode = Adaptive(rows=64, sketches=sketches, sampled=17)
    guarded = MahalanobisIndex(MahalanobisMetric(np.eye(20)), mode=mode, eps=0.3, rng=0)
    guarded.insert(rng.standard_normal((50, 20)))
    print(sketches, "sketches:", guarded.guarantee().source)
