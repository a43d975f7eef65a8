"""Linear attention one token at a time: a state whose size does not grow."""

import math
from typing import Any

import numpy as np

from fastattn._features import FeatureMap, Reader
from fastattn._linear_sums import Sums, check_weights, finish
from fastattn.linear import check_decay, check_map
from sketching._lib.arrays import Array, array_namespace, device_of, plain
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_flag, check_float_array, check_number

# numbers in the features of a block of keys
_BLOCK = 1 << 22
# leading dimensions, width of keys, width of values and dtype
_Kind = tuple[tuple[int, ...], int, int, Any]


class LinearState:
    r"""What linear attention remembers of the keys so far: one matrix for each head.

    A query sees all keys that were inserted before it, so that inserting a token and
    querying it gives the rows of :func:`linear_attention` with ``is_causal=True``. The
    state has a row for each feature, whatever the number of keys.

    Parameters
    ----------
    feature_map : FeatureMap
        As in :func:`linear_attention`.
    scale : float, optional
        As in :func:`linear_attention`.
    decay : float or array, optional
        What every key inserted before loses with each key: a number above 0 and up to
        1, or one for each head.
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
        "_features",
        "_kind",
        "_sums",
        "count",
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
        self.count = 0
        self._features: Reader | None = None
        self._kind: _Kind | None = None
        self._sums: Sums | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        if self._sums is None:
            return 0
        total = self._sums.total
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
        self._kind = self._checked_kind(key, value)
        if self._features is None:
            self._features = self._features_for(key)
        features, sums, count = self._features, self._sums, self.count
        width = features.key(key[..., :1, :], np.zeros(1))[0].shape[-1]
        rows = max(1, _BLOCK // (width * math.prod(key.shape[:-2])))
        for start in range(0, key.shape[-2], rows):
            block = slice(start, min(start + rows, key.shape[-2]))
            size = block.stop - start
            # a query that meets sums which overflowed is refused
            with np.errstate(over="ignore", invalid="ignore"):
                some = self._sum(key[..., block, :], value[..., block, :], count)
                sums = some if sums is None else self._faded(sums, size).plus(some)
            count += size
        self._sums, self.count = sums, count
        return self

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
        if self._features is None or self._sums is None or self._kind is None:
            raise ValueError("nothing was inserted yet: there is no key to see")
        _, d, _, dtype = self._kind
        if query.shape[-1] != d:
            raise ValueError(
                f"query: expected rows of {d} entries, as the keys, got {query.shape}"
            )
        if query.dtype != dtype:
            raise TypeError(f"query: expected {dtype}, as the keys, got {query.dtype}")
        xp = array_namespace(query, self._sums.total)
        # all queries stand where the last key does
        position = np.full(query.shape[-2], self.count - 1)
        found, row_log = self._features.query(query, position)
        with np.errstate(over="ignore", invalid="ignore"):
            mixed = xp.matmul(found, self._sums.total)
            value, total, _ = finish(
                mixed, row_log, self._sums.log, self.feature_map.offset, self.normalize
            )
            value = xp.astype(value, query.dtype, copy=False)
        if self.normalize or self.decay is None:
            check_weights(self.feature_map, total, None)
        if not bool(xp.all(xp.isfinite(value))):
            raise RefusalError(
                f"weights or sums overflow {self._features.dtype}: scale query, key or "
                "value down or pass arrays of a wider dtype"
            )
        return value

    def merge(self, other: "LinearState") -> "LinearState":
        """Add what another state remembers, as if its keys had come after these.

        Parameters
        ----------
        other : LinearState
            Of the same feature map and options; it stays as it is.

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
        if other._sums is None:
            return self
        if self._sums is None:
            self._features, self._sums = other._features, other._sums
            self._kind = other._kind
        elif self._sums.total.shape != other._sums.total.shape:
            raise ValueError(
                f"other: expected sums of shape {self._sums.total.shape}, got "
                f"{other._sums.total.shape}"
            )
        else:
            self._sums = self._faded(self._sums, other.count).plus(other._sums)
        self.count += other.count
        return self

    def _options(self) -> tuple[Any, ...]:
        decay = None if self.decay is None else self.decay.tolist()
        return self.feature_map, self.scale, decay, self.normalize

    def _checked_kind(self, key: Array, value: Array) -> _Kind:
        """Return what all keys and values have in common; raise if these have not."""
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected one row for each key of {key.shape}, got "
                f"{value.shape}"
            )
        kind = self._kind
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

    def _sum(self, key: Array, value: Array, count: int) -> Sums:
        """Sum over some keys, as seen from the last of them."""
        assert self._features is not None
        xp, m = array_namespace(key, value), key.shape[-2]
        features, log = self._features.key(key, count + np.arange(m))
        value = xp.astype(value, self._features.dtype, copy=False)
        if self.decay is not None:
            gap = np.arange(m)[::-1, None]
            features = features * self._power(key, gap)
        return Sums.of(features, value, log)

    def _faded(self, sums: Sums, steps: int) -> Sums:
        """Return the sums as seen from some positions later."""
        if self.decay is None:
            return sums
        return Sums(sums.total * self._power(sums.total, steps), sums.log)

    def _power(self, like: Array, gap: Any) -> Array:
        assert self._features is not None
        xp = array_namespace(like)
        power = self.decay[..., None, None] ** gap
        return xp.asarray(power, dtype=self._features.dtype, device=device_of(like))


def _checked(**arrays: Array) -> list[Array]:
    """Return arrays of one library, of finite numbers."""
    array_namespace(*arrays.values())
    found = []
    for name, x in arrays.items():
        check_float_array(name, plain(x), least_ndim=2)
        found.append(plain(x))
    return found
