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
        If an argument is no array, if the arrays come from two libraries, or if one is
        a tensor that requires gradients while its library tracks them.
    """
    for x in arrays:
        if not array_api_compat.is_array_api_obj(x):
            first = "x.toarray()" if is_sparse(x) else "numpy.asarray"
            kind = "a sparse " if is_sparse(x) else ""
            raise TypeError(
                f"expected arrays (numpy, cupy, torch, ...), got {kind}"
                f"{type(x).__name__}: convert with {first} first"
            )
        _check_gradients(x)
    names = sorted({type(x).__module__.partition(".")[0] for x in arrays})
    if len(names) > 1:
        raise TypeError(f"arrays of one library expected, got a mix: {names}")
    return array_api_compat.array_namespace(*arrays)


def _check_gradients(x: Array) -> None:
    """Raise ``TypeError`` for a tensor whose gradients would be lost in silence."""
    if not getattr(x, "requires_grad", False):
        return
    # the library is loaded already: it made the tensor
    library = sys.modules[type(x).__module__.partition(".")[0]]
    is_enabled = getattr(library, "is_grad_enabled", lambda: True)
    if is_enabled():
        raise TypeError(
            f"a tensor of shape {tuple(x.shape)} requires gradients, which this call "
            "does not track: wrap it in a torch.autograd.Function whose backward calls "
            "fastattn.attention_vjp (examples/torch_autograd.py), or call it under "
            "torch.no_grad() or with x.detach()"
        )


def is_sparse(x: Any) -> bool:
    """Whether ``x`` is a sparse matrix of SciPy or CuPy."""
    return ".sparse" in f".{type(x).__module__}." and hasattr(x, "toarray")


def place_of(*arrays: Array) -> str | None:
    """Where kernels exist for these arrays: "cpu", "gpu" or nowhere (None)."""
    first = type(arrays[0])
    if first.__module__ == "numpy":
        return "cpu" if _compiles() else None
    # cupy is used only if the caller has imported it
    if "cupy" in sys.modules and array_api_compat.is_cupy_array(arrays[0]):
        return "gpu"
    return None


def _compiles() -> bool:
    """Whether numba may compile: NUMBA_DISABLE_JIT=1 leaves the references."""
    # it has no such attribute yet while another thread imports it
    config = getattr(sys.modules.get("numba"), "config", None)
    is_off = getattr(config, "DISABLE_JIT", None)
    if is_off is not None:
        return not is_off
    try:
        return not int(os.environ.get("NUMBA_DISABLE_JIT", "0"))
    except ValueError:
        # as numba reads it
        return True


def device_of(x: Array) -> Any:
    """Return the device of ``x`` in its own library's terms."""
    return array_api_compat.device(x)


def plain(x: Array) -> Array:
    """Return the same numbers in native byte order and without their history.

    Where gradients would be tracked, :func:`array_namespace` has refused them.
    """
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
