"""Checked inputs as a batch of heads, and answers of heads as one result."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastattn.problem.head import Head
from fastattn.problem.plan import HeadAnswer
from sketching._lib.arrays import Array, array_namespace, device_of, mover, plain
from sketching._lib.certificate import Approximation, Certificate, RefusalError
from sketching._lib.threads import parallel_map
from sketching._lib.validation import (
    check_finite,
    check_flag,
    check_float_shape,
    check_number,
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Checked inputs, broadcast over their leading dimensions."""

    query: Array
    key: Array
    value: Array
    key_mask: Array | None
    scale: float
    is_causal: bool
    lead: tuple[int, ...]

    @staticmethod
    def of(
        query: Array,
        key: Array,
        value: Array,
        scale: float | None,
        is_causal: bool,
        key_mask: Array | None,
        *,
        finite: bool = True,
    ) -> "Batch":
        """Check the inputs; with ``finite=False`` the caller checks for NaN."""
        xp = array_namespace(query, key, value)
        query, key, value = plain(query), plain(key), plain(value)
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_unmasked(name, x)
            check_float_shape(name, x, least_ndim=2)
            if finite:
                check_finite(name, x)
        check_shapes(query, key, value)
        is_causal = check_flag("is_causal", is_causal)
        d = query.shape[-1]
        factor = d**-0.5 if scale is None else check_number("scale", scale)
        shapes = [x.shape[:-2] for x in (query, key, value)]
        if key_mask is not None:
            inputs = (query, key, value)
            key_mask = read_mask("key_mask", xp, key_mask, key, inputs)
            shapes.append(key_mask.shape[:-1])
        try:
            lead = np.broadcast_shapes(*shapes)
        except ValueError as error:
            raise ValueError(
                "leading dimensions do not broadcast: "
                f"query {query.shape}, key {key.shape}, value {value.shape}"
                + ("" if key_mask is None else f", key_mask {key_mask.shape}: {_FORMS}")
            ) from error
        return Batch(query, key, value, key_mask, factor, is_causal, lead)

    def check_finite(self) -> None:
        """Raise ``ValueError`` if a number is not finite."""
        for name in ("query", "key", "value"):
            check_finite(name, getattr(self, name))

    @property
    def count(self) -> int:
        """Number of heads."""
        return math.prod(self.lead)

    def heads(self) -> Iterator[Head]:
        """Yield the heads in C order."""
        return map(self.head, range(self.count))

    def head(self, number: int) -> Head:
        """Return one head, in C order; only keys and values under a mask are copied."""
        xp = array_namespace(self.query)
        place = place_of_head(number, self.lead)
        query, key, value = (pick(x, place) for x in (self.query, self.key, self.value))
        prefix_lengths = None
        n, m = query.shape[0], key.shape[0]
        if self.is_causal:
            count = xp.arange(1, n + 1, device=device_of(query))
            prefix_lengths = xp.where(count < m, count, xp.full_like(count, m))
        if self.key_mask is not None:
            mask = pick(self.key_mask, place, 1)
            if prefix_lengths is not None:
                seen = xp.cumulative_sum(xp.astype(mask, xp.int64))
                prefix_lengths = xp.take(seen, prefix_lengths - 1)
            kept = xp.nonzero(mask)[0]
            key, value = xp.take(key, kept, axis=0), xp.take(value, kept, axis=0)
        return Head(query, key, value, self.scale, prefix_lengths)

    def assemble(self, answers: list[HeadAnswer]) -> Approximation:
        """Put the heads' answers back into the shape of the batch."""
        xp = array_namespace(self.query)
        n, p = self.query.shape[-2], self.value.shape[-1]

        def stacked(parts: list[Array], shape: tuple[int, ...]) -> Array:
            if len(parts) == 1:
                return xp.reshape(parts[0], self.lead + shape)
            return xp.reshape(xp.stack(parts), self.lead + shape)

        def field(name: str, dtype: Any) -> Any:
            values = [getattr(answer, name) for answer in answers]
            return over_heads(values, self.lead, dtype)

        certificate = Certificate(
            field("error", np.float64),
            field("failure", np.float64),
            answers[0].norm,
            field("source", object),
        )
        return Approximation(
            stacked([answer.value for answer in answers], (n, p)),
            certificate,
            field("plan", object),
            stacked([answer.log_normalizer for answer in answers], (n,)),
            self._log_errors([answer.log_error for answer in answers]),
        )

    def _log_errors(self, errors: list[Array | None]) -> Array | None:
        """Bounds of all rows in the shape of the batch, in float64; None if unknown."""
        if all(error is None for error in errors):
            return None
        n = self.query.shape[-2]
        unknown = np.full(n, np.inf)
        found = np.stack([unknown if error is None else error for error in errors])
        move = mover(self.query, array_namespace(self.query).float64)
        return move(found.reshape((*self.lead, n)))


def each_head(
    lead: tuple[int, ...], like: Array, work: Callable[[int], _T]
) -> list[_T]:
    """Call ``work`` with the number of every head, in parallel on the CPU.

    ``lead`` are the leading dimensions, ``like`` is any array of the batch.
    """

    def one(number: int) -> _T:
        with named_head(place_of_head(number, lead)):
            return work(number)

    return parallel_map(one, range(math.prod(lead)), like)


@contextmanager
def named_head(place: Sequence[int]) -> Iterator[None]:
    """Let a refusal say which head of a batch it is about."""
    try:
        yield
    except RefusalError as error:
        if place:
            error.args = (f"head {name_of(place)}: {error}",)
        raise


def place_of_head(number: int, lead: tuple[int, ...]) -> tuple[int, ...]:
    """Index of a head, given its number in C order."""
    return tuple(int(i) for i in np.unravel_index(number, lead))


def name_of(place: Sequence[int]) -> str:
    """Format the index of a head."""
    return ",".join(map(str, place)) or "-"


def over_heads(values: list[Any], lead: tuple[int, ...], dtype: Any) -> Any:
    """The value of a single head, or an array over the leading dimensions."""
    if not lead:
        return values[0]
    array = np.empty(len(values), dtype=dtype)
    array[:] = values
    return array.reshape(lead)


def own_place(x: Array, place: tuple[int, ...], trailing: int = 2) -> tuple[int, ...]:
    """Index of the head at ``place`` in an array whose leading dimensions broadcast."""
    lead = x.shape[: x.ndim - trailing]
    place = place[len(place) - len(lead) :]
    return tuple(i if size > 1 else 0 for i, size in zip(place, lead, strict=True))


def pick(x: Array, place: tuple[int, ...], trailing: int = 2) -> Array:
    """Take the head at ``place`` of an array whose leading dimensions broadcast."""
    return x[own_place(x, place, trailing) + (slice(None),) * trailing]


def check_unmasked(name: str, x: Array) -> None:
    """Raise ``TypeError`` for NumPy's masked arrays, whose mask would be lost."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected an array without a mask, got {type(x).__name__}: "
            "leave keys out with key_mask"
        )


def check_shapes(query: Array, key: Array, value: Array) -> None:
    """Raise ``ValueError`` where the last two dimensions do not fit together."""
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if len(dtypes) > 1:
        raise TypeError(
            f"one dtype expected: query is {query.dtype}, key {key.dtype}, value "
            f"{value.dtype}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has {query.shape[-1]} columns and key has {key.shape[-1]}"
        )
    check_rows(key, value)


def check_rows(key: Array, value: Array) -> None:
    """Raise ``ValueError`` unless there is a value for each key."""
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key has {key.shape[-2]} rows and value has {value.shape[-2]}"
        )


# the two readings of an ambiguous key mask
_FORMS = (
    "a mask for each sequence, (batch, keys), is passed as key_mask[:, None], a mask "
    "for each head, (heads, keys), as key_mask[None]"
)


def read_mask(
    name: str, xp: Any, key_mask: Array, key: Array, inputs: tuple[Array, ...]
) -> Array:
    """Check a mask of keys; return it without an axis of queries."""
    check_mask(name, xp, key_mask, key, inputs[0])
    try:
        lead = np.broadcast_shapes(*(x.shape[:-2] for x in inputs))
    except ValueError:
        # reported where the inputs are checked
        return key_mask
    return placed_mask(name, key_mask, lead)


def placed_mask(name: str, key_mask: Array, lead: tuple[int, ...]) -> Array:
    """Return a mask of keys that broadcasts to heads; raise where it is ambiguous.

    Dimensions are aligned on the right, as in broadcasting. A mask with fewer
    dimensions than the inputs that would also fit when aligned on the left is refused:
    (batch, keys) where there are as many heads as sequences, or single heads, which it
    would broadcast to (batch, batch).
    """
    own = tuple(key_mask.shape[:-1])
    has_queries = len(own) == len(lead) + 1 and own[-1] == 1
    if has_queries and _fits(own[:-1], lead):
        # an axis of queries, as masks of scaled_dot_product_attention have one
        return key_mask[..., 0, :]
    if len(own) >= len(lead) or max(own, default=1) == 1:
        return key_mask
    fits_right = _fits(own, lead[len(lead) - len(own) :])
    if _fits(own, lead[: len(own)]) and (fits_right or len(lead) == 2):
        raise ValueError(
            f"{name}: expected a mask for each of the heads, {tuple(lead)}, got shape "
            f"{tuple(key_mask.shape)}, which can be read in two ways: {_FORMS}"
        )
    return key_mask


def _fits(own: tuple[int, ...], lead: tuple[int, ...]) -> bool:
    """Whether dimensions broadcast to ``lead``, of the same length, unchanged."""
    return all(a in (1, b) for a, b in zip(own, lead, strict=True))


def check_mask(name: str, xp: Any, key_mask: Array, key: Array, query: Array) -> None:
    """Raise unless the mask is boolean, of the inputs' library, one entry a key."""
    try:
        array_namespace(key_mask, query)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    check_unmasked(name, key_mask)
    if key_mask.dtype != xp.bool:
        raise TypeError(
            f"{name}: expected a boolean array (True keeps a key), got {key_mask.dtype}"
        )
    if key_mask.ndim < 1 or key_mask.shape[-1] != key.shape[-2]:
        raise ValueError(
            f"{name}: expected {key.shape[-2]} entries in the last dimension, one a "
            f"key, got shape {tuple(key_mask.shape)}"
        )
    if math.prod(key_mask.shape) == 0:
        raise ValueError(
            f"{name}: expected a non-empty array, got shape {tuple(key_mask.shape)}"
        )
