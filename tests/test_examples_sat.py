"""The example of satisfiability: certified answers are a SAT solver's."""

import pytest

from lowerbounds import from_cnf, random_formula

EXAMPLE = "sat_by_attention"


def solver_says(clauses):
    solvers = pytest.importorskip("pysat.solvers", reason="python-sat is missing")
    with solvers.Minisat22(bootstrap_with=clauses) as solver:
        return solver.solve()


def test_certified_answers_are_those_of_a_solver(example):
    formulas = [random_formula(10, ratio=5, rng=seed) for seed in range(20, 30)]
    truths = [solver_says(x) for x in formulas]
    assert 0 < sum(truths) < len(truths)
    instances = [from_cnf(x) for x in formulas]
    assert [x.has_solution for x in instances] == truths
    for name, method in example.METHODS.items():
        right, wrong, refused, yes = example.count(instances, method)
        assert right + wrong + refused == len(formulas)
        if "uncertified" not in name:
            assert wrong == 0
            assert yes in (0, sum(truths))


def test_files_are_decided_by_pairs_and_by_triples(example, tmp_path, capsys):
    path = tmp_path / "unsatisfiable.cnf"
    path.write_text("p cnf 3 4\n1 0\n-1 2 0\n-2 3 0\n-3 -1 0\n")
    assert example.main([str(path)]) == 0
    words = capsys.readouterr().out.split()
    assert words[-4:] == ["False,", "by", "triples:", "False"]


def test_it_runs(example, capsys):
    assert example.main([]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 right" in out
