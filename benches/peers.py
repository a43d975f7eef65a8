"""Error against time of other methods and of ours, on the same heads in one run."""

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import fastattn
import sketching
from benches.heads import Head, case_head, real_heads
from benches.measure import seconds
from benches.opponents import absent, opponents, sdpa, torch
from benches.progress import steps
from benches.resume import fingerprint, recall, record

OURS = "fastattn"
UNIT = "torch SDPA"
# heads shorter than this are computed exactly by all methods
_LEAST = 1024
# a method with a larger error is not useful, however fast
_USEFUL = 0.5
# seconds below which a call is repeated whether or not it is faster
_LONG = 1.0
# sizes are given by hand, without a tolerance: this one refuses nothing
_ANY = 1e6


@dataclass(frozen=True)
class Entry:
    """One method at one setting, ready to run on one head."""

    family: str
    setting: str
    package: str
    call: Callable
    ours: bool


def peers(*, quick, data, heads_each, results):
    """Every peer and ours on every head: relative error, time over torch's SDPA.

    The rows of a head are stored in ``peers.part.jsonl`` until the study is complete; a
    run that was stopped continues from there, if the code is the same.
    """
    names = ("lowdim",) if quick else ("iid1", "iid4", "lowdim")
    sizes = (4096,) if quick else (8192, 32768)
    # real heads first: they matter most if a run is stopped
    heads = list(real_heads(data, each=1 if quick else heads_each, least=_LEAST))
    heads += [case_head(name, n) for n in sizes for name in names]
    part = Path(results) / f"peers{'-quick' if quick else ''}.part.jsonl"
    code = fingerprint(fastattn, sketching)
    done, rows = recall(part, code), []
    with part.open("a") as file, steps("peers", len(heads)) as step:
        for number, head in enumerate(heads):
            key = (head.name, len(head))
            step(f"peers: {head.name}")
            if key not in done:
                done[key] = measured(head, quick=quick)
                record(file, code, key, done[key])
            rows += done[key]
            step()
            # the truth of a long head is large
            heads[number] = None
    part.unlink()
    for line in unmatched(rows):
        print(line)
    # no points of the figure
    return rows + [
        {"head": "all", "n": "", "method": f"{name}: not installed"}
        for name in absent(quick=quick)
    ]


def measured(head: Head, *, quick: bool) -> list[dict]:
    """Run every method on one head, first for its error, then in turn for time."""
    rounds = 1 if quick else 5 if len(head) <= 8192 else 3
    runs = []
    with torch.no_grad():
        for entry in entries(head, quick=quick):
            try:
                answer = entry.call()
            except (ValueError, RuntimeError) as error:
                # a method's own refusal is a result, but not a point of the figure
                print(f"  {entry.family} {entry.setting}: {error}"[:200], flush=True)
                continue
            error, certified = _errors(head, answer)
            if np.isfinite(error):
                runs.append((entry, error, certified))
            else:
                print(f"  {entry.family} {entry.setting}: not finite", flush=True)
        unit = sdpa(*tensors(head))
        times = times_over(unit, [entry.call for entry, _, _ in runs], rounds)
        unit_error = _errors(head, unit())[0]
    gc.collect()
    rows = [_row(head, UNIT, "", "torch", False, unit_error, None, [1.0])]
    for (entry, error, certified), ratios in zip(runs, times, strict=True):
        about = (entry.family, entry.setting, entry.package, entry.ours)
        rows.append(_row(head, *about, error, certified, ratios))
    for row in rows:
        row["beaten by"] = beaten_by(row, rows)
    return rows


def _row(head, family, setting, package, ours, error, certified, ratios) -> dict:
    return {
        "head": head.name,
        "n": len(head),
        "method": f"{family} {setting}".strip(),
        "family": family,
        "from": package,
        "ours": ours,
        "error": error,
        "certified": certified,
        "time over torch": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def tensors(head: Head) -> list:
    """The head as torch tensors of shape (1, 1, n, d), for the scale d ** -0.5."""
    query, key, value = (torch.from_numpy(np.array(x))[None, None] for x in head.arrays)
    return [query * (head.scale * query.shape[-1] ** 0.5), key, value]


def _errors(head: Head, answer) -> tuple[float, float | None]:
    """Error and certified error of a method's answer."""
    certified = None
    if isinstance(answer, fastattn.Approximation):
        answer, certified = answer.value, float(answer.certificate.error)
    elif torch.is_tensor(answer):
        answer = answer.float().numpy()
    return head.error(np.reshape(answer, head.value.shape)), certified


def entries(head: Head, *, quick: bool) -> Iterator[Entry]:
    """Yield everything that runs on one head, prepared."""
    arrays = tensors(head)
    for other in opponents(quick=quick):
        try:
            call = other.prepare(*arrays)
        except ValueError as error:
            print(f"  {other.name}: {error}"[:200], flush=True)
            continue
        yield Entry(other.family, other.setting, other.package, call, ours=False)
    tols = (2e-1, 5e-2) if quick else (5e-1, 3e-1, 2e-1, 1e-1, 5e-2, 2e-2, 1e-2)
    run = partial(fastattn.approximate, *head.arrays, scale=head.scale, rng=0)
    for tol in tols:
        call = partial(run, tol=tol)
        yield Entry(OURS, f"tol={tol:g}", OURS, call, ours=True)
    for method, setting in given(quick=quick):
        call = partial(run, tol=_ANY, method=method)
        family = f"{OURS} {type(method).__name__}"
        yield Entry(family, setting, OURS, call, ours=True)


def given(*, quick: bool) -> Iterator[tuple]:
    """Yield our methods at sizes given by hand."""
    yield fastattn.Exact(), ""
    for logits in ("int8", "bfloat16"):
        yield fastattn.Quantized(logits), logits
    sizes = ((1, 256), (256, 256), (561, 0))
    more = ((1, 64), (1, 1024), (128, 64), (561, 256), (561, 1024), (2000, 0))
    for rank, landmarks in sizes if quick else sizes + more:
        method = fastattn.Polynomial(rank=rank, landmarks=landmarks, basis="hermite")
        yield method, f"rank={rank}, landmarks={landmarks}"
    for threshold in (1e-2, 1e-4) if quick else (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        method = fastattn.Multipole(threshold=threshold)
        yield method, f"threshold={threshold:g}"


def times_over(unit: Callable, calls: list[Callable], rounds: int) -> list[list[float]]:
    """Time of each call over that of ``unit``, once a round, in alternating order.

    The unit is timed again whenever as much time as it takes has passed since, so
    that no call is compared with one long ago. Long calls that are slower than the unit
    in the first round are left out of later rounds.
    """
    ratios = [[] for _ in calls]
    numbers = list(range(len(calls)))
    unit()
    for _ in range(rounds):
        base, since = 0.0, 0.0
        for number in numbers:
            if since >= base:
                base, since = seconds(unit), 0.0
            took = seconds(calls[number])
            since += took
            ratios[number].append(took / base)
        lost = {x for x in numbers if ratios[x][0] * base > max(base, _LONG)}
        numbers = [x for x in reversed(numbers) if x not in lost]
    return ratios


def beaten_by(row: dict, rows: list[dict]) -> str:
    """Name the fastest of ours with less error and less time; "" where none is."""
    better = [
        other
        for other in rows
        if other["ours"]
        and other["head"] == row["head"]
        and other["error"] < row["error"]
        and other["time over torch"] < row["time over torch"]
    ]
    return min(better, key=lambda x: x["time over torch"])["method"] if better else ""


def unmatched(rows: list[dict]) -> Iterator[str]:
    """Yield, as lines, the useful cells of peers that no setting of ours beats."""
    cells = [
        row
        for row in rows
        if not row["ours"] and row["family"] != UNIT and row["error"] < _USEFUL
    ]
    left = [row for row in cells if not row["beaten by"]]
    yield (
        f"{len(cells) - len(left)} of {len(cells)} cells of peers under "
        f"{_USEFUL:.0%} error have more error and more time than one of ours"
    )
    for row in left:
        yield (
            f"  not beaten: {row['head']} {row['method']}: error {row['error']:.2e}, "
            f"{row['time over torch']:.3f} of torch's time"
        )
