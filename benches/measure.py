"""Paired timing, correctness checks, and the environment of a measurement."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from fastattn.costs.rates import processor

# packages that are compared with, in addition to torch
PACKAGES = (
    "scipy",
    "scikit-learn",
    "faiss-cpu",
    "performer-pytorch",
    "darkformer-pytorch",
    "nystrom-attention",
    "taylor-series-linear-attention",
    "python-sat",
)


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than the opponent: median and extremes of pairs."""

    median: float
    low: float
    high: float

    def __str__(self):
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"

    @property
    def inverse(self) -> "Ratio":
        """Time of ours over the opponent's."""
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low)


def spread(column: str, ratio: Ratio) -> dict:
    """Columns of a measured number; ``--compare`` finds them by their names.

    More is better where the name begins with "times faster", else less is.
    """
    return {
        column: ratio.median,
        f"{column}, least": ratio.low,
        f"{column}, most": ratio.high,
    }


def faster(ours: Callable, theirs: Callable, *, pairs: int = 5) -> Ratio:
    """Time the two alternately, after one call of each that warms up."""
    ours()
    theirs()
    ratios = []
    for _ in range(pairs):
        own = seconds(ours)
        ratios.append(seconds(theirs) / own)
    return median_of(ratios)


def median_of(ratios: list[float]) -> Ratio:
    """Median and extremes."""
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def seconds(call: Callable) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of log time against log size, least squares."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


@contextmanager
def threads(count: int, *, with_torch: bool = True):
    """Limit BLAS, OpenMP, numba and torch to the same number of threads."""
    import numba

    # SciPy has a BLAS of its own: loaded later, it would not have the limit
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    torch = torch_or_none() if with_torch else None
    if torch is not None:
        torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    with threadpool_limits(count):
        yield


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def torch_or_none():
    """Return torch where it is installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def sdpa(query, key, value, *, scale, is_causal=False):
    """Wrap torch's scaled_dot_product_attention: a call without arguments."""
    torch = torch_or_none()
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (query, key, value)]
    while tensors[0].ndim < 4:
        tensors = [x[None] for x in tensors]
    attend = torch.nn.functional.scaled_dot_product_attention

    def call():
        with torch.no_grad():
            return attend(*tensors, scale=scale, is_causal=is_causal)

    return call


def exact_rows(query, key, value, rows, *, scale):
    """Attention of some rows from the definition, in float64."""
    logits = scale * query[rows].astype(np.float64) @ key.T.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ value.astype(np.float64) / weights.sum(axis=1, keepdims=True)


def environment() -> dict:
    """Versions, processor and threads."""
    import numba
    from threadpoolctl import threadpool_info

    torch = torch_or_none()
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "torch": None if torch is None else torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "blas": [
            {key: pool[key] for key in ("internal_api", "version", "num_threads")}
            for pool in threadpool_info()
            if pool["user_api"] == "blas"
        ],
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def comparable(found: dict) -> dict:
    """The parts of two environments that must be equal for times to be compared."""
    return {name: value for name, value in found.items() if name != "commit"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def peak_memory(code: str) -> dict:
    """Run Python ``code`` in a fresh process; it prints a JSON object last."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])
