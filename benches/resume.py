"""Intermediate results, so that a run that was stopped continues.

Long studies store their rows in a part file. Whole studies are identified by the
command and by a digest of all code that their rows depend on.
"""

import ast
import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

# each is built on those before it
_STACK = ("sketching", "fastattn", "lowerbounds")


def recall(part: Path, code: str) -> dict:
    """Read the results of an earlier run of the same code."""
    if not part.exists():
        return {}
    return {tuple(x["key"]): x["trial"] for x in part_lines(part) if x["code"] == code}


def part_lines(part: Path) -> Iterator[dict]:
    """Yield the results of a part file, whatever their code."""
    for line in part.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # a run that was killed may have written half a line
            continue


def record(file, code: str, key: tuple, trial) -> None:
    """Append one result; it is on the disk when this returns."""
    file.write(json.dumps({"code": code, "key": key, "trial": trial}) + "\n")
    file.flush()


def fingerprint(*packages) -> str:
    """Digest of the sources of packages, which determine an answer."""
    return _digest(path for package in packages for path in _sources(package))


def code_of(module: str) -> str:
    """Digest of a module of ``benches`` and of all that it imports from here."""
    files, names = _closure(module)
    used = max((_STACK.index(name) for name in names), default=-1)
    packages = [importlib.import_module(name) for name in _STACK[: used + 1]]
    paths = [path for package in packages for path in _sources(package)]
    return _digest([*files, *paths])


def _closure(module: str) -> tuple[list[Path], set[str]]:
    """Files of benches that a module imports, and the packages that those import."""
    waiting, files, names = [module], {}, set()
    while waiting:
        name = waiting.pop()
        files[name] = Path(importlib.import_module(name).__file__)
        for found in _imported(files[name]):
            if found.startswith("benches."):
                waiting += [found] if found not in files else []
            elif found.partition(".")[0] in _STACK:
                names.add(found.partition(".")[0])
    return [files[name] for name in sorted(files)], names


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def _sources(package) -> list[Path]:
    return sorted(Path(package.__file__).parent.rglob("*.py"))


def _digest(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
