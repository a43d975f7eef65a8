"""Rates of the cost model: the time of each kind of work relative to a multiply-add.

The built-in rates were measured once (AVX-512, OpenBLAS). They are constants, so that
the choice of a method depends on the inputs and the seed, not on the load of the
machine. ``fastattn calibrate`` measures rates and writes them to a file, which every
later process reads when it first needs a rate.
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

# version of the file format
_FORMAT = 3
# instruction sets that select different kernels
_INSTRUCTIONS = "avx2", "avx512f", "avx512vnni", "avx512bf16"
# sizes of the matrix product that is timed
_ROWS, _COLUMNS, _KEYS = 1024, 64, 256


@dataclass(frozen=True, slots=True)
class Rates:
    """Time of each kind of work, in multiply-adds of a float32 matrix product.

    Parameters
    ----------
    softmax : float
        Softmax of one logit: maximum, exp and sum.
    monomial : float
        One basis function (monomial or landmark) of one row.
    row : float
        Fixed work of one row in a low rank: read, centred and written.
    parted : float
        One row assigned to a cluster or block, and its share of the trial runs.
    gathered : float
        One entry of a key gathered for a block of queries.
    cluster : float
        One multiply-add of a query with the moments of a cluster.
    coarse : float
        One multiply-add of a bfloat16 matmul, where the processor has them.
    weight : float
        Softmax of one logit of an int8/bfloat16 matmul.
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
    """Rates, with the absolute time of a multiply-add.

    Parameters
    ----------
    rates : Rates
        In multiply-adds of a matrix product.
    product : float or None
        Seconds of one multiply-add on one thread; None if not measured yet.
    source : str
        "built in", or the path of the file with the rates.
    """

    rates: Rates
    product: float | None
    source: str


def rates() -> Rates:
    """Return the rates in force."""
    return _overriding.get() or speed().rates


@contextmanager
def using(rates: Rates) -> Iterator[None]:
    """Use other rates in a ``with`` block."""
    token = _overriding.set(rates)
    try:
        yield
    finally:
        _overriding.reset(token)


@cache
def speed() -> Speed:
    """Return the rates measured on this machine, else the built-in ones.

    A file for another machine or version is ignored with a warning.
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
    """Seconds of one multiply-add, in a matmul of a block of logits, on one thread."""
    # all threads must use the same number, or the choice of a method would vary
    with _lock:
        known = speed().product
        return _measured_product() if known is None else known


def cache_path() -> Path:
    """Path of the file of rates: $FASTATTN_CACHE, or in the XDG cache directory."""
    # for a user without an entry in the user database the path keeps its "~"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(
        os.environ.get("FASTATTN_CACHE") or Path(home, "fastattn"), "rates.json"
    )


def keep(rates: Rates, product: float) -> Path:
    """Write measured rates for later processes, and use them in this one."""
    import json
    from tempfile import NamedTemporaryFile

    path = cache_path()
    if path.parts[0] == "~":
        raise OSError("this user has no home directory: set FASTATTN_CACHE")
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
    """Seconds of one multiply-add in a matrix product."""
    return timed(lambda: np.matmul(x, y, out=out)) / float(out.size * len(y))


def product_operands() -> tuple[Array, Array, Array]:
    """Operands and output of ``time_product``: a block of logits that fits in cache."""
    # two different arrays: for ``x @ x.T`` BLAS would compute one triangle only
    x, y = (
        np.ones((_ROWS, _COLUMNS), np.float32),
        np.ones((_COLUMNS, _KEYS), np.float32),
    )
    return x, y, np.empty((_ROWS, _KEYS), np.float32)


@cache
def _measured_product() -> float:
    operands = product_operands()
    with single_threaded_blas():
        # the minimum: noise only adds time
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
    """The entries of a file that must match this process."""
    # not imported: that would be circular
    version = sys.modules["fastattn"].__version__
    return {"format": _FORMAT, "fastattn": version, "processor": processor()}


def processor() -> str:
    """Name of the processor, with the instruction sets that select kernels.

    A name alone, such as "AMD EPYC", may stand for several generations.
    """
    # imports numba, but only when a file of rates is read
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
    """Renew the lock: a thread that holds it does not exist in the child process."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_as_child)
