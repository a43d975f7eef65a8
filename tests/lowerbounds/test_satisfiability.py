"""Formulas as orthogonal vectors, against a solver."""

import itertools

import numpy as np
import pytest

from fastattn import RefusalError
from lowerbounds import from_cnf, random_formula
from tests.lowerbounds.formulas import families, solve


@pytest.mark.parametrize("parts", [2, 3])
def test_random_formulas_are_answered_as_by_a_solver(parts):
    answers = []
    for seed in range(40):
        clauses = random_formula(12, rng=seed)
        answers.append(from_cnf(clauses, parts).has_solution)
        assert answers[-1] is solve(clauses)
    # the ratio of clauses to variables is where both answers are common
    assert 5 < sum(answers) < 35


def test_random_clauses_have_different_variables():
    clauses = random_formula(9, width=4, ratio=20, rng=1)
    assert len(clauses) == 180
    for clause in clauses:
        assert len({abs(x) for x in clause}) == 4
    literals = np.array(clauses).ravel()
    assert set(np.abs(literals)) == set(range(1, 10))
    assert abs(np.sign(literals).mean()) < 5 / np.sqrt(literals.size)
    # no clause has more variables than there are
    assert all(len(x) == 2 for x in random_formula(2, rng=0))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_families_are_answered_as_by_a_solver(parts):
    found = families()
    for formula in found.values():
        assert from_cnf(formula, parts).has_solution is solve(formula.clauses)
    assert {"pigeonhole-3", "ordering-3", "parity-1", "chessboard-2"} <= set(found)


def test_rows_spell_their_assignments():
    clauses = random_formula(7, rng=0, ratio=3)
    left, right = from_cnf(clauses).vectors
    assert (left.shape, right.shape) == ((16, 21), (8, 21))
    for i, bits in enumerate(itertools.product((0, 1), repeat=7)):
        met = left[i // 8] & right[i % 8]
        unsatisfied = [
            all(bits[abs(x) - 1] != (x > 0) for x in clause) for clause in clauses
        ]
        np.testing.assert_array_equal(met, unsatisfied)


@pytest.mark.parametrize(
    ("clauses", "shapes", "truth"),
    [
        ([], [(1, 1), (1, 1)], True),
        ([[]], [(1, 1), (1, 1)], False),
        ([[5]], [(2, 1), (1, 1)], True),
        ([[5], [-5]], [(2, 2), (1, 2)], False),
        ([[1, -1]], [(2, 1), (1, 1)], True),
        # the variables between the two are in no clause
        ([[1, 100]], [(2, 1), (2, 1)], True),
    ],
)
def test_small_formulas(clauses, shapes, truth):
    instance = from_cnf(clauses)
    assert [x.shape for x in instance.vectors] == shapes
    assert instance.has_solution is truth


def test_files_lists_and_formulas_are_the_same(tmp_path):
    formula = families()["pigeonhole-2"]
    path = tmp_path / "formula.cnf"
    formula.to_file(str(path))
    want = from_cnf(formula.clauses)
    for given in (formula, path, str(path), map(tuple, formula.clauses)):
        got = from_cnf(given)
        for a, b in zip(got.vectors, want.vectors, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_file_may_have_comments_and_break_its_lines(tmp_path):
    path = tmp_path / "formula.cnf"
    path.write_text("c a comment\n\np cnf 3 2\n1 -2\n 3 0 -1\n0\n%\n0\n")
    want = from_cnf([[1, -2, 3], [-1]])
    for a, b in zip(from_cnf(path).vectors, want.vectors, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got none"),
        ("1 2 0\n", "line 1: expected 'p cnf"),
        ("p cnf 2\n1 0\n", "line 1: expected one line 'p cnf"),
        ("p wcnf 2 1\n1 0\n", "line 1"),
        ("p cnf 2 1\np cnf 2 1\n", "line 2: expected one line"),
        ("p cnf 2 1\n1 x 0\n", "line 2: expected integers, got '1 x 0'"),
        ("p cnf 2 1\n1 3 0\n", "line 2: literal 3 with 2 variables"),
        ("p cnf 2 1\n1 2\n", r"\[1, 2\], does not end with 0"),
        ("p cnf 2 2\n1 2 0\n", "expected 2 clauses, got 1"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "formula.cnf"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        from_cnf(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("clause", [[1, 0], [1.5], [True], ["1"], 3, [None]])
def test_a_bad_clause_is_named(clause):
    with pytest.raises(ValueError, match="clause 1: expected integers other than 0"):
        from_cnf([[1, 2], clause])


def test_what_is_no_formula_is_named():
    with pytest.raises(TypeError, match="got int"):
        from_cnf(3)
    with pytest.raises(FileNotFoundError):
        from_cnf("no such file")


def test_a_formula_that_would_not_fit_is_refused():
    clauses = [[v, v + 1] for v in range(1, 80)]
    with pytest.raises(RefusalError, match=r"80 variables in 2 parts make 2\^40"):
        from_cnf(clauses)
