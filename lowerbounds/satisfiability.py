"""Satisfiability as orthogonal vectors: split the variables, list the assignments.

Each part of the variables becomes a set of vectors, one for each assignment of them,
with one coordinate for each clause: 1 if the assignment leaves the clause unsatisfied.
A tuple of assignments satisfies the formula if every clause is satisfied by one of
them, so if its vectors are orthogonal.
"""

import numbers
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowerbounds._dimacs import read_dimacs
from lowerbounds._instance import VectorInstance
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_integer, check_number

# bits that one set of vectors may have
_MOST_BITS = 1 << 28
# literals that are read: a formula of more is too large, or repeats its clauses
_MOST_LITERALS = 1 << 23
# constraints of formulas of python-sat in addition to their clauses
_BESIDE = ("atmosts", "atms", "xors", "soft")


def from_cnf(clauses_or_path: Any, parts: int = 2) -> VectorInstance:
    r"""Turn a formula in conjunctive normal form into orthogonal vectors.

    With v variables there are :math:`2^{v/k}` vectors in each of the k sets. An
    algorithm for k-orthogonal vectors in time :math:`n^{k-\varepsilon}` would decide
    the formula in time :math:`2^{(1-\varepsilon/k) v}`: this is why orthogonal
    vectors are believed to be hard.

    Parameters
    ----------
    clauses_or_path : str, PathLike, formula or iterable of iterable of int
        A file in the DIMACS format, plain or compressed by gzip, bzip2 or xz, a
        formula of python-sat (an object with ``clauses``), or clauses as lists of
        literals: v for variable v, -v for its negation.
    parts : int
        The number of sets, :math:`k`.

    Returns
    -------
    VectorInstance
        The vectors. ``has_solution`` says whether the formula can be satisfied: it is
        computed at first access, by enumeration of all :math:`2^v` tuples. Row ``i`` of
        a set is the assignment of its variables that the binary digits of ``i`` spell,
        the first variable leading.

    Raises
    ------
    ValueError
        If the file or a clause cannot be read, or if a formula has constraints
        besides its clauses, such as the cardinalities of a ``CNFPlus``.
    RefusalError
        If the vectors would be too many for memory.

    References
    ----------
    R. Williams, A new algorithm for optimal 2-constraint satisfaction and its
    implications, Theoretical Computer Science 348, 2005.

    Examples
    --------
    >>> from lowerbounds import from_cnf
    >>> instance = from_cnf([[1, 2], [-1, 3], [-2, -3], [1, -3]])
    >>> [x.shape for x in instance.vectors], instance.has_solution
    ([(4, 4), (2, 4)], True)
    """
    parts = check_integer("parts", parts, least=2)
    clauses = _limited(_clauses_of(clauses_or_path))
    # variables without a clause would only double the number of vectors
    variables = sorted({abs(literal) for clause in clauses for literal in clause})
    split = [x.tolist() for x in np.array_split(np.array(variables, int), parts)]
    _check_size(len(variables), len(split[0]), max(1, len(clauses)), parts)
    return VectorInstance.from_vectors(*(_unsatisfied(x, clauses) for x in split))


def random_formula(
    variables: int,
    *,
    width: int = 3,
    ratio: float = 4.27,
    rng: RandomSource = None,
) -> list[list[int]]:
    """Draw clauses of different variables, each negated with probability 1/2.

    Parameters
    ----------
    variables : int
        The number of variables.
    width : int
        Variables in a clause, or all where there are fewer.
    ratio : float
        Clauses over variables. At 4.27 large formulas of width 3 go from nearly always
        to nearly never satisfiable, and are hardest to decide.
    rng : int, Generator or None
        The source of randomness.

    Returns
    -------
    list of list of int
        The clauses, as `from_cnf` takes them.

    Examples
    --------
    >>> from lowerbounds import from_cnf, random_formula
    >>> clauses = random_formula(12, rng=0)
    >>> len(clauses), from_cnf(clauses).has_solution
    (51, True)
    """
    variables = check_integer("variables", variables, least=1)
    width = min(check_integer("width", width, least=1), variables)
    count = round(check_number("ratio", ratio, above=0) * variables)
    rng = as_generator(rng)
    clauses = []
    for _ in range(count):
        chosen = rng.choice(variables, width, replace=False) + 1
        clauses.append((chosen * rng.choice([-1, 1], width)).tolist())
    return clauses


def _limited(clauses: Iterable[list[int]]) -> list[list[int]]:
    """Collect the clauses; a file may hold more than memory."""
    found, literals = [], 0
    for clause in clauses:
        found.append(clause)
        literals += 1 + len(clause)
        if literals > _MOST_LITERALS:
            raise RefusalError(
                f"the formula has more than {_MOST_LITERALS} literals: its vectors "
                "cannot be written down"
            )
    return found


def _check_size(variables: int, most: int, clauses: int, parts: int) -> None:
    if most + clauses.bit_length() > _MOST_BITS.bit_length():
        raise RefusalError(
            f"{variables} variables in {parts} parts make 2^{most} vectors of "
            f"{clauses} coordinates: take more parts, or a smaller formula"
        )


def _unsatisfied(variables: list[int], clauses: list[list[int]]) -> Array:
    """Which clauses each assignment of the variables leaves unsatisfied."""
    last = len(variables) - 1
    shifts = {variable: last - j for j, variable in enumerate(variables)}
    rows = np.arange(1 << len(variables), dtype=np.int32)
    left = np.ones((len(rows), max(1, len(clauses))), dtype=np.uint8)
    if not clauses:
        # nothing can be left unsatisfied
        left[:] = 0
    for c, clause in enumerate(clauses):
        for literal in clause:
            if abs(literal) in shifts:
                bits = rows >> shifts[abs(literal)] & 1
                left[bits == (literal > 0), c] = 0
    return left


def _clauses_of(given: Any) -> Iterator[list[int]]:
    if isinstance(given, (str, os.PathLike)):
        return read_dimacs(Path(given))
    for name in _BESIDE:
        if name in vars(type(given)) or name in getattr(given, "__dict__", {}):
            more = getattr(given, name)
            if more:
                raise ValueError(
                    f"clauses_or_path: {type(given).__name__} has {len(more)} "
                    f"constraints in {name} as well: encode them as clauses "
                    "first (pysat.card, pysat.pb)"
                )
    # formulas of python-sat that are no clauses become clauses when they are iterated
    # over
    clauses = given if hasattr(given, "clausify") else getattr(given, "clauses", given)
    if not isinstance(clauses, Iterable):
        raise TypeError(
            "clauses_or_path: expected a path, a formula or clauses, got "
            f"{type(given).__name__}"
        )
    return _checked(clauses)


def _checked(clauses: Iterable[Any]) -> Iterator[list[int]]:
    """Yield clauses given as lists of literals."""
    for number, clause in enumerate(clauses):
        literals: list[Any] = [None]
        if isinstance(clause, Iterable):
            literals = list(clause)
        for x in literals:
            if isinstance(x, bool) or not isinstance(x, numbers.Integral) or x == 0:
                raise ValueError(
                    f"clause {number}: expected integers other than 0, got {clause!r}"
                )
        yield [int(x) for x in literals]
