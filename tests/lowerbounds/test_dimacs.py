"""Files of formulas as they come: commented, compressed, marked, damaged."""

import bz2
import gzip
import lzma
import tracemalloc

import numpy as np
import pytest

from fastattn import RefusalError
from lowerbounds import VectorInstance, from_cnf, random_formula
from lowerbounds import _dimacs as dimacs

TEXT = b"p cnf 2 2\n1 2 0\n-1 0\n"
PACKERS = {"gz": gzip, "bz2": bz2, "xz": lzma}


def satisfiable(tmp_path, data):
    path = tmp_path / "x.cnf"
    path.write_bytes(data)
    return from_cnf(path).has_solution


def refused(tmp_path, data, kind=ValueError):
    with pytest.raises(kind) as caught:
        satisfiable(tmp_path, data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (b"p cnf 2 3\nc-1 -2 0\n-1 2 0\n1 -2 0\n1 2 0\n", True),
        (b"p cnf 2 4\nc comment\n-1 -2 0\n-1 2 0\n1 -2 0\n1 2 0\n", False),
        (b"cThis is a file\np cnf 1 1\n1 0\n", True),
        (b"c-------\n  c blank before it\np cnf 1 1\n1 0\n", True),
        (b"c \xff\xfe other encodings\np cnf 1 1\n1 0\n", True),
        (b"\xef\xbb\xbfp cnf 1 1\r\n1 0\r\n", True),
        (b"\xef\xbb\xbfc mark\np cnf 1 2\n1 0 -1 0\n", False),
        (b"p cnf 1 1\n+1 0\n\x1a", True),
        (b"p   cnf  1  1 \n1 0\n%\n0\n", True),
    ],
)
def test_files_are_read_as_solvers_read_them(tmp_path, text, truth):
    assert satisfiable(tmp_path, text) is truth


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read(tmp_path, suffix):
    path = tmp_path / f"x.cnf.{suffix}"
    path.write_bytes(PACKERS[suffix].compress(TEXT))
    want = from_cnf([[1, 2], [-1]])
    for a, b in zip(from_cnf(path).vectors, want.vectors, strict=True):
        np.testing.assert_array_equal(a, b)
    # the bytes say so, whatever the name
    assert satisfiable(tmp_path, path.read_bytes())


@pytest.mark.parametrize("suffix", PACKERS)
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    data = PACKERS[suffix].compress(TEXT)
    for bad in (data[:-3], data[: len(data) // 2], data[:20] + b"\xff" + data[21:]):
        message = refused(tmp_path, bad)
        assert "x.cnf" in message


def test_a_compressed_file_may_not_fill_memory(tmp_path):
    zeros = gzip.compress(bytes(1 << 27))
    clauses = gzip.compress(b"p cnf 2 99999999\n" + b"1 2 0\n" * (1 << 23))
    many = gzip.compress(b"p cnf 2 1\n" + b"1 2 0\n" * (1 << 23))
    for data, kind, says in (
        (zeros, ValueError, "line 1: expected fewer than"),
        (clauses, RefusalError, "more than 1000 literals"),
        (many, ValueError, "line 3: expected 1 clauses, got more"),
    ):
        tracemalloc.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lowerbounds.satisfiability._MOST_LITERALS", 1000)
            assert says in refused(tmp_path, data, kind)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\x03\x04rest", "compressed by zip"),
        (b"\x28\xb5\x2f\xfdrest", "compressed by zstd"),
        (TEXT.decode().encode("utf-16"), "UTF-16"),
        (b"aag 7 2 0 2 1\n", "AIGER"),
        (b"p cnf+ 2 1\n1 2 <= 1\n", "cardinality constraints are not read"),
        (b"p wcnf 2 1 9\n9 1 2 0\n", "weighted clauses are not read"),
        (b"p cnf 2 1\nx1 2 0\n", "line 2: expected integers, got 'x1 2 0'"),
        (b"p cnf 2 1\n1_0 0\n", "line 2: expected integers"),
        (b"p cnf 2 1\n" + b"9" * 9000 + b" 0\n", "line 2: expected integers"),
        (b"p cnf " + b"9" * 9000 + b" 1\n", "line 1: expected one line"),
        (b"p cnf -1 1\n", "line 1: expected numbers >= 0"),
        ("p cnf 2 1\n\u0661 0\n".encode(), "line 2: expected integers"),
        (b"p cnf 2 1\n1 2 0\n1 0\n", "line 3: expected 1 clauses, got more"),
    ],
)
def test_other_formats_are_named(tmp_path, data, says):
    assert says in refused(tmp_path, data)


class Formula:
    clauses = ((1, 2),)


@pytest.mark.parametrize("name", ["atmosts", "atms", "xors", "soft"])
def test_constraints_beside_the_clauses_are_refused(name):
    formula = Formula()
    setattr(formula, name, [])
    assert from_cnf(formula).has_solution
    setattr(formula, name, [[[1, 2], 0]])
    with pytest.raises(ValueError, match=rf"Formula has 1 constraints in {name}"):
        from_cnf(formula)


def test_formulas_of_python_sat_are_taken_whole():
    formulas = pytest.importorskip("pysat.formula", reason="python-sat is missing")
    plus = formulas.CNFPlus()
    plus.append([1, 2])
    assert from_cnf(plus).has_solution
    plus.append([[1, 2], 0], is_atmost=True)
    with pytest.raises(ValueError, match="CNFPlus has 1 constraints in atmosts"):
        from_cnf(plus)
    # its clauses are there only once somebody has gone through it
    a, b = formulas.Atom("a"), formulas.Atom("b")
    both = formulas.And(formulas.Or(a, b), formulas.Neg(a), formulas.Neg(b))
    assert not from_cnf(both).has_solution


def test_the_answer_is_found_when_it_is_asked_for(monkeypatch):
    asked = []

    def least(vectors):
        asked.append(vectors)
        return 0

    monkeypatch.setattr("lowerbounds._instance.least_product", least)
    instance = from_cnf(random_formula(36, rng=0))
    assert [len(x) for x in instance.vectors] == [1 << 18] * 2
    assert "262144 x 262144" in repr(instance)
    assert not asked
    assert instance.has_solution is True
    assert instance.has_solution is True
    assert len(asked) == 1


def test_an_answer_that_is_given_is_not_looked_for():
    one = np.ones((2, 3), np.uint8)
    for answer in (True, False):
        assert VectorInstance((one, one), None, answer).has_solution is answer
        made = VectorInstance(vectors=(one, one), planted=None, has_solution=answer)
        assert made.has_solution is answer
    with pytest.raises(AttributeError):
        made.has_solution = True


def test_few_long_clauses_over_many_variables_take_little_beside_their_vectors():
    clauses = [list(range(1, 23))]
    tracemalloc.start()
    instance = from_cnf(clauses, parts=2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(x.nbytes for x in instance.vectors)
    assert most < 64 * held
    assert dimacs._brief("x" * 100) == "x" * 57 + "..."
