"""
Reading a certificate
=====================

Every answer carries a bound on its error. This page takes one apart: which error it
bounds, what it rests on, and what it does not say.
"""

# %%
# Four fields
# -----------

import matplotlib.pyplot as plt
import numpy as np

import fastattn

rng = np.random.default_rng(0)
n, d = 4096, 16
query, key, value = 0.7 * rng.standard_normal((3, n, d))

answer = fastattn.approximate(
    query, key, value, tol=0.1, method=fastattn.Polynomial(rank=400), rng=0
)
certificate = answer.certificate
print("error  ", f"{certificate.error:.3g}")
print("failure", certificate.failure)
print("norm   ", certificate.norm)
print("source ", certificate.source)

# %%
# Read: ``norm(answer - truth) <= error``, except with probability ``failure``. Here the
# norm is ``relative-frobenius``, the difference over the truth in the Frobenius norm
# of the head. The source says that some rows were computed exactly after the fact.
#
# Sampled: how often it holds
# ---------------------------
# The probability is over the rows that were drawn: with another seed others are. So
# it can be tested, by counting. Each of the 200 answers below has its own sample.

exact = fastattn.attention(query, key, value, method=fastattn.Exact(), rng=0)
size = np.linalg.norm(exact)
method = fastattn.Polynomial(rank=60)
found = [
    fastattn.approximate(query, key, value, tol=1.0, method=method, rng=seed)
    for seed in range(200)
]
measured = np.array([np.linalg.norm(x.value - exact) / size for x in found])
certified = np.array([x.certificate.error for x in found])
print(f"certificates that do not hold: {np.sum(measured > certified)} of {len(found)}")

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.hist(certified / measured, bins=30)
axes.axvline(1, color="k", linestyle=":")
axes.set(xlabel="certified over measured error", ylabel="answers")
plt.show()

# %%
# Left of the dotted line a certificate fails; that may happen to one in twenty. What is
# measured is a norm over the whole head. A sampled certificate says little of a single
# row: a row that was not drawn can be worse than all that were. For that the source has
# another sentence, about the share of rows that stay below the worst one seen.
#
# Proven: every row, before anything runs
# ---------------------------------------
# ``guarantee="proven"`` bounds the logits by the inputs' own extent and takes a
# polynomial whose relative error on that interval is known. The norm is ``max``, the
# largest absolute error of any entry, the tolerance is in units of half the range of
# the values, and nothing is left to chance.

small = rng.uniform(-1, 1, (3, n, 4))
proven = fastattn.approximate(*small, tol=1e-3, guarantee="proven")
print("ran    ", proven.plan.method)
print("error  ", f"{proven.certificate.error:.3g}")
print("failure", proven.certificate.failure)
print("norm   ", proven.certificate.norm)
print("source ", proven.certificate.source)

truth = fastattn.attention(*small, method=fastattn.Exact())
print("measured", f"{np.abs(proven.value - truth).max():.3g}")

# %%
# A bound for the worst case is often far above what happens. Rounding is part of it,
# so that exact attention has a proven certificate too, which is not zero:

own = fastattn.approximate(*small, method=fastattn.Exact(), guarantee="proven")
print(f"{own.certificate.error:.3g}", "|", own.certificate.source)

# %%
# Refused
# -------
# A method that is asked for by name and cannot keep the tolerance raises
# :class:`fastattn.RefusalError`, with the numbers. With ``method=None`` exact attention
# takes over instead.

try:
    fastattn.approximate(
        query, key, value, tol=1e-3, method=fastattn.Polynomial(), guarantee="proven"
    )
except fastattn.RefusalError as error:
    print(error)

# %%
# Batches and parts
# -----------------
# For a batch of heads the fields are arrays over its leading dimensions. Answers over
# disjoint sets of keys merge, and so do their certificates:

heads = fastattn.load_sample("minilm-mixed")
answer = fastattn.approximate(*heads, tol=1e-2, rng=0)
print("twelve heads:", answer.certificate.error.shape, answer.plan.shape)

halves = [
    fastattn.approximate(query, key[part], value[part], guarantee="proven")
    for part in (slice(0, n // 2), slice(n // 2, n))
]
merged = fastattn.merge_answers(halves)
print("merged:", f"{merged.certificate.error:.2g}", merged.certificate.norm)
