"""Arrays follow the inputs: one library, its device, its precision."""

import sys
from types import ModuleType

import numpy as np
import pytest

from sketching._lib.arrays import (
    array_namespace,
    compute_dtype,
    device_of,
    place_of,
    plain,
    to_host,
)


def test_namespace_makes_arrays_of_the_inputs_library(xp):
    namespace = array_namespace(*xp.asarrays(np.ones(2), np.zeros(3)))
    assert isinstance(namespace.zeros(2), xp.array_type)


def test_a_place_is_known_while_another_thread_imports_numba(monkeypatch):
    # a module that is being imported has no attributes yet
    monkeypatch.setitem(sys.modules, "numba", ModuleType("numba"))
    monkeypatch.delenv("NUMBA_DISABLE_JIT", raising=False)
    assert place_of(np.ones(1)) == "cpu"
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert place_of(np.ones(1)) is None


def test_libraries_do_not_mix():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict missing")
    with pytest.raises(TypeError, match=r"mix: \['array_api_strict', 'numpy'\]"):
        array_namespace(np.ones(2), strict.ones(2))


@pytest.mark.parametrize("thing", [[1.0], 1.0, None, "array", (np.ones(2),)])
def test_what_is_no_array_is_refused_by_its_type(thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}: convert with"):
        array_namespace(np.ones(2), thing)


def test_only_numpy_has_kernels_on_the_cpu(xp):
    expected = "cpu" if xp.array_type is np.ndarray else None
    assert place_of(xp.asarray(np.ones(2))) == expected


def test_subclasses_of_numpy_run_the_reference():
    class Other(np.ndarray):
        pass

    assert place_of(np.ones(2).view(Other)) is None


def test_device_makes_arrays_there(xp):
    x = xp.asarray(np.ones(2))
    assert array_namespace(x).zeros(2, device=device_of(x)).shape == (2,)


def test_host_copy_has_the_numbers(xp):
    x = np.arange(6.0).reshape(2, 3)
    got = to_host(xp.asarray(x))
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("want", ["float16", "bfloat16", "float32", "float64"])
def test_half_precision_is_computed_in_single(want):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    xp = array_namespace(torch.zeros(1))
    expected = torch.float64 if want == "float64" else torch.float32
    assert compute_dtype(xp, getattr(torch, want)) == expected


def test_a_tensor_of_half_precision_reaches_the_host():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.tensor([1.0, 0.5], dtype=torch.bfloat16)
    np.testing.assert_array_equal(to_host(x).astype(float), [1.0, 0.5])


def test_plain_arrays_stay_themselves(xp):
    x = xp.asarray(np.ones(3))
    assert plain(x) is x


@pytest.mark.parametrize("order", "<>")
def test_byte_order_becomes_native(order):
    x = np.arange(3).astype(f"{order}f4")
    got = plain(x)
    assert got.dtype.isnative
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x)


def test_gradients_stay_outside():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.ones(3, requires_grad=True)
    assert not plain(x).requires_grad
    np.testing.assert_array_equal(to_host(x), 1)
