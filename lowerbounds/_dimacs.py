"""Formulas in the DIMACS format, compressed or not, read line by line.

Compressed files may hold far more than their size says: reading stops where a line or a
formula grows beyond what any instance can be made of.
"""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

# characters that a line may have
_LONGEST = 1 << 22
_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# what a message says of files that are not read
_OTHERS = {
    b"PK\x03\x04": "compressed by zip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x1f\x9d": "compressed by compress",
    b"7z\xbc\xaf\x27\x1c": "compressed by 7-Zip",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"aag ": "a circuit in the AIGER format",
    b"aig ": "a circuit in the AIGER format",
}
_MARK = "\ufeff"
_LITERAL = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


def read_dimacs(path: Path) -> Iterator[list[int]]:
    """Yield the clauses of a file in the DIMACS format, or raise ``ValueError``."""
    clause: list[int] = []
    header: tuple[int, int] | None = None
    found = 0
    for number, line in _lines(path):
        words = line.split()
        # solvers take a line for a comment by its first letter alone
        if not words or words[0].startswith("c"):
            continue
        # the files of SATLIB end with a line of a percent sign
        if words[0] == "%":
            break
        if words[0] == "p":
            header = _header(path, number, words, header)
            continue
        for literal in _literals(path, number, words, header):
            if literal:
                clause.append(literal)
                continue
            found += 1
            if header and found > header[1]:
                raise ValueError(
                    f"{path}, line {number}: expected {header[1]} clauses, got more"
                )
            yield clause
            clause = []
    if header is None:
        raise ValueError(f"{path}: expected a line 'p cnf VARIABLES CLAUSES', got none")
    if clause:
        raise ValueError(
            f"{path}: the last clause, {_brief(str(clause))}, does not end with 0"
        )
    if found != header[1]:
        raise ValueError(f"{path}: expected {header[1]} clauses, got {found}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers; a mark of the encoding is left out.

    Errors of a decompressor are reported in one line.
    """
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        for magic, what in _OTHERS.items():
            if start.startswith(magic):
                raise ValueError(
                    f"{path}: expected text in the DIMACS format, plain or compressed "
                    f"by gzip, bzip2 or xz, got {what}"
                )
        openers = [f for magic, f in _OPENERS.items() if start.startswith(magic)]
        if not openers:
            yield from _numbered(path, file)
            return
        try:
            with openers[0](file) as unpacked:
                yield from _numbered(path, unpacked)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(
                f"{path}: the compressed file is damaged: {error}"
            ) from error


def _numbered(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    for number in count(1):
        line = file.readline(_LONGEST)
        if not line:
            return
        if len(line) == _LONGEST:
            raise ValueError(
                f"{path}, line {number}: expected fewer than {_LONGEST} characters"
            )
        text = line.decode("utf-8", errors="replace")
        # files of DOS end with the control character 26
        yield number, text.removeprefix(_MARK if number == 1 else "").rstrip("\x1a")


def _header(
    path: Path, number: int, words: list[str], before: tuple[int, int] | None
) -> tuple[int, int]:
    sizes = words[2:]
    good = words[:2] == ["p", "cnf"] and len(sizes) == 2
    if before is not None or not (good and all(map(_LITERAL.fullmatch, sizes))):
        kind = {
            "cnf+": "; cardinality constraints are not read: encode them as clauses",
            "wcnf": "; weighted clauses are not read",
        }
        more = kind.get(words[1], "") if len(words) > 1 else ""
        raise ValueError(
            f"{path}, line {number}: expected one line 'p cnf VARIABLES CLAUSES', got "
            f"{_brief(' '.join(words))!r}{more}"
        )
    variables, clauses = (int(x) for x in sizes)
    if min(variables, clauses) < 0:
        raise ValueError(
            f"{path}, line {number}: expected numbers >= 0, got {' '.join(sizes)}"
        )
    return variables, clauses


def _literals(
    path: Path, number: int, words: list[str], header: tuple[int, int] | None
) -> list[int]:
    """Read the literals of one line, 0 where a clause ends."""
    if not all(map(_LITERAL.fullmatch, words)):
        raise ValueError(
            f"{path}, line {number}: expected integers, got "
            f"{_brief(' '.join(words[:50]))!r}"
        )
    if header is None:
        raise ValueError(
            f"{path}, line {number}: expected 'p cnf VARIABLES CLAUSES' first"
        )
    literals = [int(word) for word in words]
    for literal in literals:
        if abs(literal) > header[0]:
            raise ValueError(
                f"{path}, line {number}: literal {literal} with {header[0]} variables"
            )
    return literals


def _brief(text: str) -> str:
    """Cut off what would not fit on a line."""
    return text if len(text) <= 60 else text[:57] + "..."
