"""Tensor attention: one head, and checked inputs of a batch of heads."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn._ops.tensor import attend_tuples
from fastattn.problem.batch import Batch, check_rows, pick, place_of_head, read_mask
from fastattn.problem.head import AttentionHead, gather_rows
from fastattn.problem.plan import HeadAnswer
from fastattn.tensor.logit_bounds import LogitBounds
from sketching._lib.arrays import Array, array_namespace, device_of, plain
from sketching._lib.certificate import Approximation
from sketching._lib.lazy import lazy
from sketching._lib.validation import check_flag, check_float_array, check_number


@dataclass(frozen=True, eq=False)
class TensorHead(AttentionHead):
    """The inputs of one head of order ``len(keys) + 1``.

    Parameters
    ----------
    query : array, shape (n, d)
        The queries.
    keys, values : tuple of array, shapes (m, d) and (m, p)
        The factors; their lengths may differ.
    scale : float
        The factor of the logits.
    prefix_lengths : tuple of integer array, shape (n,), or None
        Row ``i`` attends to the first ``prefix_lengths[s][i]`` keys of factor ``s``.
    places : tuple of integer array, shape (m,), or None
        Positions of the keys of each factor before some were masked.
    """

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    scale: float
    prefix_lengths: tuple[Array, ...] | None = None
    places: tuple[Array, ...] | None = None

    @property
    def order(self) -> int:
        """The number of factors, the query included."""
        return len(self.keys) + 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of keys of each factor."""
        return tuple(int(key.shape[0]) for key in self.keys)

    @lazy
    def sizes(self) -> tuple[int, int, int, int]:
        """n, number of tuples of keys, d and p."""
        n, d = self.query.shape
        return n, math.prod(self.lengths), d, self.values[0].shape[1]

    @lazy
    def logit_bounds(self) -> LogitBounds:
        """Bounds on the logits and values; there must be a tuple."""
        return LogitBounds.of((self.query, *self.keys), self.values, self.scale)

    @lazy
    def largest_value(self) -> float:
        """Bound on the largest product of values."""
        return math.prod(map(float, self.logit_bounds.largest_values.max(axis=1)))

    def trimmed(self) -> "TensorHead":
        """Return the head without the last keys, to which no row attends."""
        if self.prefix_lengths is None:
            return self
        seen = [int(self.xp.max(x)) for x in self.prefix_lengths]
        keys = tuple(x[:m, :] for x, m in zip(self.keys, seen, strict=True))
        values = tuple(x[:m, :] for x, m in zip(self.values, seen, strict=True))
        return replace(self, keys=keys, values=values)

    def with_rows(self, rows: Array) -> "TensorHead":
        """Return the head of the queries with indices ``rows``."""
        prefix_lengths = self.prefix_lengths
        if prefix_lengths is not None:
            prefix_lengths = tuple(gather_rows(x, rows) for x in prefix_lengths)
        query = gather_rows(self.query, rows)
        return replace(self, query=query, prefix_lengths=prefix_lengths)

    def attend(self, dtype: Any = None) -> tuple[Array, Array]:
        """Exact outputs and log-sum-exps, in ``dtype`` (default: the head's own)."""
        xp = self.xp
        dtype = self.dtype if dtype is None else dtype
        n, tuples, _, p = self.sizes
        if tuples == 0:
            where = {"dtype": dtype, "device": device_of(self.query)}
            return xp.zeros((n, p), **where), xp.full((n,), -xp.inf, **where)
        # the longest factor last: the others are expanded
        order = np.argsort(self.lengths, kind="stable")
        prefix_lengths = self.prefix_lengths
        return attend_tuples(
            xp.astype(self.query, dtype, copy=False),
            tuple(self.keys[s] for s in order),
            tuple(self.values[s] for s in order),
            scale=self.scale,
            prefix_lengths=None
            if prefix_lengths is None
            else tuple(prefix_lengths[s] for s in order),
        )


@dataclass(frozen=True, slots=True, eq=False)
class TensorBatch:
    """Checked inputs of tensor attention, broadcast over their leading dimensions."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    key_mask: tuple[Array | None, ...]
    scale: float
    is_causal: bool
    lead: tuple[int, ...]

    @staticmethod
    def of(
        query: Array,
        keys: Any,
        values: Any,
        scale: float | None,
        is_causal: bool,
        key_mask: Any,
    ) -> "TensorBatch":
        """Check all inputs of a call."""
        keys, values = _as_tuple("keys", keys), _as_tuple("values", values)
        masks: tuple[Any, ...] = (None,) * len(keys)
        if key_mask is not None:
            masks = _as_tuple("key_mask", key_mask)
        for name, given in (("values", values), ("key_mask", masks)):
            if len(given) != len(keys):
                raise ValueError(
                    f"{name}: expected {len(keys)} entries, one for each of keys, got "
                    f"{len(given)}"
                )
        query, keys, values = _checked_arrays(query, keys, values)
        is_causal = check_flag("is_causal", is_causal)
        inputs = (query, *keys, *values)
        shapes = [x.shape[:-2] for x in inputs]
        masks = _checked_masks(masks, keys, inputs)
        shapes += [mask.shape[:-1] for mask in masks if mask is not None]
        try:
            lead = np.broadcast_shapes(*shapes)
        except ValueError as error:
            raise ValueError(
                "leading dimensions of query, keys, values and key_mask do not "
                f"broadcast: {shapes}"
            ) from error
        factor = 1 / query.shape[-1] if scale is None else check_number("scale", scale)
        return TensorBatch(query, keys, values, masks, factor, is_causal, lead)

    @property
    def count(self) -> int:
        """Number of heads."""
        return math.prod(self.lead)

    def heads(self) -> Iterator[TensorHead]:
        """Yield the heads in C order."""
        return map(self.head, range(self.count))

    def head(self, number: int) -> TensorHead:
        """Return one head, in C order; only masked keys are copied."""
        place = place_of_head(number, self.lead)
        one = zip(self.keys, self.values, self.key_mask, strict=True)
        # masks and prefix lengths of each factor are those of a pairwise head
        factors = [
            Batch(
                self.query, key, value, mask, self.scale, self.is_causal, self.lead
            ).head(number)
            for key, value, mask in one
        ]
        return TensorHead(
            pick(self.query, place),
            tuple(x.key for x in factors),
            tuple(x.value for x in factors),
            self.scale,
            tuple(x.prefix_lengths for x in factors) if self.is_causal else None,
            self._places(place) if any(x is not None for x in self.key_mask) else None,
        )

    def _places(self, place: tuple[int, ...]) -> tuple[Array, ...]:
        """Indices of the keys of the head at ``place`` that are not masked."""
        xp = array_namespace(self.query)
        return tuple(
            xp.arange(key.shape[-2], device=device_of(key))
            if mask is None
            else xp.nonzero(pick(mask, place, 1))[0]
            for key, mask in zip(self.keys, self.key_mask, strict=True)
        )

    def assemble(self, answers: list[HeadAnswer]) -> Approximation:
        """Stack the answers of the heads in the shape of the batch."""
        key, value = self.keys[0], self.values[0]
        whole = Batch(self.query, key, value, None, self.scale, False, self.lead)
        return whole.assemble(answers)


def _as_tuple(name: str, given: Any) -> tuple[Any, ...]:
    """Return a tuple; raise unless it is one, with at least one entry."""
    if not isinstance(given, tuple):
        raise TypeError(
            f"{name}: expected a tuple, one entry for each factor, got "
            f"{type(given).__name__}"
        )
    if not given:
        raise ValueError(f"{name}: expected at least one factor, got none")
    return given


def _checked_masks(
    masks: tuple[Any, ...], keys: tuple[Array, ...], inputs: tuple[Array, ...]
) -> tuple[Any, ...]:
    """Check the masks of factors that have one."""
    xp = array_namespace(inputs[0])
    found: list[Any] = []
    for s, (key, mask) in enumerate(zip(keys, masks, strict=True)):
        if mask is None:
            found.append(None)
        else:
            found.append(read_mask(f"key_mask[{s}]", xp, mask, key, inputs))
    return tuple(found)


def _checked_arrays(
    query: Array, keys: tuple[Array, ...], values: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Raise unless arrays are finite, of one library and dtype, and shapes match."""
    named = {"query": query}
    named |= {f"keys[{s}]": x for s, x in enumerate(keys)}
    named |= {f"values[{s}]": x for s, x in enumerate(values)}
    array_namespace(*named.values())
    named = {name: plain(x) for name, x in named.items()}
    for name, x in named.items():
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: expected an array without a mask, got MaskedArray: leave "
                "keys out with key_mask"
            )
        check_float_array(name, x, least_ndim=2)
    dtypes = {name: str(x.dtype) for name, x in named.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"one dtype expected, got {dtypes}")
    query, *rest = named.values()
    keys, values = tuple(rest[: len(keys)]), tuple(rest[len(keys) :])
    for s, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key.shape[-1] != query.shape[-1]:
            raise ValueError(
                f"query has {query.shape[-1]} columns and keys[{s}] has {key.shape[-1]}"
            )
        if value.shape[-1] != values[0].shape[-1]:
            raise ValueError(
                f"values[0] has {values[0].shape[-1]} columns and values[{s}] has "
                f"{value.shape[-1]}"
            )
        try:
            check_rows(key, value)
        except ValueError as error:
            raise ValueError(f"factor {s}: {error}") from error
    return query, keys, values
