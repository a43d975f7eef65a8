"""Time and memory of every method against n, each cell in a process of its own."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import fastattn
from benches.cases import CASES
from benches.measure import (
    exact_rows,
    exponent,
    faster,
    missing,
    peak_memory,
    sdpa,
    spread,
    threads,
)
from benches.tensor import inputs as tensor_inputs

# rows whose error is measured, and the side of the product that is the unit of time
_CHECKED, _UNIT = 64, 1024
# sizes are given by hand, without a tolerance: this one refuses nothing
_ANY = 1e6
_BOUNDED = CASES["bounded"]


@dataclass(frozen=True)
class Subject:
    """A method: ``prepare(n)`` gives the call, and the error of what it returns."""

    prepare: Callable
    sizes: tuple[int, ...]
    quick: tuple[int, ...] = ()
    # larger errors are wrong answers
    allowed: float = 1.0
    needs: tuple[str, ...] = ()


_QUADRATIC = (4096, 8192, 16384, 32768)
_NEAR_LINEAR = (16384, 65536, 262144)
_LINEAR = (16384, 65536, 262144, 1048576)


def subjects() -> dict[str, Subject]:
    """Every method that the figure shows, by its name there."""
    hermite = partial(fastattn.Polynomial, basis="hermite")
    causal = partial(_method, hermite(degree=2), tol=3e-2, is_causal=True)
    return {
        "torch SDPA": Subject(_sdpa, _QUADRATIC, (2048, 4096), 1e-5, ("torch",)),
        "Exact()": Subject(
            partial(_method, fastattn.Exact()), _QUADRATIC, (2048, 4096), 1e-5
        ),
        "Polynomial, degree 2": Subject(
            partial(_method, hermite(degree=2), tol=3e-2), _LINEAR, (4096, 16384), 3e-2
        ),
        "Polynomial, degree 2, causal": Subject(causal, _NEAR_LINEAR, (), 3e-2),
        "256 landmarks": Subject(
            partial(_method, hermite(rank=1, landmarks=256)), _NEAR_LINEAR
        ),
        "Multipole, threshold 1e-3": Subject(
            partial(_method, fastattn.Multipole(threshold=1e-3)), _QUADRATIC
        ),
        "linear, elu+1": Subject(_linear, _LINEAR, (4096, 16384), 1e-4),
        "tensor, Exact()": Subject(
            partial(_tensor, fastattn.Exact()), (256, 512, 1024, 2048), (), 1e-3
        ),
        "tensor, Polynomial()": Subject(
            partial(_tensor, fastattn.Polynomial()), (4096, 16384, 65536, 262144)
        ),
    }


def growth(*, quick):
    """Time and memory against n at fixed settings, with fitted exponents.

    Bounded inputs (logit deviation 0.3, d=64), tensors with entries in [-1, 1], d=8 at
    a proven 1e-3. Time is over that of a product of two 1024 x 1024 matrices, which
    alternates with the call; memory is the process's peak beyond inputs and
    output. `error`: of some rows, against the definition.
    """
    rows = []
    for name, subject in subjects().items():
        if lacking := missing(subject.needs):
            rows.append({"method": f"{name}: {lacking[0]} is not installed"})
            continue
        sizes = subject.quick if quick else subject.sizes
        found = [peak_memory(_CELL.format(name=name, n=n)) for n in sizes]
        if found:
            slope = exponent(list(sizes), [row["time over a product"] for row in found])
            rows += [row | {"fitted exponent": slope} for row in found]
    return rows


_CELL = """
import json
from benches.growth import cell
print(json.dumps(cell({name!r}, {n})))
"""


def cell(name: str, n: int) -> dict:
    """Measure one method at one size, in this process."""
    subject = subjects()[name]
    # torch takes longer to load than most calls
    with threads(1, with_torch="torch" in subject.needs):
        rng = np.random.default_rng(0)
        left, right = rng.standard_normal((2, _UNIT, _UNIT), dtype=np.float32)
        # compiles, and loads modules
        subject.prepare(min(n, 2048))[0]()
        call, error_of = subject.prepare(n)
        _forget()
        before = _status("VmRSS")
        answer = call()
        peak = _status("VmHWM")
        extra = (peak - before) / 1e6 - _size(answer) / 1e6
        error = error_of(answer)
        assert error is None or error <= subject.allowed, f"{name}: error {error:.2g}"
        del answer
        ratio = faster(lambda: left @ right, call, pairs=3)
    return {
        "method": name,
        "n": n,
        **spread("time over a product", ratio),
        "MB beyond inputs and output": max(extra, 0.0),
        "error": error,
    }


def _forget() -> None:
    """Return freed memory and reset the peak, so that only the call counts."""
    ctypes.CDLL(None).malloc_trim(0)
    # a kernel without it counts the making of the inputs too
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Bytes that the process holds, or its peak.

    Not getrusage: there a process starts with the peak of its parent.
    """
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def _size(answer) -> int:
    """Bytes of the output."""
    parts = [answer]
    if isinstance(answer, fastattn.Approximation):
        parts = [answer.value, answer.log_normalizer]
    return sum(x.nbytes for x in parts if x is not None)


def _bounded(n: int) -> Iterator[np.ndarray]:
    return (x for x in _BOUNDED.inputs(n, np.random.default_rng(0)))


def _sample(n: int, count: int = _CHECKED) -> np.ndarray:
    return np.sort(np.random.default_rng(1).choice(n, count, replace=False))


def _relative(answer, truth) -> float:
    return float(np.linalg.norm(answer - truth) / np.linalg.norm(truth))


def _method(method, n: int, *, tol: float = _ANY, **options) -> tuple:
    query, key, value = _bounded(n)

    def call():
        return fastattn.approximate(
            query, key, value,
            scale=_BOUNDED.scale, method=method, tol=tol, rng=0, **options,
        )  # fmt: skip

    def error_of(answer):
        some = _sample(n)
        if not options:
            truth = exact_rows(query, key, value, some, scale=_BOUNDED.scale)
        else:
            ends = [slice(0, i + 1) for i in some]
            truth = np.concatenate(
                [
                    exact_rows(query, key[x], value[x], [i], scale=_BOUNDED.scale)
                    for i, x in zip(some, ends, strict=True)
                ]
            )
        return _relative(answer.value[some], truth)

    return call, error_of


def _sdpa(n: int) -> tuple:
    arrays = list(_bounded(n))
    call = sdpa(*arrays, scale=_BOUNDED.scale)

    def error_of(answer):
        some = _sample(n)
        truth = exact_rows(*arrays, some, scale=_BOUNDED.scale)
        return _relative(answer[0, 0].numpy()[some], truth)

    return call, error_of


def _linear(n: int) -> tuple:
    query, key, value = _bounded(n)

    def error_of(answer):
        some = _sample(n)
        left, right = (
            np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1.0
            for x in (query[some].astype(np.float64), key.astype(np.float64))
        )
        weights = left @ right.T
        return _relative(answer[some], weights @ value / weights.sum(1, keepdims=True))

    feature_map = fastattn.EluPlusOne()
    call = partial(
        fastattn.linear_attention, query, key, value, feature_map=feature_map
    )
    return call, error_of


def _tensor(method, n: int) -> tuple:
    query, keys, values = tensor_inputs(n, 8, np.random.default_rng(0))

    def call():
        return fastattn.approximate(
            query, keys, values, tol=1e-3, method=method, guarantee="proven", rng=0
        )

    def error_of(answer):
        # all pairs of keys for each of few rows
        if n > 4096:
            return None
        some = _sample(n, 4)
        off = [answer.value[i] - _tensor_row(query[i], keys, values) for i in some]
        return float(np.abs(off).max())

    return call, error_of


def _tensor_row(query, keys, values) -> np.ndarray:
    """Attention of one query over all pairs, from the definition."""
    first, second = (x.astype(np.float64) for x in keys)
    weights = np.exp((query * first) @ second.T / len(query))
    sums = np.einsum("ij,ip,jp->p", weights, *values, optimize=True)
    return sums / weights.sum()
