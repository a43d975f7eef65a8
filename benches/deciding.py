"""Decisions of exact attention and of polynomials within a budget, up to large n."""

import math

import numpy as np

from benches.hardness import formulas
from lowerbounds import (
    gap_inner_product,
    least_dimension,
    orthogonal_vectors,
    reduce_to_attention,
)
from lowerbounds._factored import rank_of_degree
from lowerbounds._levels import Levels
from lowerbounds.budgets import degree_within

FAMILIES = ("gap", "planted", "satisfiability")
# coordinates of gap instances over ln n, as in the sweeps
_GAP_DIMENSION = 16
# entry bounds over the one that the reduction states
FACTORS = tuple(float(x) for x in np.geomspace(0.15, 2, 12))
# degrees among which the least one that decides is searched
_MOST = 1000


def instances(family: str, n: int, count: int) -> list:
    """Instances of order 2, half of them with a solution."""
    if family == "satisfiability":
        return formulas(2, n, count)
    found = []
    for seed in range(count):
        planted = seed % 2 == 0
        if family == "gap":
            d = _GAP_DIMENSION * math.ceil(math.log(n))
            found.append(gap_inner_product(n, d, planted=planted, rng=seed))
        else:
            d = least_dimension(n, expected=1e-3)
            found.append(orthogonal_vectors(n, d, planted=planted, rng=seed))
    return found


def decided(family: str, n: int, count: int) -> dict:
    """Share of right answers by method over the entry bound, and the monomials needed.

    The inputs are those of the calibrated reduction, scaled. `least` is the logarithm
    to base n of the least number of monomials from which on all answers are right at
    the stated entry bound.
    """
    unit = math.sqrt(math.log(n))
    right: dict[str, list] = {}
    stated, degrees, widths = [], [], []
    for instance in instances(family, n, count):
        made = reduce_to_attention(instance)
        levels, d = Levels.of(made), made.query.shape[1]
        budgets = {f"n^{p} monomials": degree_within(d, n**p) for p in (1, 2)}
        answers = {name: [] for name in ("exact", *budgets)}
        for factor in FACTORS:
            outputs = levels.polynomials(factor**2, max(budgets.values()))
            answers["exact"].append(is_right(made, levels.exact(factor**2)))
            for name, degree in budgets.items():
                answers[name].append(is_right(made, outputs[degree]))
        for name, some in answers.items():
            right.setdefault(name, []).append(some)
        outputs = levels.polynomials(1.0, _MOST)
        wrong = [i for i, x in enumerate(outputs) if not is_right(made, x)]
        degrees.append(max(wrong, default=-1) + 1)
        stated.append(made.entry_bound / unit)
        widths.append(d)
    rank = rank_of_degree(max(widths), max(degrees))
    return {
        "stated": float(np.mean(stated)),
        "shares": {name: np.mean(x, axis=0).tolist() for name, x in right.items()},
        "least": math.log(rank) / math.log(n) if max(degrees) <= _MOST else math.inf,
    }


def is_right(made, output) -> bool:
    """Whether an output decides right; one that is not finite does not."""
    finite = bool(np.isfinite(output).all())
    return finite and made.decide(output) is made.instance.has_solution
