"""`python -m benches STUDY ...`: measure, print a table, keep JSON and markdown."""

import argparse
import inspect
import json
import os
import sys
from pathlib import Path

from benches.figures import FIGURES
from benches.measure import environment, threads
from benches.studies import STUDIES

RESULTS = Path(__file__).parent / "results"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument(
        "study", nargs="*", help=f"of {', '.join(STUDIES)}; all if none"
    )
    parser.add_argument("--threads", type=int, default=1, help="of both sides, each")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument(
        "--data",
        nargs="*",
        default=[],
        metavar="FILE[@N]",
        help="files of q, k, v beside the packaged ones; @N: their first N rows",
    )
    parser.add_argument(
        "--heads-each",
        type=int,
        help="of each file at most so many heads, in the studies of seeds and peers",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.study if name not in STUDIES]
    if unknown:
        parser.error(f"unknown study {unknown}: choose from {list(STUDIES)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.study or STUDIES:
        with threads(arguments.threads):
            rows = STUDIES[name](**wanted(STUDIES[name], vars(arguments)))
        table = markdown(rows)
        print(f"\n## {name}\n\n{table}", flush=True)
        keep(arguments, name, rows, table)
    return 0


def wanted(study, options: dict) -> dict:
    """Pick the options that a study takes."""
    return {name: options[name] for name in inspect.signature(study).parameters}


def markdown(rows: list[dict]) -> str:
    """Lay rows out as a markdown table; lists are for pictures."""
    columns = [name for name, x in rows[0].items() if not isinstance(x, list)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value) -> str:
    """Three significant digits for numbers, text as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def keep(arguments, name: str, rows: list[dict], table: str) -> None:
    """Write the result beside, then rename; draw it where it has a picture."""
    command = f"python -m benches {name} --threads {arguments.threads}"
    command += " --quick" if arguments.quick else ""
    if arguments.heads_each:
        command += f" --heads-each {arguments.heads_each}"
    if arguments.data:
        # where the files lie is nobody else's business
        command += " --data " + " ".join(Path(path).name for path in arguments.data)
    record = {
        "study": name,
        "command": command,
        "threads": arguments.threads,
        "quick": arguments.quick,
        "environment": environment(),
        "rows": rows,
    }
    notes = inspect.getdoc(STUDIES[name])
    page = f"# {name}\n\n{notes}\n\n`{command}`\n\n{table}\n"
    suffix = "-quick" if arguments.quick else ""
    for ending, text in (
        ("json", json.dumps(record, indent=1, default=str) + "\n"),
        ("md", page),
    ):
        path = arguments.results / f"{name}{suffix}.{ending}"
        beside = path.with_suffix(f".{ending}.part")
        beside.write_text(text)
        os.replace(beside, path)
    if name in FIGURES:
        FIGURES[name](record, arguments.results / f"{name}{suffix}.png")


if __name__ == "__main__":
    sys.exit(main())
