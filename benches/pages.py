"""Tables and pages of results, written to a temporary file and then renamed."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

# rows of a table on the page of all studies; a study's own page has every row
_SHOWN = 24


def markdown(rows: list[dict]) -> str:
    """Lay rows out as a markdown table; lists are for pictures."""
    columns = dict.fromkeys(
        name for row in rows for name, x in row.items() if not isinstance(x, list)
    )
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value) -> str:
    """Three significant digits for numbers, a dash for none, text as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def records(folder: Path) -> dict[str, dict]:
    """The results of a folder, by the name of the study."""
    found = (read(path) for path in sorted(folder.glob("*.json")))
    return {record["study"]: record for record in found}


def read(path: Path) -> dict:
    """One result."""
    record = json.loads(path.read_text())
    if not (isinstance(record, dict) and {"study", "rows"} <= set(record)):
        raise ValueError(f"{path}: expected a result of `python -m benches`")
    return record


def keep(folder: Path, record: dict) -> None:
    """Write the record and its page; draw its figure if there is one."""
    from benches.figures import FIGURES

    name = record["study"]
    table = markdown(record["rows"])
    page = f"# {name}\n\n{record['notes']}\n\n`{record['command']}`\n\n{table}\n"
    text = json.dumps(record, indent=1, default=plain) + "\n"
    write(folder / f"{name}.md", page)
    if name in FIGURES:
        beside = folder / f"{name}.part.png"
        # figures are drawn from a file
        FIGURES[name](json.loads(text), beside)
        os.replace(beside, folder / f"{name}.png")
    # last: its presence means that the study is finished
    write(folder / f"{name}.json", text)


def plain(value):
    """A number of NumPy as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def write(path: Path, text: str) -> None:
    """Write a temporary file, then rename it: no file is incomplete."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def write_index(folder: Path, studies: Iterable, absent: dict[str, str]) -> None:
    """Write the page of all results; ``absent``: reasons for missing ones."""
    found = records(folder)
    parts = [
        "# Benchmarks",
        "`python -m benches` wrote this page. Every answer was checked before it was "
        "timed. A number with a least and a most is the median of calls that took "
        "turns with the opponent's, on as many threads; `--compare` compares two "
        "folders of such results.",
    ]
    family = None
    for study in studies:
        if study.family != family:
            family = study.family
            parts.append(f"## {family[0].upper()}{family[1:]}")
        parts.append(f"### {study.name}")
        if study.name in found:
            parts += _section(folder, found[study.name])
        else:
            parts.append(f"No result: {absent.get(study.name, 'it has not run')}.")
    write(folder / "index.md", "\n\n".join(parts) + "\n")


def _section(folder: Path, record: dict) -> list[str]:
    """Notes, picture and table of one study."""
    name, rows = record["study"], record["rows"]
    where = record["environment"]
    parts = [
        record.get("notes", ""),
        f"`{record['command']}`, commit {where['commit']}, {where['processor']}, "
        f"NumPy {where['numpy']}, numba {where['numba']}, torch {where['torch']}",
    ]
    if (folder / f"{name}.png").exists():
        parts.append(f"![{name}]({name}.png)")
    parts.append(markdown(rows[:_SHOWN]))
    if len(rows) > _SHOWN:
        parts.append(f"The first {_SHOWN} of {len(rows)} rows; [all]({name}.md).")
    return [part for part in parts if part]
