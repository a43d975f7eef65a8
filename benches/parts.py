"""Studies in parts, whose rows are stored: a run that was stopped continues."""

from collections.abc import Callable
from pathlib import Path

from benches.progress import steps
from benches.resume import code_of, recall, record


def rows_of(study: Callable, parts: dict, *, quick: bool, results) -> list[dict]:
    """Run the parts, calls that return rows, that no earlier run has stored."""
    name = study.__name__
    part = Path(results) / f"{name}{'-quick' if quick else ''}.part.jsonl"
    code = code_of(study.__module__)
    done = recall(part, code)
    with steps(name, len(parts)) as step, part.open("a") as file:
        for title, call in parts.items():
            step(f"{name}: {title}")
            if (title,) not in done:
                done[(title,)] = call()
                record(file, code, (title,), done[(title,)])
            step()
    part.unlink()
    return [row for title in parts for row in done[(title,)]]
