"""
Attention to a tolerance
========================

The main job: choose an error, get attention within that error, and see the cost.
"""

# %%
# One head, one tolerance
# -----------------------
# Inputs have the shapes of scaled_dot_product_attention, ``(..., n, d)``. Here is one
# head of 16384 queries and keys whose logits have a standard deviation of about 0.3.

import time

import matplotlib.pyplot as plt
import numpy as np

import fastattn

rng = np.random.default_rng(0)
n, d = 16384, 64
query, key, value = rng.standard_normal((3, n, d)).astype(np.float32)
query, key = 0.55 * query, 0.55 * key

answer = fastattn.approximate(query, key, value, tol=3e-2, rng=0)
print("shape    ", answer.value.shape)
print("ran      ", answer.plan.method)
print("certified", f"{answer.certificate.error:.2e}")

# %%
# ``tol`` bounds the relative Frobenius error of the head: the norm of the difference to
# exact attention over the norm of exact attention. :func:`fastattn.attention` returns
# the array alone. Computing exact attention, which the certificate makes unnecessary,
# shows that the certificate is right:

exact = fastattn.attention(query, key, value, method=fastattn.Exact(), rng=0)
error = np.linalg.norm(answer.value - exact) / np.linalg.norm(exact)
print(f"measured {error:.2e}")

# %%
# Candidates
# ----------
# ``explain`` plans without computing the output. If the tolerance is too small for
# every approximation, exact attention runs, and the table gives the reason.

for tol in (3e-2, 3e-3):
    print(f"tol = {tol:g}")
    print(fastattn.explain(query, key, value, tol=tol, rng=0), end="\n\n")

# %%
# The cost of a tolerance
# -----------------------
# Time over the time of exact attention, the best of three calls, on the machine that
# built these pages. A larger tolerance is cheaper, until planning and the certificate
# dominate.

tols = [0.3, 0.1, 0.05, 0.03, 0.02, 0.01]


def timed(**options):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = fastattn.approximate(query, key, value, rng=0, **options)
        times.append(time.perf_counter() - start)
    return min(times), answer


whole, _ = timed(method=fastattn.Exact())
shares, certified, measured = [], [], []
for tol in tols:
    seconds, answer = timed(tol=tol)
    shares.append(seconds / whole)
    certified.append(answer.certificate.error)
    measured.append(np.linalg.norm(answer.value - exact) / np.linalg.norm(exact))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.loglog(tols, tols, "k:", label="tolerance")
left.loglog(tols, certified, "o-", label="certified")
left.loglog(tols, np.maximum(measured, 1e-7), "s--", label="measured")
left.set(xlabel="tolerance", ylabel="relative error")
left.legend()
right.semilogx(tols, shares, "o-")
right.axhline(1, color="k", linestyle=":")
right.set(xlabel="tolerance", ylabel="time over exact attention", ylim=(0, None))
plt.show()

# %%
# A head without a low-rank approximation
# ---------------------------------------
# With keys in tight clusters, and each query attending to one cluster, attention is
# peaked. Then a method runs that evaluates the near field exactly and the far field by
# clusters.

groups = rng.standard_normal((64, d))
near = groups[rng.integers(64, size=n)] + 0.25 * rng.standard_normal((n, d))
asks = groups[rng.integers(64, size=n)] + 0.2 * rng.standard_normal((n, d))
sharp = [x.astype(np.float32) for x in (1.5 * asks, 1.2 * near, value)]
answer = fastattn.approximate(*sharp, tol=3e-2, rng=0)
print("ran      ", answer.plan.method)
print("certified", f"{answer.certificate.error:.2e}")

# %%
# Short heads, and heads for which no approximation is both accurate and faster, use
# exact attention: the packaged heads of a sentence encoder have 2048 rows.

query, key, value = fastattn.load_sample("minilm-sharp")
answer = fastattn.approximate(query, key, value, tol=1e-2, rng=0)
for head, plan in enumerate(answer.plan):
    print(head, plan.method, "-", plan.reason)
