"""
Tensor attention and Match3
===========================

Ordinary attention scores a token against each other token. Tensor attention scores a
token against each *pair*: a softmax over n squared pairs, for every one of n queries.
"""

# %%
# A softmax over pairs
# --------------------
# The inputs are two factors of keys and two of values. The score of a pair is the inner
# product of three vectors, the value of a pair the entrywise product of two; the
# polynomial method never stores an array of size n squared.

import math

import matplotlib.pyplot as plt
import numpy as np

import fastattn

rng = np.random.default_rng(0)
n, d = 4096, 8
query, key, other = rng.uniform(-1, 1, (3, n, d))
value, another = rng.uniform(0, 1, (2, n, 3))

answer = fastattn.approximate(
    query, (key, other), (value, another), tol=1e-3, guarantee="proven"
)
print("ran      ", answer.plan.method)
print("certified", f"{answer.certificate.error:.2e}", answer.certificate.norm)

# %%
# From the definition, for a few rows: each row is a softmax over 16 million pairs.

rows = [0, 1, 2]
pairs = np.einsum("jd,kd->jkd", key, other).reshape(n * n, d)
weights = np.exp(query[rows] @ pairs.T / d)
worth = np.einsum("jp,kp->jkp", value, another).reshape(n * n, -1)
truth = weights @ worth / weights.sum(axis=1, keepdims=True)
print("measured ", f"{np.abs(answer.value[rows] - truth).max():.2e}", "on three rows")

# %%
# What attention over pairs can compute
# -------------------------------------
# Match3 is the task of deciding for each token whether two others complete it to a sum
# of 0, modulo M. One head of ordinary attention cannot decide this
# (``examples/match3.py`` has four inputs that show why). Tensor attention can: with
# tokens encoded as angles, the score of three tokens can be made ``cos(a + b + c)``,
# which is 1 for a match and less for all other triples.

modulus = 37
tokens = rng.choice(rng.choice(modulus, 8, replace=False), 64)
angle = 2 * math.pi * tokens / modulus
c, s = np.cos(angle), np.sin(angle)
query = np.stack([c, -c, -s, -s], axis=1)
key = np.stack([c, s, c, s], axis=1)
other = np.stack([c, s, s, c], axis=1)

scores = np.einsum("id,jd,kd->ijk", query, key, other)
sums = tokens[:, None, None] + tokens[None, :, None] + tokens[None, None, :]
print("largest difference", np.abs(scores - np.cos(2 * math.pi * sums / modulus)).max())

# %%
# With a large scale the log-sum-exp of a row is the scale times the largest score of
# the row, up to the logarithm of the number of pairs. Every output has the field
# ``log_normalizer``.

gap = 1 - math.cos(2 * math.pi / modulus)
scale = 2 / gap * math.log(8 * len(tokens) ** 2)
value = np.ones((len(tokens), 1))
answer = fastattn.approximate(
    query, (key, other), (value, value), scale=scale, method=fastattn.Exact()
)
has_match = answer.log_normalizer > scale * (1 - gap / 2)
wanted = (sums % modulus == 0).any(axis=(1, 2))
print("tokens with a match", wanted.sum(), "of", len(tokens))
print("tokens that the unit gets right", np.sum(has_match == wanted))

# %%
# The scale is of the order of M squared times log n: far too large for a polynomial of
# low degree, so that this was exact attention over all pairs. This one problem has
# faster algorithms; for tensor attention with entries that large, on all inputs, none
# is believed to exist.

best = scores.max(axis=(1, 2))
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(np.sort(best[wanted]), "o", label="with a match")
axes.plot(np.sort(best[~wanted]), "s", label="without")
axes.axhline(1 - gap / 2, color="k", linestyle=":", label="threshold")
axes.set(xlabel="token", ylabel="largest score of a pair")
axes.legend()
plt.show()
