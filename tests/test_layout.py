"""Meta-tests: the shape of the house, read from its files."""

import ast
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn
import lowerbounds
import sketching
from sketching._lib.op import Op

ROOT = Path(__file__).parent.parent
PACKAGES = (sketching, fastattn, lowerbounds)
FOLDERS = ("sketching", "fastattn", "lowerbounds", "benches", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
# results of calls and errors: a user meets them in the examples of the calls
WITHOUT_EXAMPLES = {"Approximation", "Certificate", "Explanation", "RefusalError"}
HEAVY = ("numba", "scipy", "sklearn", "cupy", "matplotlib", "rich", "torch")


def label(path):
    return str(path.relative_to(ROOT))


@functools.cache
def text_of(path):
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path):
    return ast.parse(text_of(path))


def nothing(offenders):
    """Fail with every offender at once, if there is one."""
    assert not (found := list(offenders)), "\n".join(map(str, found))


def modules_of(package, under):
    """Every module of ``package.<under>``, without the kernels."""
    name = f"{package.__name__}.{under}"
    folder = Path(package.__file__).parent / under
    for found in pkgutil.iter_modules([str(folder)]):
        if not found.ispkg:
            yield importlib.import_module(f"{name}.{found.name}")


def ops():
    """Every op of every package with its module."""
    for package in PACKAGES:
        if (Path(package.__file__).parent / "_ops").is_dir():
            for module in modules_of(package, "_ops"):
                for value in vars(module).values():
                    if isinstance(value, Op) and value.__module__ == module.__name__:
                        yield value


def test_there_are_ops():
    names = {op.__name__ for op in ops()}
    assert {"attend", "monomials", "moments", "means"} <= names


def signature(arguments):
    """Names of the positional parameters, and of those by keyword only."""
    positional = [x.arg for x in (*arguments.posonlyargs, *arguments.args)]
    return positional, [x.arg for x in arguments.kwonlyargs]


def misfits(op, place):
    """What is wrong with the kernel of an op for a place."""
    # read, not imported: a kernel for the GPU cannot be imported without one
    package, _, module = op.__module__.rpartition(".")
    path = ROOT.joinpath(*package.split("."), place, f"{module}.py")
    if not path.is_file():
        yield f"{op.__name__} declares {place!r}: {label(path)} is missing"
        return
    kernels = [
        node
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef) and node.name == op.__name__
    ]
    if len(kernels) != 1:
        yield f"{label(path)} defines {op.__name__} {len(kernels)} times"
        return
    wanted = [], []
    for x in inspect.signature(op.reference).parameters.values():
        wanted[x.kind is x.KEYWORD_ONLY].append(x.name)
    got = signature(kernels[0].args)
    if got != wanted:
        yield f"{label(path)}: {op.__name__}{got}, its reference has {wanted}"


def test_every_place_has_a_kernel_with_the_parameters_of_the_reference():
    pairs = [(op, place) for op in ops() for place in op.places]
    assert len(pairs) > 50
    nothing(found for pair in pairs for found in misfits(*pair))


def strangers(path):
    """Public functions of a file of kernels that no op has declared."""
    module = importlib.import_module(
        ".".join((path.parent.parent / path.stem).relative_to(ROOT).parts)
    )
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            op = getattr(module, node.name, None)
            if not isinstance(op, Op) or path.parent.name not in op.places:
                yield f"{label(path)}: {node.name}"


def test_every_fast_kernel_belongs_to_an_op():
    # what kernels share has no reference: it must not define an op's name
    kernels = [
        path
        for path in SOURCES
        if path.parent.name in ("cpu", "gpu")
        and path.name != "__init__.py"
        and (path.parent.parent / path.name).exists()
    ]
    assert len(kernels) > 20
    nothing(found for path in kernels for found in strangers(path))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_exports_are_sorted_and_exist(package):
    names = getattr(package, "__all__", [])
    assert list(names) == sorted(names)
    assert all(hasattr(package, name) for name in names)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_public_name_is_exported(package):
    # names that are loaded on first use count as well
    for name in getattr(package, "__all__", []):
        getattr(package, name)
    defined = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
    }
    assert defined == set(getattr(package, "__all__", []))


def unexplained(package):
    """Exports without a docstring, or without an example in it."""
    for name in getattr(package, "__all__", []):
        text = inspect.getdoc(getattr(package, name)) or ""
        has_example = "\nExamples\n" in text and ">>> " in text
        if not text or not (has_example or name in WITHOUT_EXAMPLES):
            yield f"{package.__name__}.{name}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_export_is_explained_with_an_example(package):
    nothing(unexplained(package))


def test_files_are_short():
    nothing(label(x) for x in FILES if len(text_of(x).splitlines()) > 400)


def long_functions(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # a public docstring may be longer than the code
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            if node.end_lineno - start + 1 > 60:
                yield f"{label(path)}: {node.name}"


def test_functions_are_short():
    nothing(found for path in SOURCES for found in long_functions(path))


def test_files_are_named_after_their_subject():
    vague = {"utils", "core", "common", "helpers", "misc"}
    nothing(label(x) for x in FILES if x.stem.strip("_") in vague)


def test_modules_say_what_they_are_about():
    nothing(label(x) for x in FILES if text_of(x) and not ast.get_docstring(tree(x)))


def test_nothing_points_outside_the_repository():
    outside = "../" + "shared"
    nothing(label(x) for x in FILES if outside in text_of(x))


def swallowed(path):
    """Handlers of any exception, and those of all that do nothing."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            is_idle = all(isinstance(x, ast.Pass) for x in node.body)
            if not caught or (is_idle and caught in ("Exception", "BaseException")):
                yield f"{label(path)}, line {node.lineno}"


def test_no_exception_is_swallowed():
    nothing(found for path in FILES for found in swallowed(path))


def skipped_in_silence(path):
    """Marks and calls that skip a test, or let it fail, without a reason."""
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    called = {(x.func.lineno, x.func.col_offset) for x in calls}
    bare = "pytest.mark.skip", "pytest.mark.xfail"
    for node in calls:
        name, given = ast.unparse(node.func), {x.arg for x in node.keywords}
        # these take their reason first, the others by name only
        is_given = "reason" in given or (
            node.args and name in ("pytest.skip", "pytest.xfail", *bare)
        )
        skips = "pytest.mark.skipif", "pytest.importorskip"
        if name in ("pytest.skip", "pytest.xfail", *bare, *skips) and not is_given:
            yield f"{label(path)}, line {node.lineno}"
    for node in ast.walk(tree(path)):
        is_mark = isinstance(node, ast.Attribute) and ast.unparse(node) in bare
        if is_mark and (node.lineno, node.col_offset) not in called:
            yield f"{label(path)}, line {node.lineno}"


def test_no_test_is_skipped_without_a_reason():
    tests = [path for path in FILES if path not in SOURCES]
    nothing(found for path in tests for found in skipped_in_silence(path))


@pytest.mark.parametrize("package", [p.__name__ for p in PACKAGES])
def test_import_loads_nothing_heavy(package):
    script = (
        f"import {package}, sys; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == []
