"""Satisfiability decided by attention, exactly and by approximations.

The variables of a formula are split into parts, and every assignment of a part becomes
a vector: a one for each clause that it does not satisfy. Vectors, one of each part,
that are orthogonal satisfy the formula together. Attention decides whether they exist:
with a query for each vector of the first part and keys for those of the others, the
output is near 1 if there is a match, near 0 if not. Two parts are ordinary attention,
three tensor attention.

A method whose certificate is below the gap of the instance decides correctly; the
polynomial method, whose rank would have to be huge, refuses; linear attention, which
has no certificate, makes the same decision for satisfiable and unsatisfiable formulas.

    pip install 'fastattn[cli]'
    python examples/sat_by_attention.py [FORMULA.cnf]

Alman and Song, Fast Attention Requires Bounded Entries, arXiv 2302.13214.
"""

import sys
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

import fastattn
from lowerbounds import (
    AttentionInstance,
    VectorInstance,
    at_allowed_error,
    decide,
    from_cnf,
    random_formula,
    reduce_to_attention,
)
from sketching import RefusalError

VARIABLES, RATIO, FORMULAS = 12, 5.0, 12


def linear(made: AttentionInstance) -> np.ndarray:
    """Linear attention of the same inputs: an output without a certificate."""
    return fastattn.linear_attention(
        *made.arguments, scale=made.scale, feature_map=fastattn.EluPlusOne()
    )


METHODS: dict[str, Callable] = {
    "exact, certified": at_allowed_error(fastattn.Exact()),
    "picked by the library, certified": at_allowed_error(),
    "polynomial, certified": at_allowed_error(fastattn.Polynomial()),
    "linear attention, uncertified": linear,
}


def ask(method: Callable, made: AttentionInstance) -> bool | None:
    """The decision of a method, None if the method refuses."""
    try:
        output = method(made)
    except RefusalError:
        return None
    value = output.value if isinstance(output, fastattn.Approximation) else output
    return made.decide(value)


def count(
    instances: list[VectorInstance], method: Callable
) -> tuple[int, int, int, int]:
    """Count the right and wrong decisions, refusals and yes decisions of a method."""
    made = [reduce_to_attention(x) for x in instances]
    answers = [ask(method, x) for x in made]
    pairs = [(a, x.has_solution) for a, x in zip(answers, instances, strict=True)]
    right = sum(answer is truth for answer, truth in pairs)
    refused = sum(answer is None for answer in answers)
    return right, len(pairs) - right - refused, refused, sum(x is True for x in answers)


def solve(path: str) -> str:
    """Decide one formula of a file, by pairs and by triples."""
    pairs, triples = (from_cnf(path, parts=parts) for parts in (2, 3))
    answers = decide(pairs), decide(triples)
    return f"{path}: satisfiable by pairs: {answers[0]}, by triples: {answers[1]}"


def main(paths: list[str]) -> int:
    """Decide files, or random formulas; 0 if no method with a certificate errs."""
    console = Console()
    if paths:
        for path in paths:
            console.print(solve(path))
        return 0
    formulas = [random_formula(VARIABLES, ratio=RATIO, rng=i) for i in range(FORMULAS)]
    instances = [from_cnf(x) for x in formulas]
    satisfiable = sum(x.has_solution for x in instances)
    table = Table(
        title=f"{FORMULAS} formulas of {len(formulas[0])} clauses in {VARIABLES} "
        f"variables, {satisfiable} of them satisfiable"
    )
    for name in ("method", "right", "wrong", "refused", "says yes"):
        table.add_column(name, justify="left" if name == "method" else "right")
    wrong = {}
    for name, method in METHODS.items():
        counts = count(instances, method)
        wrong[name] = counts[1]
        table.add_row(name, *map(str, counts))
    console.print(table)
    triples = [decide(from_cnf(x, parts=3)) for x in formulas]
    agree = sum(a is x.has_solution for a, x in zip(triples, instances, strict=True))
    console.print(f"by triples, tensor attention: {agree} of {FORMULAS} right")
    certified = [n for name, n in wrong.items() if "uncertified" not in name]
    return 0 if agree == FORMULAS and not any(certified) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
