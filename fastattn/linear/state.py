"""Linear attention one token at a time, by a state of constant size."""

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.linear.attention import check_decay, check_map
from fastattn.linear.heads import FeatureState, check_weights, finish
from fastattn.linear.protocol import FeatureMap, Reader
from sketching._lib.arrays import Array, array_namespace, device_of, plain
from sketching._lib.cell import Cell
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_flag, check_float_array, check_number

# numbers in the features of a block of keys
_BLOCK = 1 << 22
# leading dimensions, width of keys, width of values and dtype
_Kind = tuple[tuple[int, ...], int, int, Any]


class _Held(NamedTuple):
    """The contents of a state; replaced, never changed in place."""

    inserted: int = 0
    features: Reader | None = None
    kind: _Kind | None = None
    state: FeatureState | None = None


class LinearState:
    r"""The key-value state of linear attention, :math:`\phi(K)^\top [V, 1]` of a head.

    A query attends to all keys that were inserted before it, so that inserting a token
    and then querying it gives the rows of :func:`linear_attention` with
    ``is_causal=True``. The shape of the state is :math:`(r, p + 1)`, with :math:`r`
    features, whatever the number of keys.

    Thread safety: queries may run at the same time as each other and as one change;
    each is answered from the keys before or after the change. Changes are serialized.
    A change that raises, also ``KeyboardInterrupt``, leaves the state as it was.

    Parameters
    ----------
    feature_map : FeatureMap
        As in :func:`linear_attention`.
    scale : float, optional
        As in :func:`linear_attention`.
    decay : float or array, optional
        Factor of the weights of all earlier keys with each inserted key: above 0 and
        up to 1, one number or one for each head.
    normalize : bool, default True
        As in :func:`linear_attention`.

    Attributes
    ----------
    count : int
        Number of keys inserted.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import EluPlusOne, LinearState, linear_attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 8, 4))
    >>> state = LinearState(EluPlusOne())
    >>> rows = [
    ...     state.insert(key[i : i + 1], value[i : i + 1]).query(query[i : i + 1])
    ...     for i in range(8)
    ... ]
    >>> options = {"feature_map": EluPlusOne(), "is_causal": True}
    >>> whole = linear_attention(query, key, value, **options)
    >>> bool(np.allclose(np.concatenate(rows), whole))
    True
    >>> state.nbytes
    160
    """

    __slots__ = (
        "_cell",
        "decay",
        "feature_map",
        "normalize",
        "scale",
    )

    def __init__(
        self,
        feature_map: FeatureMap,
        *,
        scale: float | None = None,
        decay: float | Array | None = None,
        normalize: bool = True,
    ) -> None:
        check_map(feature_map)
        self.feature_map = feature_map
        self.scale = None if scale is None else check_number("scale", scale)
        self.decay: Any = None if decay is None else check_decay(decay)
        check_flag("normalize", normalize)
        self.normalize = normalize
        self._cell = Cell(_Held())

    def __copy__(self) -> "LinearState":
        """Return a copy that does not change with this state."""
        other = object.__new__(LinearState)
        for name in ("decay", "feature_map", "normalize", "scale"):
            setattr(other, name, getattr(self, name))
        other._cell = Cell(self._cell.value)
        return other

    @property
    def count(self) -> int:
        """Number of keys inserted."""
        return self._cell.value.inserted

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        state = self._cell.value.state
        if state is None:
            return 0
        total = state.total
        bits = int(array_namespace(total).finfo(total.dtype).bits)
        return int(math.prod(total.shape)) * bits // 8

    def insert(self, key: Array, value: Array) -> "LinearState":
        """Add keys and their values, in order.

        Parameters
        ----------
        key, value : array, shapes (..., m, d) and (..., m, p)
            Of the same leading dimensions, library and dtype at every call.

        Returns
        -------
        LinearState
            Itself.
        """
        key, value = _checked(key=key, value=value)
        self._cell.change(lambda held: (self._inserted(held, key, value), None))
        return self

    def _inserted(self, held: _Held, key: Array, value: Array) -> _Held:
        kind = self._checked_kind(held.kind, key, value)
        features = held.features or self._features_for(key)
        state, count = held.state, held.inserted
        width = features.key(key[..., :1, :], np.zeros(1))[0].shape[-1]
        rows = max(1, _BLOCK // (width * math.prod(key.shape[:-2])))
        for start in range(0, key.shape[-2], rows):
            block = slice(start, min(start + rows, key.shape[-2]))
            size = block.stop - start
            # queries of a state that overflowed are refused
            with np.errstate(over="ignore", invalid="ignore"):
                some = self._sum(
                    features, key[..., block, :], value[..., block, :], count
                )
                if state is not None:
                    some = self._faded(features, state, size).plus(some)
                state = some
            count += size
        return _Held(count, features, kind, state)

    def query(self, query: Array) -> Array:
        """Answer queries from the keys inserted so far.

        Parameters
        ----------
        query : array, shape (..., n, d)
            Leading dimensions broadcast against those of the keys.

        Returns
        -------
        array, shape (..., n, p)
        """
        (query,) = _checked(query=query)
        count, features, kind, state = self._cell.value
        if features is None or state is None or kind is None:
            raise ValueError("nothing was inserted yet: there is no key to attend to")
        _, d, _, dtype = kind
        if query.shape[-1] != d:
            raise ValueError(
                f"query: expected rows of {d} entries, as the keys, got {query.shape}"
            )
        if query.dtype != dtype:
            raise TypeError(f"query: expected {dtype}, as the keys, got {query.dtype}")
        xp = array_namespace(query, state.total)
        # all queries are at the position of the last key
        position = np.full(query.shape[-2], count - 1)
        found, row_log = features.query(query, position)
        with np.errstate(over="ignore", invalid="ignore"):
            mixed = xp.matmul(found, state.total)
            value, total, _ = finish(
                mixed, row_log, state.log, self.feature_map.offset, self.normalize
            )
            value = xp.astype(value, query.dtype, copy=False)
        if self.normalize or self.decay is None:
            check_weights(self.feature_map, total, None)
        if not bool(xp.all(xp.isfinite(value))):
            raise RefusalError(
                f"weights or sums overflow {features.dtype}: scale query, key or "
                "value down or pass arrays of a wider dtype"
            )
        return value

    def merge(self, other: "LinearState") -> "LinearState":
        """Add another state, as if its keys were inserted after those of this state.

        Parameters
        ----------
        other : LinearState
            Of the same feature map and options; it does not change.

        Returns
        -------
        LinearState
            Itself.
        """
        mine, theirs = self._options(), other._options()
        if mine != theirs:
            raise ValueError(f"other: expected a state of {mine}, got {theirs}")
        if self.feature_map.is_positional:
            raise ValueError(
                f"{self.feature_map} has features that depend on positions: states "
                "that both count from 0 do not add up"
            )
        added = other._cell.value
        self._cell.change(lambda held: (self._merged(held, added), None))
        return self

    def _merged(self, held: _Held, added: _Held) -> _Held:
        if added.state is None:
            return held
        if held.state is None or held.features is None:
            return added
        if held.state.total.shape != added.state.total.shape:
            raise ValueError(
                f"other: expected sums of shape {held.state.total.shape}, got "
                f"{added.state.total.shape}"
            )
        faded = self._faded(held.features, held.state, added.inserted)
        return held._replace(
            inserted=held.inserted + added.inserted, state=faded.plus(added.state)
        )

    def _options(self) -> tuple[Any, ...]:
        decay = None if self.decay is None else self.decay.tolist()
        return self.feature_map, self.scale, decay, self.normalize

    def _checked_kind(self, kind: _Kind | None, key: Array, value: Array) -> _Kind:
        """Return the common shapes and dtype of keys and values; raise on others."""
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected one row for each key of {key.shape}, got "
                f"{value.shape}"
            )
        if kind is None:
            kind = key.shape[:-2], key.shape[-1], value.shape[-1], key.dtype
        lead, d, p, dtype = kind
        shape = () if self.decay is None else self.decay.shape
        own = zip(reversed(shape), reversed(lead), strict=False)
        if len(shape) > len(lead) or any(size not in (1, of) for size, of in own):
            raise ValueError(
                f"decay: expected one number, or one for each head in {lead}, got "
                f"shape {shape}"
            )
        for name, x, width in (("key", key, d), ("value", value, p)):
            if x.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, as before, got {x.dtype}")
            if (*x.shape[:-2], x.shape[-1]) != (*lead, width):
                wanted = ", ".join(map(str, (*lead, "rows", width)))
                raise ValueError(
                    f"{name}: expected shape ({wanted}), as before, got {x.shape}"
                )
        return kind

    def _features_for(self, key: Array) -> Reader:
        d = key.shape[-1]
        scale = self.feature_map.default_scale(d) if self.scale is None else self.scale
        return Reader.of(self.feature_map, key, scale)

    def _sum(
        self, reader: Reader, key: Array, value: Array, count: int
    ) -> FeatureState:
        """The state over some keys, with decay relative to the last of them."""
        xp, m = array_namespace(key, value), key.shape[-2]
        features, log = reader.key(key, count + np.arange(m))
        value = xp.astype(value, reader.dtype, copy=False)
        if self.decay is not None:
            gap = np.arange(m)[::-1, None]
            features = features * self._power(reader, key, gap)
        return FeatureState.of(features, value, log)

    def _faded(self, reader: Reader, state: FeatureState, steps: int) -> FeatureState:
        """Return the state after the decay of a number of positions."""
        if self.decay is None:
            return state
        return FeatureState(
            state.total * self._power(reader, state.total, steps), state.log
        )

    def _power(self, reader: Reader, like: Array, gap: Any) -> Array:
        xp = array_namespace(like)
        power = self.decay[..., None, None] ** gap
        return xp.asarray(power, dtype=reader.dtype, device=device_of(like))


def _checked(**arrays: Array) -> list[Array]:
    """Check that arrays are of one library, and finite; return them."""
    array_namespace(*arrays.values())
    found = []
    for name, x in arrays.items():
        check_float_array(name, plain(x), least_ndim=2)
        found.append(plain(x))
    return found
