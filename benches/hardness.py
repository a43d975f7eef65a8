"""Reductions, audits of all methods, and decisions of a fixed rank."""

import functools
import math

import numpy as np

import fastattn
from benches.measure import missing
from lowerbounds import (
    amplify_gap,
    at_allowed_error,
    at_entry_bound,
    audit_methods,
    best_of_rank,
    decide,
    from_cnf,
    gap_inner_product,
    least_dimension,
    orthogonal_vectors,
    polynomial_within,
    random_formula,
    reduce_to_attention,
)

CONSTRUCTIONS = {
    "orthogonal": ("calibrated", "direct", "padded"),
    "gap": ("calibrated", "padded"),
}
SIZES = {2: 64, 3: 16, 4: 8}


def draw(problem: str, order: int, n: int, seed: int):
    """One instance; every other one has a planted solution."""
    planted = seed % 2 == 0
    if problem == "gap":
        return gap_inner_product(
            n, 128, parts=order, planted=planted, correlation=0.9, rng=seed
        )
    d = least_dimension(n, parts=order, expected=1e-3)
    return orthogonal_vectors(n, d, parts=order, planted=planted, rng=seed)


def exact(order: int):
    """Exact attention of the library for instances of an order."""
    call = fastattn.attention if order == 2 else fastattn.tensor_attention
    return functools.partial(call, method=fastattn.Exact())


def reductions(*, quick):
    """Every reduction at the entry bound it states, with exact attention.

    Half of the instances have a solution. `flipped`: answers that change when the
    stated additive error, and 4 times it, is added to all outputs against the answer.
    Where outputs underflow in floating point, attention is computed in
    logarithms. The last rows are random 3-SAT against a SAT solver.
    """
    rows = []
    for order, n in SIZES.items():
        for problem, constructions in CONSTRUCTIONS.items():
            for construction in constructions:
                made = [
                    reduce_to_attention(
                        draw(problem, order, n, seed), construction=construction
                    )
                    for seed in range(3 if quick else 200)
                ]
                rows.append(checked(problem, order, n, construction, made))
    if missing(("pysat",)):
        return [*rows, {"problem": "3-SAT: python-sat is not installed"}]
    return rows + [solved(order, 12, 6 if quick else 60) for order in (2, 3)]


def checked(problem: str, order: int, n: int, construction: str, made: list) -> dict:
    """Answers of exact attention, and with errors added."""
    underflows = made[0].log_threshold < -650
    right = flipped = flipped_by_4 = 0
    for x in made:
        truth = x.instance.has_solution
        against = -1 if truth else 1
        if underflows:
            # everything in units of the least output of a solution
            output = np.exp(x.log_output()[: x.rows] - x.log_yes).max()
            error = (1 - math.exp(x.log_no - x.log_yes)) * (0.5 - 1e-6)
            limit = math.exp(x.log_threshold - x.log_yes)
            answers = [output + t * against * error > limit for t in (0, 1, 4)]
        else:
            output = exact(order)(*x.arguments, scale=x.scale)
            answers = [x.decide(output + t * against * x.error) for t in (0, 1, 4)]
        right += bool(answers[0]) is truth
        flipped += bool(answers[1]) is not truth
        flipped_by_4 += bool(answers[2]) is not truth
    bound = np.mean([x.entry_bound for x in made])
    return {
        "problem": problem,
        "order": order,
        "n": n,
        "construction": construction,
        "computed": "in logarithms" if underflows else "in float64",
        "instances": len(made),
        "with a solution": sum(x.instance.has_solution for x in made),
        "right": right,
        "flipped by the error": flipped,
        "flipped by 4 times it": flipped_by_4,
        "entry bound": float(bound),
        "B / (ln n)^(1/k)": float(bound) / math.log(n) ** (1 / order),
        "log10 of the error": float(
            np.mean(
                [
                    x.log_yes + math.log(0.5 * -math.expm1(x.log_no - x.log_yes))
                    for x in made
                ]
            )
            / math.log(10)
        ),
    }


def solved(order: int, variables: int, count: int) -> dict:
    """Random 3-SAT through attention, against a solver."""
    from pysat.solvers import Solver

    right = satisfiable = 0
    bounds = []
    for seed in range(count):
        clauses = random_formula(variables, rng=seed)
        with Solver(name="cadical153", bootstrap_with=clauses) as solver:
            truth = bool(solver.solve())
        made = reduce_to_attention(from_cnf(clauses, order))
        right += decide(made, exact(order)) is truth
        satisfiable += truth
        bounds.append(made.entry_bound)
    n = 2 ** (variables / order)
    return {
        "problem": f"3-SAT, {variables} variables",
        "order": order,
        "n": round(n),
        "construction": "calibrated",
        "computed": "in float64",
        "instances": count,
        "with a solution": satisfiable,
        "right": right,
        "flipped by the error": "",
        "flipped by 4 times it": "",
        "entry bound": float(np.mean(bounds)),
        "B / (ln n)^(1/k)": float(np.mean(bounds)) / math.log(n) ** (1 / order),
        "log10 of the error": "",
    }


def linear(feature_map):
    """Attention of a feature map, without a tolerance."""

    def decider(made):
        return fastattn.linear_attention(
            *made.arguments, scale=made.scale, feature_map=feature_map
        )

    return decider


METHODS = {
    "Auto": None,
    "Exact": fastattn.Exact(),
    "Polynomial": fastattn.Polynomial(),
    "Multipole": fastattn.Multipole(),
    "RandomFeatures": fastattn.RandomFeatures(),
    "RandomMaclaurin": fastattn.RandomMaclaurin(),
    "Taylor": fastattn.Taylor(),
}
MAPS = {
    "EluPlusOne": fastattn.EluPlusOne(),
    "Relu": fastattn.Relu(),
    "Taylor": fastattn.Taylor(),
    "RandomFeatures": fastattn.RandomFeatures(),
    "PolySketch": fastattn.PolySketch(),
    "TensorSketch": fastattn.TensorSketch(),
}
PROVEN = {f"proven {name}": at_allowed_error(x) for name, x in METHODS.items()}
OTHERS = {
    f"sampled {name}": at_allowed_error(x, guarantee="sampled", tol=0.1)
    for name, x in METHODS.items()
}
OTHERS |= {f"linear {name}": linear(x) for name, x in MAPS.items()}
OTHERS["mean of the values"] = lambda made: np.full((len(made.query), 1), 0.5)
# methods that take tensor attention
OF_TENSORS = {
    name: (PROVEN | OTHERS)[name]
    for name in ("proven Auto", "proven Exact", "proven Polynomial", "sampled Auto")
}


def families(count: int) -> dict:
    """Pairs of every kind; ``tiny`` ones have logits small enough for polynomials."""
    tiny = [
        orthogonal_vectors(3, 2, planted=seed % 2 == 0, rng=seed)
        for seed in range(count)
    ]
    amplified = [
        gap
        for seed in range(count // 8)
        for gap in amplify_gap(
            orthogonal_vectors(16, 4, planted=seed % 2 == 0, rng=seed)
        )
    ]
    return {
        "planted": [draw("orthogonal", 2, 32, seed) for seed in range(count)],
        "tiny": tiny,
        "gap": [draw("gap", 2, 32, seed) for seed in range(count)],
        "amplified gap": amplified,
        "3-SAT": [from_cnf(random_formula(10, rng=seed)) for seed in range(count)],
    }


def audit(*, quick):
    """All methods as deciders: right, wrong and refused answers, and certificates.

    A proven method gets the error that the instance allows as tolerance. It may refuse,
    but its answers must be right (`certified and wrong` is 0) and as close to exact
    attention as certified (`beyond certificate` is 0). Methods without a certificate
    give the same answer whether there is a solution or not.
    """
    count = 4 if quick else 220
    pairs = families(count)
    tensors = {
        "planted, order 3": [draw("orthogonal", 3, 8, seed) for seed in range(count)],
        "tiny, order 3": [
            orthogonal_vectors(2, 2, parts=3, planted=seed % 2 == 0, rng=seed)
            for seed in range(count)
        ],
        "gap, order 3": [draw("gap", 3, 8, seed) for seed in range(count)],
    }
    direct = [reduce_to_attention(x, construction="direct") for x in pairs["tiny"]]
    rows = (
        audited(PROVEN | OTHERS, pairs)
        + audited(PROVEN, {"tiny, direct": direct})
        + audited(OF_TENSORS, tensors)
    )
    return totals(rows) + rows


def audited(methods: dict, instances: dict) -> list[dict]:
    """Rows of the table for each family and method."""
    return [
        {
            "family": row.family,
            "method": row.method,
            "instances": row.instances,
            "right": row.right,
            "wrong": row.wrong,
            "refused": row.refused,
            "certified": row.certified,
            "certified and wrong": row.certified_wrong,
            "beyond certificate": row.broken,
            "right among answers": row.accuracy,
        }
        for row in audit_methods(methods, instances)
    ]


def totals(rows: list[dict]) -> list[dict]:
    """Sums over all families, a row for each method."""
    found: dict[str, dict] = {}
    for row in rows:
        total = found.setdefault(row["method"], dict.fromkeys(row, 0))
        for name in row:
            if name not in ("family", "method"):
                total[name] += row[name]
        total |= {"family": "all", "method": row["method"]}
    for total in found.values():
        answers = total["right"] + total["wrong"]
        share = total["right"] / answers if answers else math.nan
        total["right among answers"] = share
    return list(found.values())


def decisions(*, quick):
    """Right answers of a fixed rank against the entry bound.

    The calibrated reductions, scaled to other entry bounds than the one they state.
    Exact attention decides once the entries are large enough. A polynomial with n, or
    n squared, monomials stays at chance: it cannot resolve the logits of large
    entries. The best matrix of rank n / 8 does as well as exact attention: it is
    built from all pairs, and shows that rank alone does not make these decisions hard.
    Where the padded key takes nearly all weight a matrix of low rank is enough, but
    to find it is to find the solution.
    """
    rows, count = [], 4 if quick else 40
    sizes = {2: 64, 3: 16} if quick else {2: 256, 3: 32}
    for order, n in sizes.items():
        methods = {
            "exact": lambda made: np.exp(made.log_output()),
            "polynomial, n monomials": polynomial_within(n),
            "polynomial, n^2 monomials": polynomial_within(n * n),
            "best of rank n / 8": best_of_rank(n // 8),
        }
        if order == 2:
            methods["RandomFeatures, n"] = linear(fastattn.RandomFeatures(size=n))
        families = {
            problem: [draw(problem, order, n, seed) for seed in range(count)]
            for problem in CONSTRUCTIONS
        }
        families["satisfiability"] = formulas(order, n, count)
        for family, instances in families.items():
            made = [reduce_to_attention(x) for x in instances]
            rows += shares(order, family, n, made, methods)
    return rows


def formulas(order: int, n: int, count: int) -> list:
    """Random 3-SAT with n assignments in each part, half of it satisfiable."""
    found: dict[bool, list] = {True: [], False: []}
    seed = 0
    while min(map(len, found.values())) < count // 2:
        instance = from_cnf(
            random_formula(order * (n.bit_length() - 1), rng=seed), order
        )
        found[instance.has_solution].append(instance)
        seed += 1
    return found[True][: count // 2] + found[False][: count // 2]


def shares(order: int, problem: str, n: int, made: list, methods: dict) -> list[dict]:
    """Share of right answers for each method, over a range of entry bounds."""
    unit = math.log(n) ** (1 / order)
    stated = float(np.mean([x.entry_bound for x in made]))
    factors = np.geomspace(0.15, 2, 12)
    found = {name: [] for name in methods}
    for factor in factors:
        scaled = [at_entry_bound(x, factor * x.entry_bound) for x in made]
        for row in audit_methods(methods, {problem: scaled}):
            found[row.method].append(row.right / row.instances)
    return [
        {
            "order": order,
            "family": problem,
            "n": n,
            "method": name,
            "instances": len(made),
            "stated": stated / unit,
            "right at half the stated bound": float(
                np.interp(math.log(0.5), np.log(factors), found[name])
            ),
            "right at the stated bound": float(
                np.interp(0.0, np.log(factors), found[name])
            ),
            "right at twice it": found[name][-1],
            "ratios": [float(x) * stated / unit for x in factors],
            "shares": found[name],
        }
        for name in methods
    ]
