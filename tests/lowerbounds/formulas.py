"""Formulas of few variables, and the answers of a solver."""

import pytest


def solve(clauses):
    """Whether a solver can satisfy the formula."""
    solvers = pytest.importorskip("pysat.solvers", reason="python-sat is not installed")
    with solvers.Solver(name="cadical153", bootstrap_with=clauses) as solver:
        return bool(solver.solve())


def families():
    """Small formulas of the families that python-sat can write."""
    hard = pytest.importorskip(
        "pysat.examples.genhard", reason="python-sat is not installed"
    )
    made = {f"pigeonhole-{n}": hard.PHP(nof_holes=n) for n in (1, 2, 3)}
    made |= {f"ordering-{n}": hard.GT(size=n) for n in (2, 3, 4)}
    made |= {f"parity-{n}": hard.PAR(size=n) for n in (1, 2)}
    made |= {f"chessboard-{n}": hard.CB(size=n) for n in (1, 2)}
    return {name: formula for name, formula in made.items() if formula.nv <= 20}
