"""The demo: errors and times on real heads, and a plot of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastattn import Exact, Polynomial, approximate, load_sample, sample_names
from sketching._lib.arrays import Array

# a head with bounded logits, where the polynomial method is faster
BOUNDED = "gaussian-bounded"
# least and largest number of timed rounds, and seconds after which no round starts
_ROUNDS = (3, 15)
_PATIENCE = 0.5
# rows of float64 logits at a time
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Measurement:
    """One head at one tolerance.

    Parameters
    ----------
    sample, head : str, int
        Which head of which sample.
    tol : float
        The tolerance.
    method : object
        The method that ran.
    certified, measured : float
        The certificate's relative error, and the true one in float64.
    time_ratio : float
        Median time relative to the median time of exact attention, same run.
    """

    sample: str
    head: int
    tol: float
    method: Any
    certified: float
    measured: float
    time_ratio: float


def case_names() -> list[str]:
    """Return the names of the cases that the demo knows."""
    return [*sample_names(), BOUNDED]


def load_cases(names: Sequence[str]) -> Iterator[tuple[str, int, list[Array]]]:
    """Yield the heads of the named cases, each with its sample and number."""
    for name in names:
        if name not in case_names():
            raise ValueError(f"samples: expected some of {case_names()}, got {name!r}")
    for name in names:
        inputs = _bounded() if name == BOUNDED else load_sample(name)
        for head in range(len(inputs[0])):
            yield name, head, [x[head] for x in inputs]


def measure(
    sample: str, head: int, inputs: Sequence[Array], tols: Sequence[float]
) -> list[Measurement]:
    """Run one head at every tolerance, and exact attention in the same rounds."""
    runs = [
        partial(approximate, *inputs, tol=max(tols), method=Exact(), rng=0),
        *(partial(approximate, *inputs, tol=tol, rng=0) for tol in tols),
    ]
    answers, seconds = _timed(runs)
    truth = _definition(*inputs)
    return [
        Measurement(
            sample,
            head,
            tol,
            answer.plan.method,
            float(answer.certificate.error),
            float(np.linalg.norm(answer.value - truth) / np.linalg.norm(truth)),
            took / seconds[0],
        )
        for tol, answer, took in zip(tols, answers[1:], seconds[1:], strict=True)
    ]


def warm_up() -> None:
    """Compile the kernels before they are timed."""
    x = np.random.default_rng(0).standard_normal((2048, 8)).astype(np.float32)
    for method in (Exact(), Polynomial(landmarks=8)):
        approximate(x * 0.1, x * 0.1, x, tol=1.0, method=method, rng=0)


def check_picture(path: str) -> None:
    """Raise the errors of :func:`draw` for a path, before the measurements."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install 'fastattn[cli]'"
        ) from error
    place = Path(path)
    suffixes = [f".{name}" for name in Figure().canvas.get_supported_filetypes()]
    if place.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a file name that ends in one of {suffixes}")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {place.parent}")


def draw(measurements: Sequence[Measurement], path: str) -> None:
    """Draw errors against tolerances, and times relative to exact attention."""
    # a Figure without pyplot draws with Agg and does not change pyplot's state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    errors, times = figure.subplots(1, 2)
    places, width = _spread(measurements)
    samples = list(dict.fromkeys(m.sample for m in measurements))
    for number, sample in enumerate(samples):
        color = _COLORS[number % len(_COLORS)]
        chosen = [i for i, m in enumerate(measurements) if m.sample == sample]
        own, x = [measurements[i] for i in chosen], places[chosen]
        certified = [max(m.certified, _LEAST) for m in own]
        measured = [max(m.measured, _LEAST) for m in own]
        errors.vlines(x, measured, certified, color=color, linewidth=0.8, alpha=0.5)
        errors.scatter(x, certified, **_CERTIFIED, color=color)
        errors.scatter(x, measured, **_MEASURED, edgecolor=color)
        times.scatter(x, [m.time_ratio for m in own], 28, color=color, label=sample)
    tols = np.unique([m.tol for m in measurements])
    # the diagonal, level across the heads that share a tolerance
    errors.hlines(
        tols, tols / width, tols * width, color="0.2", zorder=1, label="tolerance"
    )
    errors.scatter([], [], **_CERTIFIED, color="0.4", label="certified")
    errors.scatter([], [], **_MEASURED, edgecolor="0.4", label="measured")
    errors.set(title="Relative error of a head", yscale="log")
    times.axhline(1, color="0.2", linewidth=1, zorder=1)
    times.set(title="Time relative to exact attention", yscale="log")
    times.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for axes, least, most in ((errors, 1e-7, 1.0), (times, 0.09, 11.0)):
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, least), max(high, most))
        axes.set(xscale="log", xlabel="tolerance")
        axes.set_xticks(tols, [f"{tol:g}" for tol in tols])
        axes.set_xticks([], minor=True)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=150)


def _spread(measurements: Sequence[Measurement]) -> tuple[Array, float]:
    """Abscissas that separate the heads of one tolerance, and the largest factor."""
    heads = list(dict.fromkeys((m.sample, m.head) for m in measurements))
    tols = np.array([m.tol for m in measurements])
    distinct = np.unique(np.log(tols))
    width = 0.35 * (np.diff(distinct).min() if len(distinct) > 1 else 1.0)
    number = np.array([heads.index((m.sample, m.head)) for m in measurements])
    midpoint = (len(heads) - 1) / 2
    offset = (number - midpoint) / max(midpoint, 1) * 0.9
    return tols * np.exp(width * offset), float(np.exp(width))


def _bounded() -> tuple[Array, Array, Array]:
    """Gaussian heads with logits of standard deviation 0.3."""
    n, d = 16384, 64
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, n, d), dtype=np.float32)
    # the logits q.k / sqrt(d) have the variance of an entry of q times one of k
    return query * np.float32(0.3**0.5), key * np.float32(0.3**0.5), value


def _definition(query: Array, key: Array, value: Array) -> Array:
    """Softmax attention in float64, by its definition."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    out = np.empty((len(query), value.shape[1]))
    for start in range(0, len(query), _BLOCK):
        rows = slice(start, start + _BLOCK)
        logits = query[rows] @ key.T * query.shape[1] ** -0.5
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[rows] = weights @ value / weights.sum(axis=1, keepdims=True)
    return out


def _timed(runs: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[float]]:
    """Return the results and median seconds of calls, alternating between them."""
    least, most = _ROUNDS
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < least or (
        len(rounds) < most and time.perf_counter() - begin < _PATIENCE
    ):
        answers, seconds = [], []
        for run in runs:
            start = time.perf_counter()
            answers.append(run())
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return answers, [float(x) for x in np.median(rounds, axis=0)]


# errors of zero are drawn at this value
_LEAST = 1e-17
_CERTIFIED: dict[str, Any] = {"s": 30, "marker": "v", "linewidths": 0}
_MEASURED: dict[str, Any] = {"s": 22, "marker": "o", "facecolor": "white"}
# distinguishable with colour blindness (Okabe and Ito)
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
