"""A table of the methods considered for each head, with the results of runs."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.problem.batch import name_of, place_of_head
from fastattn.problem.head import AttentionHead, host_rows
from fastattn.problem.plan import Candidate, HeadAnswer, Method, Task
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.threads import single_threaded_blas

Solve = Callable[[Any, Task[Any]], HeadAnswer]


@dataclass(frozen=True, slots=True)
class Run:
    """Time and error of a candidate that ran.

    Parameters
    ----------
    seconds : float
        Time of the whole call including planning and certificate; the least of two.
    certified : float
        The error of the certificate, in the norm of the certificate.
    error : float
        The measured error in that norm, on sampled rows of a large head; NaN where it
        is not measured.
    failure : str
        Why the run was refused; empty if it was not.
    """

    seconds: float
    certified: float
    error: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The methods that were considered for each head.

    Parameters
    ----------
    lead : tuple of int
        The leading dimensions of the batch.
    heads : tuple of tuple of Candidate
        For each head, in C order, its candidates in the order of consideration; the
        first accepted one would run.
    runs : tuple of tuple of Run or None
        The run of each candidate, None where it has too little detail to run; empty
        without ``run=True``.
    """

    lead: tuple[int, ...]
    heads: tuple[tuple[Candidate, ...], ...]
    runs: tuple[tuple[Run | None, ...], ...] = ()

    def __str__(self) -> str:
        """Return a table of all candidates."""
        head = ["head", "", "method", "time", "error", "why"]
        if self.runs:
            head[5:5] = ["took", "certified", "measured"]
        rows = [head, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # numbers are aligned right
        sides = ["<", "<", "<", *">" * (len(head) - 4), "<"]
        return "\n".join(
            "  ".join(
                f"{text:{side}{width}}"
                for text, side, width in zip(row, sides, widths, strict=True)
            ).rstrip()
            for row in rows
        )

    def _rows(self) -> Iterator[list[str]]:
        for number, candidates in enumerate(self.heads):
            name = name_of(place_of_head(number, self.lead))
            taken = next((c for c in candidates if c.accepted), None)
            for i, candidate in enumerate(candidates):
                plan, why = candidate.plan, candidate.plan.reason
                row = [
                    name,
                    "->" if candidate is taken else "",
                    brief(plan.method, _short),
                ]
                row += [_seconds(plan.predicted_seconds), _number(plan.predicted_error)]
                if self.runs:
                    run = self.runs[number][i] or Run(math.nan, math.nan, math.nan)
                    row += [_seconds(run.seconds)]
                    row += [_number(run.certified), _number(run.error)]
                    why += f"; when run: {run.failure}" if run.failure else ""
                yield [*row, why]


def run_candidates(
    task: Task[Any],
    candidates: tuple[Candidate, ...],
    solve: Solve,
    compare: bool,
) -> tuple[Run | None, ...]:
    """Run every candidate with all parameters chosen, including refused ones.

    ``solve`` runs a method on a head. Errors are measured if ``compare`` is true, which
    means that the methods approximate exact attention, and if rows of exact attention
    are cheap enough.
    """
    head: AttentionHead = task.head
    n, m, _, _ = head.sizes
    streams = task.rng.spawn(len(candidates) + 1)
    count = min(n, POLICY.auto.explained_logits // max(m, 1)) if compare else 0
    rows = np.sort(streams.pop().choice(n, count, replace=False))
    truth = None
    if count:
        truth = to_host(head.with_rows(rows).attend(head.xp.float64)[0])
    plans = [candidate.plan for candidate in candidates]
    with single_threaded_blas():
        return tuple(
            # NaN: without a predicted time, some parameters were not chosen
            None
            if not plan.predicted_seconds <= POLICY.auto.longest_run
            else _run(task._replace(rng=stream), plan.method, rows, truth, solve)
            for plan, stream in zip(plans, streams, strict=True)
        )


def _run(
    task: Task[Any],
    method: Method,
    rows: Array,
    truth: Array | None,
    solve: Solve,
) -> Run:
    """Run a method twice; without a tolerance if it misses ``tol``."""
    failure = ""
    for tol in (task.tol, math.inf):
        try:
            # twice: the first run may compile
            timed = [
                _timed(method, task._replace(tol=tol, rng=stream), solve)
                for stream in task.rng.spawn(2)
            ]
        except RefusalError as error:
            failure = str(error)
            continue
        seconds, answer = min(x for x, _ in timed), timed[-1][1]
        measured = math.nan if truth is None else _error(answer, rows, truth)
        return Run(seconds, answer.error, measured)
    return Run(math.nan, math.nan, math.nan, failure)


def _timed(method: Method, task: Task[Any], solve: Solve) -> tuple[float, HeadAnswer]:
    start = time.perf_counter()
    answer = solve(method, task)
    return time.perf_counter() - start, answer


def _error(answer: HeadAnswer, rows: Array, truth: Array) -> float:
    """Error of an output on some rows, in the norm of its certificate."""
    difference = host_rows(answer.value, rows).astype(np.float64) - truth
    if answer.norm == "max":
        return float(np.abs(difference).max())
    error, size = (float(np.linalg.norm(x)) for x in (difference, truth))
    return error / size if size else math.inf if error else 0.0


def brief(method: Any, number: Callable[[Any], str] = repr) -> str:
    """Format a method with the parameters that differ from their defaults."""
    changed = ", ".join(
        f"{field.name}={number(getattr(method, field.name))}"
        for field in fields(method)
        if getattr(method, field.name) != field.default
    )
    return f"{type(method).__name__}({changed})"


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else repr(value)


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value * 1e3:.1f} ms"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"
