"""Whether products of entries of a head stay in range, and the errors by underflow."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fastattn.certificates.rounding import largest_number, smallest_number
from fastattn.tensor.logit_bounds import maps_of, product
from fastattn.tensor.problem import TensorHead
from sketching._lib.arrays import Array, mover
from sketching._lib.certificate import RefusalError

# largest error by underflow of partial products, relative to the largest product
_NEGLIGIBLE = 1e-10


def balanced(head: TensorHead) -> TensorHead:
    """The same head in float64 with scale one, its factors balanced.

    Partial products of its entries overflow or underflow float64 only if complete
    products do, or if the factors that balance them do.

    Raises
    ------
    RefusalError
        If a factor that balances them overflows or underflows.
    """

    def scaled(arrays: tuple[Array, ...], maps: tuple[Array, ...]) -> Iterator[Array]:
        for x, factors in zip(arrays, maps, strict=True):
            move = mover(x, head.xp.float64)
            yield head.xp.astype(x, head.xp.float64) * move(factors)

    logit_bounds = head.logit_bounds
    maps = maps_of(logit_bounds.largest_values, 1.0)
    if not np.isfinite(np.concatenate([*logit_bounds.maps, *maps])).all():
        raise RefusalError(
            "query, keys and values differ too much in size to be balanced in "
            "float64: scale them so that their products stay in range"
        )
    query, *keys = scaled((head.query, *head.keys), logit_bounds.maps)
    values = tuple(scaled(head.values, maps))
    return replace(head, query=query, keys=tuple(keys), values=values, scale=1.0)


def in_range(head: TensorHead, dtype: Any) -> bool:
    """Whether products of entries, and sums of them, stay in the range of ``dtype``.

    A partial product that underflows may be multiplied by large factors later: the
    error must be negligible relative to the largest product of values.
    """
    bounds = head.logit_bounds
    values = head.sizes[1] * size_of(bounds.largest_values)
    size = size_of(bounds.largest, head.scale)
    peak = float(product(bounds.largest_values).max())
    lost = smallest_number(head.xp, dtype) * values if peak > 0 else 0.0
    fits = max(size, values) < largest_number(head.xp, dtype) / 4
    return fits and lost <= _NEGLIGIBLE * peak


def lost_of_products(head: TensorHead, dtype: Any) -> float:
    """Bound the error of an output entry by underflow of partial products of values.

    A partial product that underflows in ``dtype`` may be multiplied by large factors
    later.
    """
    tiny = smallest_number(head.xp, dtype)
    return 2 * head.sizes[1] * tiny * size_of(head.logit_bounds.largest_values)


def lost_products(head: TensorHead, dtype: Any, size: tuple[float, float]) -> float:
    """Bound the error by underflow of products and outputs, relative to the output.

    Outputs underflow in the dtype of the query; ``size`` is their
    ``scaled_frobenius``.
    """
    peak, norm = size
    if head.logit_bounds.largest_values.min(axis=0).max() == 0:
        # all products are zero
        return 0.0
    if not (math.isfinite(peak) and peak > 0):
        return math.inf
    n, _, _, p = head.sizes
    entry = lost_of_products(head, dtype)
    entry += smallest_number(head.xp, head.query.dtype) / 2
    return entry / peak * math.sqrt(n * p) / norm


def size_of(largest: Array, scale: float = 0.0) -> float:
    """Bound on products of an entry of each array, or of some of them, and a scale.

    ``largest`` has the largest absolute entries of an array in each row.
    """
    return math.prod(max(1.0, float(x)) for x in largest.max(axis=1)) * (abs(scale) + 1)
