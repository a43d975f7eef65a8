"""The command ``fastattn``: attention between files, explained, measured, shown."""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

import numpy as np

import fastattn
from fastattn import formats
from sketching._lib.arrays import Array

# what a command has to say: for machines, and for people
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
    >>> from fastattn.cli import main
    >>> main(["explain", "missing.npz"])
    2
    """
    try:
        options = _parser().parse_args(argv)
        report, text = options.run(options)
        print(json.dumps(report, allow_nan=False) if options.json else text, flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader has seen enough; let the interpreter flush into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"fastattn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as those about the inputs."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _number(
    kind: Callable[[str], Any], wanted: str, accepts: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """Make a type of arguments that says what it expected."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not accepts(number):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return number

    return parse


_METHODS = {
    "auto": fastattn.Auto,
    "exact": fastattn.Exact,
    "polynomial": fastattn.Polynomial,
}
_FINITE = _number(float, "a finite number", math.isfinite)
_POSITIVE = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
_NATURAL = _number(int, "an integer >= 0", lambda x: x >= 0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("fastattn", description=fastattn.__doc__, allow_abbrev=False)
    version = f"fastattn {fastattn.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[Any], _Answer], text: str) -> Any:
        made = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        made.set_defaults(run=run)
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
        choices=list(_METHODS),
        default="auto",
        help="how to compute (default: auto)",
    )
    add("--seed", type=_NATURAL, default=0, help="of the samples (default: 0)")


def _attend(options: Any) -> _Answer:
    """Answer every head and write the outputs with their certificates."""
    formats.check_output(options.output)
    problem = _Problem.of(options)
    heads = []
    with _scratch(options) as values, _scratch(options) as normalizers:
        for place, answer in problem.each(fastattn.approximate):
            # heads come in C order, so that their bytes in a row are the whole array
            answer.value.tofile(values)
            answer.log_normalizer.tofile(normalizers)
            heads.append({"head": place, **_certificate(answer)})
        arrays = {
            "out": problem.gather(values, answer.value),
            "log_normalizer": problem.gather(normalizers, answer.log_normalizer),
        }
        report = {**problem.describe(), "heads": heads}
        formats.write_output(options.output, arrays, report)
    rows = [
        [_name(x["head"]), x["method"], f"{x['error']:.1e}", f"{x['failure']:g}",
         x["norm"]]
        for x in heads
    ]  # fmt: skip
    table = _table(["head", "method", "error", "failure", "norm"], rows)
    report["output"] = options.output
    return report, f"{table}\nwrote {options.output}"


def _explain(options: Any) -> _Answer:
    """Say what would run for every head."""
    problem = _Problem.of(options)
    found = list(problem.each(fastattn.explain))
    heads = tuple(explanation.heads[0] for _, explanation in found)
    described = [
        {
            "head": place,
            "candidates": [
                {
                    "method": str(candidate.plan.method),
                    "accepted": bool(candidate.accepted),
                    "predicted_error": _or_null(candidate.plan.predicted_error),
                    "predicted_seconds": _or_null(candidate.plan.predicted_seconds),
                    "reason": candidate.plan.reason,
                }
                for candidate in candidates
            ],
        }
        for (place, _), candidates in zip(found, heads, strict=True)
    ]
    text = str(fastattn.Explanation(problem.lead, heads))
    return {**problem.describe(), "heads": described}, text


def _demo(options: Any) -> _Answer:
    """Measure the packaged heads and draw the picture."""
    from fastattn import _demo as demo

    demo.check_picture(options.picture)
    names = options.samples or demo.case_names()
    cases = list(demo.load_cases(names))
    found: list[demo.Measurement] = []
    with _progress("measuring", len(cases)) as step:
        demo.warm_up()
        for sample, head, inputs in cases:
            found += demo.measure(sample, head, inputs, options.tol)
            step()
    demo.draw(found, options.picture)
    rows = [
        [x.sample, str(x.head), f"{x.tol:g}", _brief(x.method), f"{x.certified:.1e}",
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
            {**dataclasses.asdict(x), "method": _brief(x.method)} for x in found
        ],
        "held": held,
        "picture": options.picture,
    }
    verdict = f"measured <= certified <= tol: {held} of {len(found)}"
    return report, f"{table}\n{verdict}\nwrote {options.picture}"


def _info(options: Any) -> _Answer:  # noqa: ARG001
    """Tell versions, threads and the measured speed of this machine."""
    import platform
    from importlib import metadata, util

    from threadpoolctl import threadpool_info

    from fastattn._costs import seconds_a_product

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
    }
    shown = {
        name: f"{x:.2e}" if isinstance(x, float) else x for name, x in report.items()
    }
    return report, "\n".join(f"{name:<24} {x}" for name, x in shown.items())


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The inputs of a file with the options of a command."""

    arrays: tuple[Array, Array, Array]
    meta: dict[str, Any]
    lead: tuple[int, ...]
    options: Any

    @staticmethod
    def of(options: Any) -> "_Problem":
        *arrays, meta = formats.read_inputs(options.input)
        shapes = [x.shape for x in arrays]
        try:
            lead = np.broadcast_shapes(*(shape[:-2] for shape in shapes))
        except ValueError as error:
            raise ValueError(
                f"{options.input}: leading dimensions of query, key and value do not "
                f"broadcast: {shapes}"
            ) from error
        if 0 in lead:
            raise ValueError(f"{options.input}: there are no heads: {shapes}")
        return _Problem((arrays[0], arrays[1], arrays[2]), meta, lead, options)

    def each(self, function: Callable[..., Any]) -> Iterator[tuple[list[int], Any]]:
        """Call ``function`` for one head after the other, each copied into memory."""
        options = self.options
        arrays = [np.broadcast_to(x, self.lead + x.shape[-2:]) for x in self.arrays]
        # every call spawns its stream from this one, as one call for all heads would
        rng = np.random.default_rng(options.seed)
        with _progress("heads", math.prod(self.lead)) as step:
            for place in np.ndindex(*self.lead):
                try:
                    result = function(
                        *(np.array(x[place]) for x in arrays),
                        tol=options.tol,
                        scale=options.scale,
                        is_causal=options.causal,
                        method=_METHODS[options.method](),
                        guarantee=options.guarantee,
                        rng=rng,
                    )
                except (ValueError, TypeError) as error:
                    where = f"head {_name(place)}: " if place else ""
                    raise ValueError(f"{options.input}: {where}{error}") from error
                yield list(place), result
                step()

    def gather(self, file: IO[bytes], last: Array) -> Array:
        """Map what the heads left in a scratch file, given the last of them."""
        file.flush()
        return np.memmap(file, last.dtype, "r", shape=self.lead + last.shape)

    def describe(self) -> dict[str, Any]:
        """Say what was asked for, for the record."""
        options = self.options
        return {
            "fastattn": fastattn.__version__,
            "input": options.input,
            "input_meta": self.meta,
            "tol": options.tol,
            "scale": options.scale,
            "is_causal": options.causal,
            "guarantee": options.guarantee,
            "method": options.method,
            "seed": options.seed,
        }


def _scratch(options: Any) -> IO[bytes]:
    """Open a nameless file beside the output, for what need not be in memory."""
    return tempfile.TemporaryFile(dir=Path(options.output).parent)


def _certificate(answer: Any) -> dict[str, Any]:
    """Describe the answer of one head."""
    certificate = answer.certificate
    return {
        "method": _brief(answer.plan.method),
        "error": float(certificate.error),
        "failure": float(certificate.failure),
        "norm": certificate.norm,
        "source": certificate.source,
        "reason": answer.plan.reason,
    }


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; it moves a bar on a terminal."""
    bar = None
    if sys.stderr.isatty():
        with suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
    if bar is None:
        yield lambda: None
        return
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _brief(method: Any) -> str:
    """Write a method without the settings that were left as they are."""
    changed = ", ".join(
        f"{field.name}={getattr(method, field.name)!r}"
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != field.default
    )
    return f"{type(method).__name__}({changed})"


def _name(place: Sequence[int]) -> str:
    return ",".join(str(i) for i in place) or "-"


def _or_null(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Set columns as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]
    )


if __name__ == "__main__":
    sys.exit(main())
