"""Linear attention of one head: the key-value state, and the answers of queries."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._ops.linear import divided, key_sums, prefix_products, row_means
from fastattn.linear.protocol import FeatureMap, Reader
from fastattn.problem.head import Head
from sketching._lib.arrays import Array, array_namespace, device_of, place_of, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.threads import parallel_map, run_blocks
from sketching._lib.validation import not_finite

# features of a block of rows, which fit in cache; least and largest number of rows
_BLOCK = 1 << 18
_ROWS = (64, 4096)
# tasks, each with its own sums: independent of the number of threads
_TASKS = 16


@dataclass(frozen=True, slots=True, eq=False)
class FeatureState:
    """The key-value state: sums over keys of features times ``[value, 1]``.

    Parameters
    ----------
    total : array, shape (..., r, p + 1)
        The sums, divided by ``exp(log)``.
    log : array, shape (..., 1, 1), or None
        None for features without factors.
    """

    total: Array
    log: Array | None

    @staticmethod
    def of(features: Array, value: Array, log: Array | None) -> "FeatureState":
        """The state over keys, whose factors have the logarithms ``log``."""
        xp = array_namespace(features)
        extended, top = extend(value, log)
        return FeatureState(xp.matmul(xp.matrix_transpose(features), extended), top)

    def relative_to(self, log: Array | None) -> Array:
        """Return the sums divided by ``exp(log)`` for another ``log``."""
        if log is None or self.log is None:
            return self.total
        xp = array_namespace(self.total)
        # without keys the sums are zero, and their factor is minus infinity
        gap = xp.where(xp.isfinite(self.log), self.log - log, xp.zeros_like(log))
        return self.total * xp.exp(gap)

    def plus(self, other: "FeatureState") -> "FeatureState":
        """Add the state over other keys."""
        top = None
        if self.log is not None and other.log is not None:
            xp = array_namespace(self.log, other.log)
            top = xp.where(self.log > other.log, self.log, other.log)
        return FeatureState(self.relative_to(top) + other.relative_to(top), top)


def extend(
    value: Array, log: Array | None, least: Array | None = None
) -> tuple[Array, Array | None]:
    """Return ``[value, 1]`` times the keys' factors, divided by the largest of them.

    The divisor is at least ``exp(least)``; its logarithm is returned too.
    """
    xp = array_namespace(value)
    extended = xp.concat([value, xp.ones_like(value[..., :1])], axis=-1)
    if log is None:
        return extended, None
    if value.shape[-2]:
        top = xp.max(log, axis=-2, keepdims=True)
        if least is not None:
            top = xp.where(top > least, top, least)
    else:
        top = least
    return extended * xp.exp(log - top), top


def finish(
    sums: Array,
    row_log: Array | None,
    key_log: Array | None,
    offset: float,
    normalize: bool,
    out: Any = None,
) -> tuple[Array, Array, Array]:
    """Outputs, sums of weights, and logarithms of their factors, from weighted sums."""
    if normalize:
        value, total = divided(sums, offset=offset, out=out)
    else:
        value, total = sums[..., :-1], sums[..., -1] + offset
    return with_logs(value, total, row_log, key_log, normalize)


def with_logs(
    value: Array,
    total: Array,
    row_log: Array | None,
    key_log: Array | None,
    normalize: bool,
) -> tuple[Array, Array, Array]:
    """Return outputs, sums of weights, and logarithms of their factors."""
    xp = array_namespace(total)
    if row_log is None:
        return value, total, xp.zeros_like(total)
    log = (row_log + key_log)[..., 0]
    return (value if normalize else value * xp.exp(log)[..., None]), total, log


def least_total(xp: Any, dtype: Any) -> float:
    """Return the least sum of weights that is not dominated by underflow."""
    kind = xp.finfo(dtype)
    return float(kind.smallest_normal) / float(kind.eps)


def check_weights(feature_map: FeatureMap, total: Array, sees: Array | None) -> None:
    """Raise RefusalError if all weights of a row that approximate softmax vanish.

    ``sees`` is False for rows that attend to no key.
    """
    if not feature_map.approximates_softmax:
        return
    xp = array_namespace(total)
    lost = xp.abs(total) <= least_total(xp, total.dtype)
    if sees is not None:
        lost = xp.logical_and(lost, sees)
    count = int(xp.count_nonzero(lost))
    if count:
        raise RefusalError(
            f"all weights of {count} rows vanish in {total.dtype}: logits are too "
            f"large for {feature_map}; use attention() instead"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The output of linear attention of one head.

    Parameters
    ----------
    value : array, shape (n, p)
        The output.
    total : array, shape (n,)
        Sums of the weights, divided by ``exp(log)``.
    log : array, shape (n,)
        Logarithms of the factors of the sums.
    """

    value: Array
    total: Array
    log: Array


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """One head with its features.

    Parameters
    ----------
    head : Head
    features : Reader
    column : integer array, shape (m,)
        On the host: positions of the keys before some were masked.
    decay : float or None
        Factor of the weight of a key for each position between it and the row.
    normalize : bool
        Whether a row is divided by the sum of its weights.
    check : callable, optional
        Raises the error of inputs that are not finite; None if they were checked.
    """

    head: Head
    features: Reader
    column: Array
    decay: float | None = None
    normalize: bool = True
    check: Callable[[], None] | None = None

    @property
    def prefix_lengths(self) -> Array:
        """Prefix lengths of the rows of a sequential head, on the host."""
        return to_host(self.head.prefix_lengths).astype(np.int64)

    @property
    def rows(self) -> int:
        """Number of rows of a block."""
        features, _ = self.features.key(self.head.key[:1, :], self.column[:1])
        return min(max(_BLOCK // int(features.shape[-1]), _ROWS[0]), _ROWS[1])

    @property
    def is_sequential(self) -> bool:
        """Whether rows have different states, so that there is no state of all keys."""
        return self.head.prefix_lengths is not None or self.head.sizes[1] == 0

    def answer(self, state: FeatureState | None = None) -> Answer:
        """Answer all queries; a row whose weights add up to zero gets zeros.

        ``state`` is the result of ``state()``, if that has been computed.
        """
        n, m, _, p = self.head.sizes
        if m == 0:
            like = {"dtype": self.features.dtype, "device": device_of(self.head.query)}
            zeros = self.head.xp.zeros((n, p + 2), **like)
            return Answer(zeros[:, :p], zeros[:, p], zeros[:, p + 1])
        if self.is_sequential:
            return self._causal(self.rows)
        return self._whole(self.state() if state is None else state, self.rows)

    def state(self) -> FeatureState:
        """The state over all keys: each task sums its own blocks."""
        m, size = self.head.sizes[1], self.rows
        span = size * -(-m // (size * _TASKS))

        def part(start: int) -> FeatureState:
            features, log, value = self.key(slice(start, min(start + size, m)))
            if log is None:
                return FeatureState(key_sums(features, value), None)
            return FeatureState.of(features, value, log)

        def work(first: int) -> FeatureState:
            starts = range(first, min(first + span, m), size)
            return functools.reduce(FeatureState.plus, map(part, starts))

        found = parallel_map(work, range(0, m, span), self.head.query)
        return functools.reduce(FeatureState.plus, found)

    def key(self, rows: slice) -> tuple[Array, Array | None, Array]:
        """Features of some keys, their factors' logarithms, and the values."""
        head, xp = self.head, self.head.xp
        self._check_finite(head.key[rows, :], head.value[rows, :])
        features, log = self.features.key(head.key[rows, :], self.column[rows])
        value = xp.astype(head.value[rows, :], self.features.dtype, copy=False)
        return features, log, value

    def query(self, rows: slice) -> tuple[Array, Array | None]:
        """Features of some queries and their factors' logarithms."""
        position = np.arange(rows.start, rows.stop)
        self._check_finite(self.head.query[rows, :])
        return self.features.query(self.head.query[rows, :], position)

    def _check_finite(self, *arrays: Array) -> None:
        if self.check and any(not_finite(x)[0] for x in arrays):
            self.check()

    def finish(
        self, sums: Array, row_log: Array | None, key_log: Array | None, out: Any = None
    ) -> tuple[Array, Array, Array]:
        """Outputs, sums of weights, and logarithms of their factors, of some rows."""
        offset = self.features.map.offset
        return finish(sums, row_log, key_log, offset, self.normalize, out)

    def check_weights(self, total: Array, rows: slice) -> None:
        """Raise RefusalError if all softmax-like weights of a row vanish."""
        prefix_lengths = self.head.prefix_lengths
        sees = None if prefix_lengths is None else prefix_lengths[rows] > 0
        # by decay, weights may rightly vanish
        if self.head.sizes[1] and (self.normalize or self.decay is None):
            check_weights(self.features.map, total, sees)

    def _whole(self, state: FeatureState, size: int) -> Answer:
        n, _, _, p = self.head.sizes
        options = {"offset": self.features.map.offset, "normalize": self.normalize}

        def work(rows: slice, out: Any) -> tuple[Array, Array, Array]:
            features, log = self.query(rows)
            value, total = row_means(features, state.total, **options, out=out)
            return with_logs(value, total, log, state.log, self.normalize)

        return Answer(*each_block(work, n, size, p, like=state.total))

    def _causal(self, size: int) -> Answer:
        (n, _, _, p), prefix_lengths, place = (
            self.head.sizes,
            self.prefix_lengths,
            self.place,
        )
        state, done = _empty(*self.query(slice(0, 1)), p), 0

        def work(rows: slice, out: Any) -> tuple[Array, Array, Array]:
            nonlocal state, done
            last = int(prefix_lengths[rows][-1])
            left, row_log = self.query(rows)
            right, log, value = self.key(slice(done, last))
            extended, top = extend(value, log, state.log)
            found, total = prefix_products(
                left,
                right,
                extended,
                state.relative_to(top),
                prefix_lengths=prefix_lengths[rows] - done,
                **self.fading(slice(done, last), rows, place),
            )
            state, done = FeatureState(total, top), last
            return self.finish(found, row_log, top, out)

        return Answer(*each_block(work, n, size, p, like=state.total, in_turn=True))

    @property
    def place(self) -> Array:
        """Positions of the rows of a sequential head, for decay.

        Normalization cancels a common factor of all weights of a row. So normalized
        rows take the position of the last key that they attend to, whose weight then
        cannot underflow.
        """
        if self.decay is None or not self.normalize or self.features.map.offset:
            return np.arange(self.head.sizes[0])
        prefix_lengths = self.prefix_lengths
        return np.where(
            prefix_lengths > 0, self.column[np.maximum(prefix_lengths, 1) - 1], 0
        )

    def fading(self, keys: slice, rows: slice, place: Array) -> dict[str, Any]:
        """The options of ``prefix_products`` for decay."""
        if self.decay is None:
            return {}
        return {
            "decay": self.decay,
            "row": place[rows],
            "column": self.column[keys],
            "origin": int(place[max(rows.start - 1, 0)]),
        }


def each_block(
    work: Callable[[slice, Any], tuple[Array, ...]],
    n: int,
    size: int,
    p: int,
    like: Array,
    in_turn: bool = False,
) -> tuple[Array, ...]:
    """Call ``work(rows, out)`` for blocks of rows, and concatenate the results.

    It returns outputs, ``(rows, p)``, and two numbers for each row. It may write the
    outputs into ``out`` if that is not None. ``in_turn`` calls it in order.
    """
    blocks = [slice(s, min(s + size, n)) for s in range(0, n, size)]
    if place_of(like) != "cpu":
        xp = array_namespace(like)
        parts = zip(*(work(rows, None) for rows in blocks), strict=True)
        return tuple(xp.concat(list(x)) for x in parts)
    outs = tuple(np.empty((n, *shape), like.dtype) for shape in ((p,), (), ()))

    def call(number: int) -> None:
        rows = blocks[number]
        value, *others = work(rows, outs[0][rows])
        # outputs that were written into out are in place already
        if value.base is not outs[0]:
            outs[0][rows] = value
        for out, part in zip(outs[1:], others, strict=True):
            out[rows] = part

    if in_turn:
        for number in range(len(blocks)):
            call(number)
    else:
        run_blocks(call, range(len(blocks)))
    return outs


def _empty(left: Array, log: Array | None, p: int) -> FeatureState:
    """The state without keys."""
    xp = array_namespace(left)
    total = xp.broadcast_to(xp.zeros_like(left[0, :])[:, None], (left.shape[1], p + 1))
    return FeatureState(
        total, None if log is None else xp.full_like(left[:1, :1], -xp.inf)
    )
