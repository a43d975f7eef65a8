"""The pages: every exported name is in the reference, and their code runs."""

import ast
import io
import re
import tokenize
from pathlib import Path

import numpy as np
import pytest

import fastattn
import lowerbounds
import sketching

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGES = (fastattn, sketching, lowerbounds)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^   (\w+)$", re.MULTILINE)
# words that the glossary has a standard term for
RETIRED = re.compile(
    r"\b(bod(y|ies)|eight[ -]bits?|calm|restless|work allowed|probes?|pilots|faces?"
    r"|dear|doubt|mend(s|ed)?|settled|hard rows?|drifts?|pieces?|visible|told"
    r"|judged)\b",
    re.IGNORECASE,
)
# what a comment says of the value of its line: that it is a number, or at most one
SAYS = re.compile(r"# (<= )?([\d.e-]+)(?=$|,)")


def entries(package):
    """Names in the tables of the reference of a package."""
    text = (DOCS / "api" / f"{package.__name__}.rst").read_text("utf-8")
    return ENTRY.findall(text)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda x: x.__name__)
def test_every_exported_name_is_in_the_reference_once(package):
    # what fastattn exports as well is explained there
    elsewhere = {
        name
        for name in package.__all__
        if package is sketching
        and getattr(fastattn, name, None) is getattr(package, name)
    }
    assert sorted(entries(package)) == sorted(set(package.__all__) - elsewhere)
    text = (DOCS / "api" / f"{package.__name__}.rst").read_text("utf-8")
    assert all(f"~fastattn.{name}" in text for name in elsewhere)


def check(page):
    """Run the blocks of a page in order; return how many remarks on values hold."""
    space, remarks = {}, 0
    for block in BLOCK.findall(page.read_text("utf-8")):
        lines = block.splitlines()
        for node in ast.parse(block).body:
            if not isinstance(node, ast.Expr):
                exec(compile(ast.Module([node], []), str(page), "exec"), space)
                continue
            value = eval(compile(ast.Expression(node.value), str(page), "eval"), space)
            said = SAYS.search(lines[node.end_lineno - 1][node.end_col_offset :])
            if said is not None:
                bound = float(said[2])
                assert np.all(value <= bound if said[1] else value == bound), said[0]
                remarks += 1
            elif isinstance(value, bool | np.bool_):
                assert value
                remarks += 1
    return remarks


def test_the_ten_lines_run(capsys):
    assert "```{literalinclude} ../README.md" in (DOCS / "index.md").read_text("utf-8")
    (block,) = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    assert len(block.splitlines()) <= 10
    space = {}
    exec(block, space)
    assert np.all(space["answer"].certificate.error <= 1e-2)
    assert "Exact()" in capsys.readouterr().out


def test_the_blocks_of_pages_run_and_say_the_truth():
    remarks = {page.name: check(page) for page in sorted(DOCS.glob("*.md"))}
    assert remarks["prepared.md"] == 7


def test_remarks_are_checked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 3\nx  # 3\nx  # <= 4, or so\nx > 2\n```\n")
    assert check(page) == 3
    page.write_text("```python\n3  # 4\n```\n")
    with pytest.raises(AssertionError):
        check(page)


def test_pages_use_the_terms_of_the_glossary():
    pages = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")]
    for folder in (DOCS, DOCS / "api", DOCS / "gallery", ROOT / "examples"):
        pages += [x for x in folder.glob("*") if x.suffix in (".md", ".rst", ".py")]
    found = [
        f"{page.relative_to(ROOT)}:{number}: {word[0]}"
        for page in pages
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1)
        for word in RETIRED.finditer(line)
    ]
    assert not found
    assert RETIRED.search("products of eight bits")


def prose_of(path):
    """Comments and docstrings of a module, line by line."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
    for token in tokens:
        is_text = token.type == tokenize.STRING and token.string.endswith('"""')
        if token.type == tokenize.COMMENT or is_text:
            yield from enumerate(token.string.splitlines(), token.start[0])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda x: x.__name__)
def test_modules_use_the_terms_of_the_glossary(package):
    modules = sorted(Path(package.__file__).parent.rglob("*.py"))
    assert len(modules) > 10
    found = [
        f"{path.relative_to(ROOT)}, line {number}: {word[0]}"
        for path in modules
        for number, line in prose_of(path)
        for word in RETIRED.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_every_tutorial_begins_with_a_title():
    tutorials = sorted((DOCS / "gallery").glob("*.py"))
    assert len(tutorials) >= 6
    for path in tutorials:
        title, line = ast.get_docstring(ast.parse(path.read_text("utf-8"))).split("\n")[
            :2
        ]
        assert line == "=" * len(title)
