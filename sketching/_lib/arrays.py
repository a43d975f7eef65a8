"""Arrays follow the inputs: their library, their device, their precision."""

import os
import sys
from typing import Any, TypeAlias

import array_api_compat

# an array of any library that follows the array API standard; shapes and dtypes
# are the business of docstrings and of validation
Array: TypeAlias = Any


def array_namespace(*arrays: Array) -> Any:
    """Return the one array-API namespace that all ``arrays`` belong to.

    Raises
    ------
    TypeError
        If an argument is no array, or if the arrays come from two libraries.
    """
    for x in arrays:
        if not array_api_compat.is_array_api_obj(x):
            raise TypeError(
                f"expected arrays (numpy, cupy, torch, ...), got {type(x).__name__}: "
                "convert with numpy.asarray first"
            )
    names = sorted({type(x).__module__.partition(".")[0] for x in arrays})
    if len(names) > 1:
        raise TypeError(f"arrays of one library expected, got a mix: {names}")
    return array_api_compat.array_namespace(*arrays)


def place_of(*arrays: Array) -> str | None:
    """Where fast bodies live for these arrays: "cpu", "gpu" or nowhere (None)."""
    first = type(arrays[0])
    if first.__module__ == "numpy":
        return "cpu" if _compiles() else None
    # cupy is only ever looked for when somebody else imported it
    if "cupy" in sys.modules and array_api_compat.is_cupy_array(arrays[0]):
        return "gpu"
    return None


def _compiles() -> bool:
    """Whether numba may compile: NUMBA_DISABLE_JIT=1 leaves the references."""
    if "numba" in sys.modules:
        return not sys.modules["numba"].config.DISABLE_JIT
    try:
        return not int(os.environ.get("NUMBA_DISABLE_JIT", "0"))
    except ValueError:
        # as numba reads it
        return True


def device_of(x: Array) -> Any:
    """Return the device of ``x`` in its own library's terms."""
    return array_api_compat.device(x)


def plain(x: Array) -> Array:
    """Return the same numbers in native byte order and without their gradients."""
    if array_api_compat.is_torch_array(x):
        return x.detach() if x.requires_grad else x
    if array_api_compat.is_numpy_array(x) and not x.dtype.isnative:
        return x.astype(x.dtype.newbyteorder("="))
    return x


def to_host(x: Array) -> Array:
    """Copy a *small* array to a NumPy array: statistics, never inputs.

    bfloat16, which NumPy does not have, arrives as float32.
    """
    import numpy as np

    if array_api_compat.is_numpy_array(x):
        return x
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
        return (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return np.from_dlpack(x)


def mover(like: Array, dtype: Any) -> Any:
    """Return a function that brings host arrays to where ``like`` is, as ``dtype``."""
    import numpy as np

    xp, device = array_namespace(like), device_of(like)
    return lambda x: xp.asarray(np.ascontiguousarray(x), dtype=dtype, device=device)


def compute_dtype(xp: Any, dtype: Any) -> Any:
    """Half precision is computed in float32, everything else in itself."""
    return dtype if dtype in (xp.float32, xp.float64) else xp.float32
