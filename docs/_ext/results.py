"""Pages and tables of what ``python -m benches`` wrote into ``benches/results``.

Nothing is copied by hand: each result becomes a page with its figures, and a page of
prose can show some rows and columns of one, as they were committed.
"""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benches" / "results"
# folder of the generated pages, below the pages of prose
PAGES = "results"
# a picture beside a result, and a link to the page of another
PICTURE = re.compile(r"\]\(([\w-]+\.png)\)")
OTHER = re.compile(r"\[([^\]]*)\]\(([\w-]+)\.md\)")


def names() -> list[str]:
    """Results that have a page, in alphabetical order."""
    return sorted(path.stem for path in RESULTS.glob("*.md"))


def summary(name: str) -> str:
    """What a result says of itself below its title, if that is not a command."""
    text = (RESULTS / f"{name}.md").read_text("utf-8").partition("\n")[2]
    first = text.strip().partition("\n")[0]
    return "" if first.startswith("`") else first


def link(name: str) -> str:
    """A link to the page of a result from a page of prose, with what it says."""
    with (RESULTS / f"{name}.md").open(encoding="utf-8") as file:
        title = file.readline().strip("# \n")
    return f"[{title}]({PAGES}/{name}.md): {summary(name)}".removesuffix(": ")


def page(name: str) -> str:
    """The page of one result: as written, with its picture, and where it was run."""
    text = (RESULTS / f"{name}.md").read_text("utf-8").rstrip()
    before, line, table = text.partition("\n|")
    parts = [before]
    if (RESULTS / f"{name}.png").exists():
        parts.append(f"![{name}]({name}.png)")
    parts.append((line + table).lstrip())
    record = RESULTS / f"{name}.json"
    if record.exists():
        parts.append(where(json.loads(record.read_text("utf-8"))))
    text = PICTURE.sub(r"](../../benches/results/\1)", "\n\n".join(parts))
    there = names()
    # a result may have been left out of what was committed
    return OTHER.sub(lambda x: x[0] if x[2] in there else x[1], text) + "\n"


def where(record: dict[str, Any]) -> str:
    """Say where and on what the figures of a record were measured."""
    found = record.get("environment", {})
    machine = [
        f"{found[name]} {name}" if name == "cores" else str(found[name])
        for name in ("processor", "cores")
        if name in found
    ]
    libraries = [
        f"{name} {found[name]}"
        for name in ("python", "numpy", "numba", "torch")
        if found.get(name)
    ]
    lines = [", ".join(machine), ", ".join(libraries)]
    # a run outside of a checkout knows none
    if found.get("commit"):
        lines.append(f"commit {found['commit']}")
    return "Measured on " + "; ".join(line for line in lines if line) + "."


def write_pages(app: Sphinx) -> None:
    """Write a page for each result, and remove those of results that are gone."""
    folder = Path(app.srcdir) / PAGES
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in names():
            old.unlink()
    for name in names():
        path, text = folder / f"{name}.md", page(name)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


class ResultList(SphinxDirective):
    """Links to the pages of the results that match patterns, and their pictures.

    A result is listed by the first directive of a page that names it; ``*`` in the
    last takes the rest. A title stands above the list, if there is a list.
    """

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """List what is there; a pattern may match nothing."""
        taken = self.env.temp_data.setdefault("results_listed", set())
        listed = []
        for pattern in self.content:
            for path in sorted(RESULTS.glob(f"{pattern.strip()}.md")):
                if path.stem not in taken:
                    taken.add(path.stem)
                    listed.append(path.stem)
        if not listed:
            return []
        parts = [*self.arguments, "\n".join(f"- {link(name)}" for name in listed)]
        parts += [
            f"[![{name}](../benches/results/{name}.png)]({PAGES}/{name}.md)"
            for name in listed
            if (RESULTS / f"{name}.png").exists()
        ]
        return self.parse_text_to_nodes("\n\n".join(parts))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _conditions(text: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in _words(text))
    return {name.strip(): value.strip() for name, _, value in pairs}


class ResultTable(SphinxDirective):
    """Some rows and columns of a committed result, under a link to its page.

    Of several names the first is taken that there is a result of.
    """

    required_arguments = 1
    optional_arguments = 3
    option_spec: ClassVar[dict[str, Any]] = {
        "columns": _words,
        "where": _conditions,
        "names": _words,
    }

    def run(self) -> list[nodes.Node]:
        """Read the record; the requested rows and columns must exist."""
        paths = [RESULTS / f"{name}.json" for name in self.arguments]
        path = next((path for path in paths if path.exists()), paths[-1])
        self.env.note_dependency(str(path))
        record = json.loads(path.read_text("utf-8"))
        wanted = self.options.get("where", {})
        columns = self.options.get("columns", list(record["rows"][0]))
        missing = {*columns, *wanted} - set(record["rows"][0])
        if missing:
            raise self.error(f"{path.name} has no columns {sorted(missing)}")
        rows = [
            row
            for row in record["rows"]
            if all(shown(row[name]) == value for name, value in wanted.items())
        ]
        if not rows:
            raise self.error(f"no row of {path.name} has {wanted}")
        lines = [self.options.get("names", columns), ["---"] * len(columns)]
        lines += [[shown(row[name]) for name in columns] for row in rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return self.parse_text_to_nodes(f"{link(path.stem)}\n\n{table}")


def shown(value: Any) -> str:
    """Show a number with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def setup(app: Sphinx) -> dict[str, Any]:
    """Tell Sphinx of the directives and of the pages."""
    app.add_directive("result-list", ResultList)
    app.add_directive("result-table", ResultTable)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
