"""The command ``fastattn``: attention between files, explained, measured, shown."""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeAlias

import fastattn
from fastattn.cli.heads import METHODS, Answers, FileHeads, progress
from fastattn.files import formats
from fastattn.planning.explanation import Run, brief
from fastattn.problem.batch import name_of
from fastattn.streaming.attend import attend_streamed, explain_streamed
from fastattn.streaming.memory import usable_memory
from fastattn.streaming.rows import FileHead, Step
from sketching._lib.json_text import as_text

# the report of a command as JSON, and as text
_Answer: TypeAlias = tuple[dict[str, Any], str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status: 0, or 2 for bad input, with one line on stderr that says what
        is wrong, or 130 if interrupted.

    Examples
    --------
    >>> from fastattn.cli.main import main
    >>> main(["explain", "missing.npz"])
    2
    """
    try:
        options = _parser().parse_args(argv)
        report, text = options.answer(options)
        print(as_text(report) if options.json else text, flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader closed the pipe; let the interpreter flush to /dev/null
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        _complain(f"not enough memory: {error}; allow less by --memory")
        return 2
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        _complain(str(error))
        return 2
    return 0


def _complain(message: str) -> None:
    print(f"fastattn: error: {' '.join(message.split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like those of the inputs."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _number(
    kind: Callable[[str], Any], wanted: str, accepts: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """Make an argument type with an error that says what was expected."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not accepts(number):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return number

    return parse


_FINITE = _number(float, "a finite number", math.isfinite)
_POSITIVE = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
_NATURAL = _number(int, "an integer >= 0", lambda x: x >= 0)


def _bytes(text: str) -> int:
    """Read a size such as 1.5GB."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"no size: {text}")
    number, power, binary = found.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(
        power.upper() or " "
    )
    return int(min(size, sys.maxsize))


_SIZE = _number(_bytes, "a size such as 1.5GB", lambda x: x > 0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("fastattn", description=fastattn.__doc__, allow_abbrev=False)
    version = f"fastattn {fastattn.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, answer: Callable[[Any], _Answer], text: str) -> Any:
        made = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        made.set_defaults(answer=answer)
        made.add_argument(
            "--json", action="store_true", help="print one JSON object and nothing else"
        )
        return made

    demo = command("demo", _demo, "show errors and times on real attention heads")
    add = demo.add_argument
    add("--tol", type=_POSITIVE, nargs="+", default=[1e-1, 3e-2, 1e-2], help="errors")
    add("--picture", default="fastattn-demo.png", metavar="FILE", help="where to draw")
    add("--samples", nargs="+", metavar="NAME", help="cases to run (default: all)")
    attend = command("attend", _attend, "compute attention from a file into a file")
    _add_problem(attend)
    attend.add_argument(
        "-o", "--output", required=True, metavar="OUT", help=".npz or .safetensors"
    )
    explain = command("explain", _explain, "say what attend would run, and why")
    _add_problem(explain)
    explain.add_argument(
        "--run", action="store_true", help="run every candidate, the refused ones too"
    )
    command("calibrate", _calibrate, "measure what work costs on this machine")
    command("info", _info, "describe this machine and what is installed")
    return parser


def _add_problem(parser: argparse.ArgumentParser) -> None:
    """Add the options that attend and explain share."""
    add = parser.add_argument
    add("input", metavar="IN", help=".npz or .safetensors with q, k, v")
    add("--tol", type=_POSITIVE, default=1e-2, help="allowed error (default: 0.01)")
    add("--scale", type=_FINITE, help="factor of the logits (default: d ** -0.5)")
    add("--causal", action="store_true", help="query i sees keys j <= i only")
    add(
        "--guarantee", choices=["sampled", "proven"], default="sampled",
        help="what the error rests on: sampled rows, or a proof (default: sampled)",
    )  # fmt: skip
    add(
        "--method",
        choices=list(METHODS),
        default="auto",
        help="how to compute (default: auto)",
    )
    add("--seed", type=_NATURAL, default=0, help="of the samples (default: 0)")
    add(
        "--memory", type=_SIZE, default=usable_memory() // 4, metavar="SIZE",
        help="bytes to use, as 1.5GB: larger heads are streamed from the file in "
        "blocks (default: a quarter of the machine's, or of a limit on the process)",
    )  # fmt: skip


def _attend(options: Any) -> _Answer:
    """Answer every head and write the outputs with their certificates."""
    formats.check_output(options.output)
    problem = FileHeads.of(options)
    problem.check_room()
    heads: list[dict[str, Any]] = []
    with Answers.in_folder_of(options.output, problem) as answers:

        def streamed(head: FileHead, **wanted: Any) -> Any:
            # heads come in C order
            put = partial(answers.put, len(heads))
            return attend_streamed(head, put=put, **wanted)

        found = problem.each(fastattn.approximate, streamed)
        for place, answer in found:
            if isinstance(answer, fastattn.Approximation):
                answers.put(len(heads), 0, answer.value, answer.log_normalizer)
            heads.append({"head": place, **_certificate(answer)})
        report = {**problem.describe(), "heads": heads}
        formats.write_output(options.output, answers.gather(), report)
    rows = [
        [name_of(x["head"]), x["method"], f"{x['error']:.1e}", f"{x['failure']:g}",
         x["norm"]]
        for x in heads
    ]  # fmt: skip
    table = _table(["head", "method", "error", "failure", "norm"], rows)
    report["output"] = options.output
    return report, f"{table}\nwrote {options.output}"


def _explain(options: Any) -> _Answer:
    """Say what would run for every head."""
    problem = FileHeads.of(options)

    def streamed(head: FileHead, *, step: Step, **wanted: Any) -> Any:
        if options.run:
            raise ValueError(
                "--run needs the keys of a head in memory: allow more by --memory"
            )
        explanation = explain_streamed(head, **wanted)
        step(1.0)
        return explanation

    found = list(problem.each(partial(fastattn.explain, run=options.run), streamed))
    heads = tuple(explanation.heads[0] for _, explanation in found)
    runs = tuple(explanation.runs[0] for _, explanation in found if explanation.runs)
    described = [
        {
            "head": place,
            "candidates": [
                {**_considered(candidate), **_came_out(run)}
                for candidate, run in zip(candidates, ran, strict=True)
            ],
        }
        for (place, _), candidates, ran in zip(
            found, heads, runs or ((None,) * len(x) for x in heads), strict=True
        )
    ]
    text = str(fastattn.Explanation(problem.lead, heads, runs))
    return {**problem.describe(), "heads": described}, text


def _considered(candidate: Any) -> dict[str, Any]:
    plan = candidate.plan
    return {
        "method": str(plan.method),
        "accepted": bool(candidate.accepted),
        "predicted_error": _or_null(plan.predicted_error),
        "predicted_seconds": _or_null(plan.predicted_seconds),
        "reason": plan.reason,
    }


def _came_out(run: Run | None) -> dict[str, Any]:
    if run is None:
        return {}
    return {
        "seconds": _or_null(run.seconds),
        "certified": _or_null(run.certified),
        "measured": _or_null(run.error),
        "failure": run.failure,
    }


def _calibrate(options: Any) -> _Answer:  # noqa: ARG001
    """Measure the rates of the cost model and store them."""
    from fastattn.costs.rates import Rates, keep
    from fastattn.planning.calibration import calibrate

    found, product = calibrate()
    path = str(keep(found, product))
    built_in, rates = dataclasses.asdict(Rates()), dataclasses.asdict(found)
    rows = [[x, f"{built_in[x]:g}", f"{rates[x]:.3g}"] for x in rates]
    table = _table(["rate", "built in", "measured"], rows)
    report = {"rates": rates, "seconds a product": product, "path": path}
    return report, f"{table}\nwrote {path}"


def _demo(options: Any) -> _Answer:
    """Measure the packaged heads and draw the picture."""
    from fastattn.cli import demo

    demo.check_picture(options.picture)
    names = options.samples or demo.case_names()
    cases = list(demo.load_cases(names))
    found: list[demo.Measurement] = []
    with progress("measuring", len(cases)) as step:
        demo.warm_up()
        for sample, head, inputs in cases:
            found += demo.measure(sample, head, inputs, options.tol)
            step(1.0)
    demo.draw(found, options.picture)
    rows = [
        [x.sample, str(x.head), f"{x.tol:g}", brief(x.method), f"{x.certified:.1e}",
         f"{x.measured:.1e}", f"{x.time_ratio:.2f}"]
        for x in found
    ]  # fmt: skip
    table = _table(
        ["sample", "head", "tol", "method", "certified", "measured", "time/exact"],
        rows,
    )
    held = sum(x.measured <= x.certified <= x.tol for x in found)
    report = {
        "measurements": [
            {**dataclasses.asdict(x), "method": brief(x.method)} for x in found
        ],
        "held": held,
        "picture": options.picture,
    }
    verdict = f"measured <= certified <= tol: {held} of {len(found)}"
    return report, f"{table}\n{verdict}\nwrote {options.picture}"


def _info(options: Any) -> _Answer:  # noqa: ARG001
    """Report versions, threads and the measured speed of this machine."""
    import platform
    from importlib import metadata, util

    from threadpoolctl import threadpool_info

    from fastattn.costs.rates import seconds_a_product, speed

    report = {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "numba": metadata.version("numba"),
        "cupy": util.find_spec("cupy") is not None,
        "cpus": len(os.sched_getaffinity(0)),
        **{
            f"{pool['internal_api']} {pool['version'] or ''}".strip(): (
                f"{pool['num_threads']} threads"
            )
            for pool in threadpool_info()
        },
        "seconds a product": seconds_a_product(),
        "rates": speed().source,
        **{f"rate {x}": v for x, v in dataclasses.asdict(speed().rates).items()},
    }
    shown = {
        name: f"{x:.3g}" if isinstance(x, float) else x for name, x in report.items()
    }
    return report, "\n".join(f"{name:<24} {x}" for name, x in shown.items())


def _certificate(answer: Any) -> dict[str, Any]:
    """Describe the answer of one head."""
    certificate = answer.certificate
    return {
        "method": brief(answer.plan.method),
        "error": float(certificate.error),
        "failure": float(certificate.failure),
        "norm": certificate.norm,
        "source": certificate.source,
        "reason": answer.plan.reason,
    }


def _or_null(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Format rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]
    )
