"""
Hard instances
==============

Fast attention cannot be accurate on all inputs, if satisfiability is as hard as is
conjectured. This page constructs hard inputs and runs several methods on them.
"""

# %%
# From orthogonal vectors to attention
# ------------------------------------
# The orthogonal vectors problem: does some vector of one set have inner product 0 with
# some vector of another set? For each instance the solution is known;
# :func:`lowerbounds.reduce_to_attention` returns queries, keys and values whose output
# has an entry near 1 if such a pair exists, and is near 0 everywhere if not.

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
# The variables of a formula are split into two halves. Each assignment of a half is a
# vector with a one for each clause that it does not satisfy, and two orthogonal vectors
# satisfy all clauses.

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
# A method with a certificate may refuse, but must not err by more than the certificate.
# A method without a certificate always returns an output, right or wrong.


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
# The rank threshold
# ------------------
# As entries grow, the rank needed for an additive error of 0.01 passes n within a
# narrow range of entry bounds B, near a fixed multiple of the square root of ln n. (The
# sizes here are small, and no plot of finite sizes proves a lower bound.)

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
