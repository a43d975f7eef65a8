"""Meta-tests: the shape of the house, read from its files."""

import ast
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


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_of(package, under):
    """Every module of ``package.<under>``, the fast bodies left out."""
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


PLACES = [
    pytest.param(op, place, id=f"{op.__module__}.{op.__name__}-{place}")
    for op in ops()
    for place in op.places
]


def test_there_are_ops():
    names = {op.__name__ for op in ops()}
    assert {"attend", "monomials", "moments", "means"} <= names


@pytest.mark.parametrize(("op", "place"), PLACES)
def test_every_place_has_a_body_with_the_parameters_of_the_reference(op, place):
    # read, not imported: a body for the GPU cannot be imported without one
    package, _, module = op.__module__.rpartition(".")
    path = ROOT.joinpath(*package.split("."), place, f"{module}.py")
    assert path.is_file(), f"{op.__name__} declares {place!r}: {label(path)} is missing"
    bodies = [
        node
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef) and node.name == op.__name__
    ]
    assert len(bodies) == 1
    wanted = inspect.signature(op.reference).parameters.values()
    arguments = bodies[0].args
    got = [x.arg for x in (*arguments.posonlyargs, *arguments.args)]
    assert got == [x.name for x in wanted if x.kind is not x.KEYWORD_ONLY]
    got = [x.arg for x in arguments.kwonlyargs]
    assert got == [x.name for x in wanted if x.kind is x.KEYWORD_ONLY]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parent.name in ("cpu", "gpu")], ids=label
)
def test_every_fast_body_belongs_to_an_op(path):
    reference = path.parent.parent / path.name
    if path.name == "__init__.py" or not reference.exists():
        # what bodies share has no reference: it must not define an op's name
        return
    module = importlib.import_module(
        ".".join(reference.relative_to(ROOT).with_suffix("").parts)
    )
    public = [
        node.name
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    for name in public:
        op = getattr(module, name)
        assert isinstance(op, Op)
        assert path.parent.name in op.places


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


EXPORTS = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package in PACKAGES
    for name in getattr(package, "__all__", [])
]


@pytest.mark.parametrize("export", EXPORTS)
def test_every_export_is_explained_with_an_example(export):
    text = inspect.getdoc(export)
    assert text
    if export.__name__ not in WITHOUT_EXAMPLES:
        assert "\nExamples\n" in text
        assert ">>> " in text


@pytest.mark.parametrize("path", FILES, ids=label)
def test_file_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # a public docstring may be longer than the code
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            assert node.end_lineno - start + 1 <= 60, node.name


@pytest.mark.parametrize("path", FILES, ids=label)
def test_file_is_named_after_its_subject(path):
    assert path.stem.strip("_") not in {"utils", "core", "common", "helpers", "misc"}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_module_says_what_it_is_about(path):
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_points_outside_the_repository(path):
    outside = "../" + "shared"
    assert outside not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_exception_is_swallowed(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if all(isinstance(x, ast.Pass) for x in node.body):
                assert caught not in ("", "Exception", "BaseException"), node.lineno
            assert caught, f"line {node.lineno}"


@pytest.mark.parametrize("path", [p for p in FILES if p not in SOURCES], ids=label)
def test_no_test_is_skipped_without_a_reason(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {x.arg for x in node.keywords}
            if name in ("pytest.skip", "pytest.xfail"):
                assert node.args or "reason" in given, node.lineno
            elif name in ("pytest.mark.skipif", "pytest.importorskip"):
                assert "reason" in given, node.lineno
            elif name in ("pytest.mark.skip", "pytest.mark.xfail"):
                assert node.args or "reason" in given, node.lineno
        elif isinstance(node, ast.Attribute):
            bare = ast.unparse(node) in ("pytest.mark.skip", "pytest.mark.xfail")
            assert not bare or _is_called(path, node), node.lineno


def _is_called(path, attribute):
    return any(
        isinstance(node, ast.Call)
        and (node.func.lineno, node.func.col_offset)
        == (attribute.lineno, attribute.col_offset)
        for node in ast.walk(tree(path))
    )


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


def imported_in(package):
    """Seconds that importing a package adds to NumPy's own, least of five."""
    script = (
        "import numpy, time; start = time.perf_counter(); "
        f"import {package}; print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", script]
    return min(
        float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
        for _ in range(5)
    )


def test_import_is_quick():
    # about 20 ms: the limit leaves room for a machine that others use
    assert imported_in("fastattn") < 0.15
