"""Measure everything, or some studies: tables, figures, and one page of them all.

``python -m benches`` runs every study, ``python -m benches tensor exact`` families or
studies by name. ``--quick`` runs all of them at small sizes in a few minutes.
"""

import argparse
import inspect
import sys
import time
import traceback
from pathlib import Path

from benches import compare, pages
from benches.measure import comparable, environment, missing, threads
from benches.progress import steps
from benches.resume import code_of
from benches.studies import FAMILIES, STUDIES, Study

RESULTS = Path(__file__).parent / "results"
# ignored by git: numbers of small sizes are not for a commit
QUICK = Path(__file__).parent.parent / "build" / "benches-quick"


def main(argv=None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return compare.main(*arguments.compare, fail=arguments.fail_on_worse)
    studies = _chosen(arguments.study, parser)
    if arguments.results is None:
        arguments.results = QUICK if arguments.quick else RESULTS
    arguments.results.mkdir(parents=True, exist_ok=True)
    absent, failed = {}, []
    with steps("studies", len(studies)) as step:
        for study in studies:
            step(study.name)
            try:
                absent[study.name] = _measure(study, arguments)
            except Exception:
                # one failure does not end the run; the exit status reports it
                traceback.print_exc()
                failed.append(study.name)
                absent[study.name] = "it failed in the last run"
            step()
            pages.write_index(arguments.results, STUDIES.values(), absent)
    print(f"\n{arguments.results / 'index.md'} has all tables and figures")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "study",
        nargs="*",
        help=f"all if none; families: {', '.join(FAMILIES)}; "
        f"studies: {', '.join(STUDIES)}",
    )
    parser.add_argument("--threads", type=int, default=1, help="of both sides, each")
    parser.add_argument(
        "--quick", action="store_true", help=f"small sizes, into {QUICK.name}"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out studies whose result is there, by the same command and code",
    )
    parser.add_argument(
        "--data",
        nargs="*",
        default=[],
        metavar="FILE[@N]",
        help="more files of q, k, v, with the packaged ones; @N: their first N rows",
    )
    parser.add_argument(
        "--heads-each",
        type=int,
        help="of each file at most so many heads, in the studies of seeds and peers",
    )
    parser.add_argument(
        "--count", type=int, help="answers that the study of fuzz compares"
    )
    parser.add_argument("--results", type=Path, help="folder to write to")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="measure nothing: compare two folders, or files, of results",
    )
    parser.add_argument(
        "--fail-on-worse", action="store_true", help="status 1 if a case is worse"
    )
    return parser


def _chosen(names: list[str], parser: argparse.ArgumentParser) -> list[Study]:
    """Studies of the names, in the order of the registry."""
    unknown = [name for name in names if name not in STUDIES and name not in FAMILIES]
    if unknown:
        parser.error(
            f"unknown study {unknown}: choose from {list(STUDIES)}, or from the "
            f"families {list(FAMILIES)}"
        )
    wanted = set(names or STUDIES)
    return [x for x in STUDIES.values() if {x.name, x.family} & wanted]


def _measure(study: Study, arguments: argparse.Namespace) -> str:
    """Run one study and store it; print the reason if there is no result."""
    lacking = missing(study.needs)
    if lacking:
        why = f"{', '.join(lacking)} is not installed"
        print(f"\n## {study.name}\n\nnot run: {why}", flush=True)
        return why
    with threads(arguments.threads):
        record = {
            "study": study.name,
            "family": study.family,
            "command": command_of(study.name, arguments),
            "threads": arguments.threads,
            "quick": arguments.quick,
            "code": code_of(study.run.__module__),
            "environment": environment(),
            "case": list(study.case),
            "notes": inspect.getdoc(study.run),
        }
        if arguments.resume and _is_there(arguments.results, record):
            print(f"\n## {study.name}\n\nkept: the same command and code", flush=True)
            return ""
        start = time.perf_counter()
        record["rows"] = study.run(**wanted(study.run, vars(arguments)))
        record["seconds"] = time.perf_counter() - start
    table = pages.markdown(record["rows"])
    print(f"\n## {study.name} ({record['seconds']:.0f} s)\n\n{table}", flush=True)
    pages.keep(arguments.results, record)
    return ""


def wanted(study, options: dict) -> dict:
    """Select the options that a study takes."""
    return {name: options[name] for name in inspect.signature(study).parameters}


def command_of(name: str, arguments: argparse.Namespace) -> str:
    """The command that repeats the measurement of a study."""
    command = f"python -m benches {name} --threads {arguments.threads}"
    command += " --quick" if arguments.quick else ""
    command += f" --count {arguments.count}" if arguments.count else ""
    if arguments.heads_each:
        command += f" --heads-each {arguments.heads_each}"
    if arguments.data:
        # folders of the files are private
        command += " --data " + " ".join(Path(path).name for path in arguments.data)
    return command


def _is_there(folder: Path, record: dict) -> bool:
    """Whether a folder has the result of this command and code."""
    path = folder / f"{record['study']}.json"
    if not path.exists():
        return False
    found = pages.read(path)
    same = all(found.get(name) == record[name] for name in ("command", "code"))
    return same and comparable(found["environment"]) == comparable(
        record["environment"]
    )


if __name__ == "__main__":
    sys.exit(main())
