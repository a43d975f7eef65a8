"""Profiles, array libraries and compiled code that all tests share."""

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.laws", "tests.prepared_laws", "tests.chance")

# a law is one function that every subclass of its suite runs
_SUITES = [HealthCheck.differing_executors, HealthCheck.too_slow]
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=_SUITES,
)
settings.register_profile(
    "explore", deadline=None, max_examples=500, suppress_health_check=_SUITES
)
# rates that a developer has calibrated would change which method runs
_CACHE = tempfile.TemporaryDirectory(prefix="fastattn-tests-")
os.environ["FASTATTN_CACHE"] = _CACHE.name
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_itemcollected(item):
    """Mark the tests of kernels, which run as on other processors, too."""
    # assertions of the suites are rewritten, and hypothesis is set up, before
    from tests.laws import OpLaws

    is_op = item.cls is not None and issubclass(item.cls, OpLaws)
    if is_op or "_ops" in item.path.parts:
        item.add_marker(pytest.mark.kernel)


def pytest_collection_modifyitems(config, items):
    """Skip the tests of a GPU as one where there is no CuPy."""
    if importlib.util.find_spec("cupy") is not None:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    reason = f"cupy is not installed: {len(gpu)} tests of GPU kernels cannot run"
    gpu[0].add_marker(pytest.mark.skip(reason=reason))
    dropped = set(gpu[1:])
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=gpu[1:])


@dataclass(frozen=True)
class Library:
    """One array library as a test sees it."""

    name: str
    asarray: Any
    array_type: type

    def asarrays(self, *arrays):
        return tuple(self.asarray(x) for x in arrays)

    def dtype_name(self, x):
        return str(x.dtype).rpartition(".")[2]


def _read_only(x):
    x = np.array(x)
    x.flags.writeable = False
    return x


def _numpy():
    return Library("numpy", np.array, np.ndarray)


def _numpy_read_only():
    return Library("numpy read-only", _read_only, np.ndarray)


def _strict():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict missing")
    return Library("array_api_strict", strict.asarray, type(strict.asarray(0.0)))


def _torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return Library("torch", lambda x: torch.from_numpy(np.array(x)), torch.Tensor)


@pytest.fixture(params=[_numpy, _numpy_read_only, _strict, _torch])
def xp(request):
    """Each array library in turn: plain, read-only, the strict one, torch."""
    return request.param()


@pytest.fixture
def rng():
    """A fixed stream of random numbers."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def _warm():
    """Compile every jitted function once, so that an error in one fails fast."""
    import fastattn

    for dtype in (np.float32, np.float64):
        x = np.linspace(-1, 1, 24, dtype=dtype).reshape(6, 4)
        for method in (fastattn.Exact(), fastattn.Polynomial(degree=2)):
            fastattn.attention(x, x, x, method=method, tol=10, rng=0)


@pytest.fixture(scope="module")
def example(request):
    """The script in ``examples`` that a test module names as its ``EXAMPLE``."""
    name = request.module.EXAMPLE
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
