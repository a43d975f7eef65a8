"""
Reading a certificate
=====================

Every output carries a bound on its error. This page explains one: which error the
certificate bounds, its source, and what it does not cover.
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
# This means ``norm(answer - truth) <= error``, except with probability ``failure``.
# Here the norm is ``relative-frobenius``, the Frobenius norm of the difference over
# that of the exact output of the head. The source says that some rows were computed
# exactly after the output.
#
# Sampled: how often the bound holds
# ----------------------------------
# The probability is over the random draw of the rows, which the seed determines. So it
# can be tested by counting. Each of the 200 outputs below has its own sample.

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
# Left of the dotted line a certificate fails; one in twenty may. The error is a norm
# over the whole head. A sampled certificate says little about a single row: a row that
# was not drawn can have a larger error than all rows drawn. For single rows the source
# has a second statement: the share of rows whose error is at most the largest error
# drawn.
#
# Proven: every row, before anything runs
# ---------------------------------------
# ``guarantee="proven"`` bounds the logits by the norms of the inputs and uses a
# polynomial with a known relative error on that interval. The norm is ``max``, the
# largest absolute error of any entry; the tolerance is in units of half the range of
# the values; the failure probability is 0.

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
# A worst-case bound is often far above the actual error. The bound includes rounding,
# so that exact attention also has a proven certificate with a nonzero error:

own = fastattn.approximate(*small, method=fastattn.Exact(), guarantee="proven")
print(f"{own.certificate.error:.3g}", "|", own.certificate.source)

# %%
# Refusals
# --------
# A method that is requested by name and cannot meet the tolerance raises
# :class:`fastattn.RefusalError`, with the numbers. With ``method=None`` exact attention
# runs instead.

try:
    fastattn.approximate(
        query, key, value, tol=1e-3, method=fastattn.Polynomial(), guarantee="proven"
    )
except fastattn.RefusalError as error:
    print(error)

# %%
# Batches and merging
# -------------------
# For a batch of heads the fields are arrays over its leading dimensions. Outputs over
# disjoint sets of keys can be merged, and so can their certificates:

heads = fastattn.load_sample("minilm-mixed")
answer = fastattn.approximate(*heads, tol=1e-2, rng=0)
print("twelve heads:", answer.certificate.error.shape, answer.plan.shape)

halves = [
    fastattn.approximate(query, key[part], value[part], guarantee="proven")
    for part in (slice(0, n // 2), slice(n // 2, n))
]
merged = fastattn.merge_answers(halves)
print("merged:", f"{merged.certificate.error:.2g}", merged.certificate.norm)
