"""How long each kind of work takes: built in, or measured on this machine and kept.

The built-in ratios were measured once (AVX-512, OpenBLAS). They are constants, so that
which method runs depends on the inputs and the seed, not on how busy the machine is.
``fastattn calibrate`` puts measured ones in force, by a file that every later process
reads when it first needs a rate.
"""

import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sketching._lib.arrays import Array
from sketching._lib.threads import single_threaded_blas
from sketching._ops.processor import compiles_for

# of the file; another layout gets another number
_FORMAT = 3
# instructions that bodies make a difference by
_INSTRUCTIONS = "avx2", "avx512f", "avx512vnni", "avx512bf16"
# the product that is timed
_ROWS, _COLUMNS, _KEYS = 1024, 64, 256


@dataclass(frozen=True, slots=True)
class Rates:
    """Multiply-adds inside a matrix product that take as long as one of each.

    Parameters
    ----------
    softmax : float
        One logit turned into a weight: maximum, exp and sum.
    monomial : float
        One monomial, or one landmark's weight, of one row.
    row : float
        One row read, centred and written by the passes of a low rank.
    parted : float
        One row put into a cluster or block, and its share of the trials.
    gathered : float
        One number of a key gathered for a block of queries.
    cluster : float
        One product of a query with what a cluster holds.
    coarse : float
        One multiply-add in eight bits, where the processor has them.
    weight : float
        One logit of those turned into a weight.
    """

    softmax: float = 7.0
    monomial: float = 6.0
    row: float = 1500.0
    parted: float = 75000.0
    gathered: float = 23.0
    cluster: float = 4.4
    coarse: float = 0.43
    weight: float = 5.0


class Speed(NamedTuple):
    """Rates with what they are rates of.

    Parameters
    ----------
    rates : Rates
        In multiply-adds inside a matrix product.
    product : float or None
        Seconds of one such multiply-add on one thread; None where it is yet to be
        measured.
    source : str
        Where the rates are from.
    """

    rates: Rates
    product: float | None
    source: str


def rates() -> Rates:
    """Return the rates in force."""
    return _overriding.get() or speed().rates


@contextmanager
def using(rates: Rates) -> Iterator[None]:
    """Put rates in force for the calls within."""
    token = _overriding.set(rates)
    try:
        yield
    finally:
        _overriding.reset(token)


@cache
def speed() -> Speed:
    """Read what was measured for this machine; else what is built in.

    A file that does not fit is ignored with a warning.
    """
    path = cache_path()
    built_in = Speed(Rates(), None, "built in")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            return _parse(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path} is ignored: {error}; run `fastattn calibrate` to measure again",
            stacklevel=2,
        )
    return built_in


def seconds_a_product() -> float:
    """Seconds of one multiply-add in a product of attention's shape, on one thread."""
    # two threads must not see two numbers: what is cheaper would be left to chance
    with _lock:
        known = speed().product
        return _measured_product() if known is None else known


def cache_path() -> Path:
    """Where rates are kept: $FASTATTN_CACHE, or by the XDG Base Directory rules."""
    # a user who is in no list of users has no home: the path stays as it is then
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(
        os.environ.get("FASTATTN_CACHE") or Path(home, "fastattn"), "rates.json"
    )


def keep(rates: Rates, product: float) -> Path:
    """Write measured rates for later processes; this one takes them, too."""
    import json
    from tempfile import NamedTemporaryFile

    path = cache_path()
    if path.parts[0] == "~":
        raise OSError("this user has no home: say where in FASTATTN_CACHE")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**_fitting(), "product": product, "rates": asdict(rates)}
    with NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        try:
            json.dump(record, file, indent=2)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink()
            raise
    speed.cache_clear()
    return path


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_product(x: Array, y: Array, out: Array) -> float:
    """Seconds that one multiply-add takes in a product."""
    return timed(lambda: np.matmul(x, y, out=out)) / float(out.size * len(y))


def product_operands() -> tuple[Array, Array, Array]:
    """What ``time_product`` multiplies, and where to: a block of logits in cache."""
    # two arrays: of one and itself BLAS computes a triangle
    x, y = (
        np.ones((_ROWS, _COLUMNS), np.float32),
        np.ones((_COLUMNS, _KEYS), np.float32),
    )
    return x, y, np.empty((_ROWS, _KEYS), np.float32)


@cache
def _measured_product() -> float:
    operands = product_operands()
    with single_threaded_blas():
        # the best of some: noise only ever adds
        return min(time_product(*operands) for _ in range(20))


def _parse(path: Path) -> Speed:
    """Read a file of rates; raise ``ValueError`` unless it is for this machine."""
    text = path.read_text(encoding="utf-8")
    import json

    try:
        record = json.loads(text)
        found, product = record["rates"], record["product"]
        numbers = [product, *(found[field.name] for field in fields(Rates))]
        known = len(found) == len(numbers) - 1
        known = known and all(math.isfinite(x) and x >= 0 for x in numbers)
    except (ValueError, KeyError, TypeError):
        record, known = {}, False
    if isinstance(record, dict) and record:
        for name, mine in _fitting().items():
            if record.get(name) != mine:
                raise ValueError(f"its {name} is {record.get(name)!r}, here {mine!r}")
    if not (known and product > 0):
        raise ValueError("it holds no complete set of rates")
    return Speed(Rates(**found), product, str(path))


def _fitting() -> dict[str, Any]:
    """What a file must agree with to be of use here."""
    # an import of the package by its own part would be a circle
    version = sys.modules["fastattn"].__version__
    return {"format": _FORMAT, "fastattn": version, "processor": processor()}


def processor() -> str:
    """Name of the processor, with what it can do that bodies make a difference by.

    Some names, as "AMD EPYC", stand for processors of several generations.
    """
    # numba is imported no earlier than a file of rates is read
    known = [name for name in _INSTRUCTIONS if compiles_for(name)]
    return " ".join([_name(), *known])


def _name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(":")
            if name.strip() == "model name":
                return text.strip()
    import platform

    return platform.processor() or platform.machine()


_overriding: ContextVar[Rates | None] = ContextVar("_overriding", default=None)
_lock = threading.Lock()


def _begin_as_child() -> None:
    """Let go of the lock: the thread that measured is not in the child."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_as_child)
