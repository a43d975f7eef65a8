"""Measure the rates of the cost model on this machine by timing the library's methods.

Timings of each task alternate with timings of a matrix product, so that slow phases of
the machine affect both. Predicted work is linear in the rates, which are fitted to the
measured times by least squares, with a small ridge towards the built-in rates: these
determine rates that the times do not.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastattn._ops.quantized import attend_quantized, multiplies_quantized
from fastattn.costs.policy import POLICY
from fastattn.costs.rates import Rates, product_operands, time_product, timed, using
from fastattn.costs.work import exact_work, lowrank_work, quantized_work
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.multipole.method import Multipole, configured_multipole
from fastattn.problem.head import Head
from sketching._lib.arrays import Array

_NAMES = tuple(field.name for field in fields(Rates))


@dataclass(frozen=True, slots=True)
class Task:
    """A task that is timed, and its work predicted by the cost model.

    Parameters
    ----------
    run : callable
        Runs the task.
    work : callable
        Predicts its work, in multiply-adds, with the rates in force.
    """

    run: Callable[[], Any]
    work: Callable[[], float]


def calibrate() -> tuple[Rates, float]:
    """Measure the rates, and the seconds of a multiply-add, on one thread."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        tasks = _tasks(np.random.default_rng(0))
        operands = product_operands()
        times = np.empty((POLICY.calibration.rounds + 1, len(tasks), 2))
        for turn in times:
            for task, pair in zip(tasks, turn, strict=True):
                pair[:] = timed(task.run), time_product(*operands)
        # the first round compiles
        measured = np.median(times[1:, :, 0] / times[1:, :, 1], axis=0)
        return fit(tasks, measured), float(times[1:, :, 1].min())


def fit(tasks: list[Task], measured: Array) -> Rates:
    """Fit the rates to the measured times of the tasks, in multiply-adds."""
    policy = POLICY.calibration
    from scipy.optimize import lsq_linear

    start = np.array([getattr(Rates(), name) for name in _NAMES])
    base = _predicted(tasks, np.zeros_like(start))
    effects = np.stack(
        [_predicted(tasks, row) - base for row in np.diag(start)], axis=1
    )
    # residuals are relative: to the times, and to the built-in rates
    rows = np.concatenate(
        [effects / measured[:, None], policy.prior * np.eye(len(start))]
    )
    wanted = np.append(1 - base / measured, np.full(len(start), policy.prior))
    found = lsq_linear(rows, wanted, (1 / policy.factor, policy.factor)).x
    return _rates_of(found * start)


def _predicted(tasks: list[Task], numbers: Array) -> Array:
    with using(_rates_of(numbers)):
        return np.array([task.work() for task in tasks])


def _rates_of(numbers: Array) -> Rates:
    return Rates(*(float(x) for x in numbers))


def _tasks(rng: np.random.Generator) -> list[Task]:
    """Tasks of a few milliseconds each, which together determine every rate."""
    policy = POLICY.calibration
    heads = [_head(policy.flat_rows // 2, d, 1.0, rng) for d in (32, 64)]
    tasks = [Task(head.attend, _exact(head)) for head in heads]
    flat = _head(policy.flat_rows, 32, 0.5, rng)
    sample = PlanningSample.of(flat, rng)
    for rank, landmarks in policy.low_ranks:
        empty = LowRank.plan(sample, rank=rank, landmarks=landmarks, rng=rng)
        tasks.append(_low_rank(flat, empty))
    for n, error, clusters in POLICY.calibration.peaked:
        tasks.append(_multipole(_head(n, 32, 2.0, rng), error, Multipole(clusters)))
    if multiplies_quantized(flat.query):
        tasks += [_quantized(head, x) for head in heads for x in (False, True)]
    return tasks


def _exact(head: Head) -> Callable[[], float]:
    return lambda: exact_work(*head.sizes)


def _quantized(head: Head, integers: bool) -> Task:
    arrays = head.query, head.key, head.value
    options = {"scale": head.scale, "prefix_lengths": None, "integers": integers}
    return Task(
        lambda: attend_quantized(*arrays, **options),
        lambda: quantized_work(*head.sizes, integers=integers),
    )


def _low_rank(head: Head, empty: LowRank) -> Task:
    return Task(
        lambda: empty.insert(head.key, head.value).query(head.query),
        lambda: lowrank_work(*head.sizes, empty.rank, empty.landmarks),
    )


def _multipole(head: Head, error: float, method: Multipole) -> Task:
    """The multipole method: clustering, trial thresholds and the output."""

    def configured() -> Any:
        # without a budget no choice depends on the rates
        return configured_multipole(
            head, error, np.random.default_rng(0), method=method
        )

    def work() -> float:
        return float(configured().plan.work)

    return Task(lambda: configured().run(head), work)


def _head(n: int, d: int, spread: float, rng: np.random.Generator) -> Head:
    """Gaussian rows with decaying coordinates and a given logit deviation."""
    fade = np.arange(1, d + 1) ** -0.5
    fade *= (spread / np.linalg.norm(fade**2)) ** 0.5
    query, key, value = rng.standard_normal((3, n, d), dtype=np.float32)
    fade = fade.astype(np.float32)
    return Head(query * fade, key * fade, value, 1.0)
