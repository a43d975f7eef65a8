"""
Hard instances
==============

Fast attention cannot be right on all inputs, if satisfiability is as hard as is
believed. This page makes inputs on which it matters, and lets methods try.
"""

# %%
# A question about vectors becomes an attention
# ---------------------------------------------
# Are there a row of the one set and a row of the other that are orthogonal? For each
# instance the answer is known; :func:`lowerbounds.reduce_to_attention` makes queries,
# keys and values whose output is near 1 somewhere if there are, near 0 if not.

import matplotlib.pyplot as plt
import numpy as np

import fastattn
from lowerbounds import (
    at_allowed_error,
    audit_methods,
    decide,
    from_cnf,
    orthogonal_vectors,
    random_formula,
    reduce_to_attention,
    threshold_sweep,
)

n, d = 256, 60
pair = [orthogonal_vectors(n, d, planted=x, rng=0) for x in (True, False)]
for instance in pair:
    made = reduce_to_attention(instance)
    output = fastattn.attention(
        *made.arguments, scale=made.scale, method=fastattn.Exact()
    )
    print(
        f"solution: {instance.has_solution!s:5}  largest output {output.max():.3f}  "
        f"entries up to {made.entry_bound:.1f}  error allowed {made.error:.2f}"
    )

# %%
# Satisfiability, by attention
# ----------------------------
# A formula splits into halves of its variables, each assignment of a half is a vector
# with a one for each clause it leaves open, and two orthogonal vectors satisfy all.

for seed in range(4):
    clauses = random_formula(12, ratio=5, rng=seed)
    instance = from_cnf(clauses)
    print(
        f"{len(clauses)} clauses, {len(instance.vectors[0])} assignments a half: "
        f"attention says {decide(instance)}, truth {instance.has_solution}"
    )

# %%
# Methods as deciders
# -------------------
# A method with a certificate may refuse, but may not be wrong inside it. One without a
# certificate answers something.


def linear(made):
    return fastattn.linear_attention(
        *made.arguments, scale=made.scale, feature_map=fastattn.EluPlusOne()
    )


methods = {
    "proven Auto": at_allowed_error(),
    "proven Polynomial": at_allowed_error(fastattn.Polynomial()),
    "sampled Multipole": at_allowed_error(fastattn.Multipole(), guarantee="sampled"),
    "linear, elu + 1": linear,
}
planted = [
    orthogonal_vectors(128, 50, planted=seed % 2 == 0, rng=seed) for seed in range(10)
]
print(f"{'method':18} right wrong refused")
for row in audit_methods(methods, {"planted": planted}):
    print(f"{row.method:18} {row.right:5} {row.wrong:5} {row.refused:7}")

# %%
# Where a low rank ends
# ---------------------
# As entries grow, the rank that an additive error of 0.01 takes passes n within a
# narrow range of entry bounds B, near a fixed multiple of the root of ln n. (The sizes
# here are small, and no picture of finite sizes proves a lower bound.)

sizes = (256, 1024)
rows = threshold_sweep(
    2,
    sizes=sizes,
    families=["bounded"],
    ratios=np.geomspace(0.3, 2, 12),
    errors=[0.01],
    largest_spectrum=256,
    rng=0,
)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for size in sizes:
    own = [row for row in rows if row.n == size]
    axes.semilogy(
        [x.ratio for x in own], [x.rank / size for x in own], "o-", label=size
    )
axes.axhline(1, color="k", linestyle=":")
axes.set(xlabel="B over the root of ln n", ylabel="rank over n", ylim=(1e-3, 1e3))
axes.legend(title="n")
plt.show()
