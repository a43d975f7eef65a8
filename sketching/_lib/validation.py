"""Checks at the public boundary, and the messages that they give."""

import math
import numbers
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from sketching._lib.arrays import Array, array_namespace, is_sparse

# entries that are checked at once: masks of them stay small
_ENTRIES = 1 << 22
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_dense(name: str, x: Any) -> None:
    """Raise ``TypeError`` for sparse matrices, which NumPy takes for one object."""
    if is_sparse(x):
        raise TypeError(
            f"{name}: expected a dense array, got a sparse {type(x).__name__}: "
            "convert it with .toarray()"
        )


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; raise ``TypeError`` unless it is one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


def check_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None
) -> float:
    """Return ``value`` as a float; raise unless it is finite and large enough."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    if above is not None and not number > above:
        raise ValueError(f"{name}: expected a number above {above}, got {number}")
    if least is not None and not number >= least:
        raise ValueError(f"{name}: expected a number >= {least}, got {number}")
    return number


def check_integer(name: str, value: Any, *, least: int) -> int:
    """Return ``value`` as an int; raise unless it is an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return int(value)


def check_float_array(name: str, x: Array, *, least_ndim: int) -> None:
    """Raise unless ``x`` is a non-empty array of finite floating-point numbers."""
    check_float_shape(name, x, least_ndim=least_ndim)
    check_finite(name, x)


def check_float_shape(name: str, x: Array, *, least_ndim: int) -> None:
    """Raise unless ``x`` is a non-empty array of a floating-point dtype."""
    if str(x.dtype).rpartition(".")[2] not in _DTYPES:
        raise TypeError(
            f"{name}: expected a floating-point dtype, got {x.dtype}; "
            f"supported are {', '.join(_DTYPES)}"
        )
    if isinstance(x, np.ndarray) and x.dtype.kind != "f":
        raise TypeError(
            f"{name}: expected a floating-point dtype of NumPy, got {x.dtype} of "
            f"{x.dtype.type.__module__}: bfloat16 is supported in arrays of libraries "
            "that have it, such as torch; convert with x.astype(numpy.float32)"
        )
    if x.ndim < least_ndim:
        raise ValueError(
            f"{name}: expected at least {least_ndim} dimensions, got shape {x.shape}"
        )
    if math.prod(x.shape) == 0:
        raise ValueError(f"{name}: expected a non-empty array, got shape {x.shape}")


def check_finite(name: str, x: Array) -> None:
    """Raise ``ValueError`` that counts NaN and infinities and places the first."""
    if _is_plainly_finite(x):
        return
    count, first = 0, None
    for corner, block in _blocks(x):
        bad, where = not_finite(block)
        if bad:
            count += bad
            place = tuple(a + b for a, b in zip(corner, where, strict=True))
            first = place if first is None else min(first, place)
    if count:
        raise_not_finite(name, count, first)


def _is_plainly_finite(x: Array) -> bool:
    """Whether a finite sum of squares proves it, as for most small arrays."""
    if type(x) is not np.ndarray or x.dtype.char not in "fd" or x.size > _ENTRIES:
        return False
    if not x.flags.c_contiguous:
        return False
    return math.isfinite(_plain_sum(np, x))


def raise_not_finite(name: str, count: int, first: Any) -> NoReturn:
    """Say how many entries are not finite, and where the first is."""
    raise ValueError(
        f"{name}: expected finite numbers, got {count} NaN or infinite, "
        f"the first at {first}"
    )


def not_finite(x: Array) -> tuple[int, tuple[int, ...]]:
    """Count NaN and infinities, and place the first."""
    xp = array_namespace(x)
    # a sum is finite only if every entry is, and needs no mask of the array's size;
    # the mask decides when the sum merely overflowed
    if x.dtype in (xp.float32, xp.float64) and bool(xp.isfinite(_plain_sum(xp, x))):
        return 0, ()
    finite = xp.isfinite(x)
    if bool(xp.all(finite)):
        return 0, ()
    bad = xp.astype(xp.logical_not(finite), xp.int32)
    count, first = int(xp.sum(bad)), int(xp.argmax(xp.reshape(bad, (-1,))))
    place = []
    for size in reversed(x.shape):
        first, index = divmod(first, size)
        place.append(index)
    return count, tuple(reversed(place))


def _blocks(x: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield parts of an array along its longest axis, and where each begins."""
    if math.prod(x.shape) <= _ENTRIES:
        yield (0,) * x.ndim, x
        return
    axis = max(range(x.ndim), key=lambda i: x.shape[i])
    length = x.shape[axis]
    step = max(1, length * _ENTRIES // math.prod(x.shape))
    for start in range(0, length, step):
        part = [slice(None)] * x.ndim
        part[axis] = slice(start, min(start + step, length))
        yield tuple(start if i == axis else 0 for i in range(x.ndim)), x[tuple(part)]


def _plain_sum(xp: Any, x: Array) -> Any:
    """Sum of all entries, or of squares, without a warning where it is not finite."""
    # libraries that wrap NumPy warn as it does
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(x, np.ndarray) and x.flags.c_contiguous:
            # that of the squares serves as well, and BLAS reads as fast as memory can
            flat = x.reshape(-1)
            return np.dot(flat, flat)
        return xp.sum(x)
