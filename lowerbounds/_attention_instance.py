"""Inputs of attention whose output answers a question about vectors."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowerbounds._instance import VectorInstance
from lowerbounds._tuples import logits_of, products_of
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError

# rounding of an output must not flip an answer at the error that is allowed
_SHRINK = 1 - 1e-6
# thresholds must lie so far above the least normal number of the output's dtype
_HEADROOM = 1e8
# logits that exist at once
_BLOCK = 1 << 22
_LOG_2 = math.log(2)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInstance:
    """Inputs of attention of order k, and how to read the answer off the output.

    If the vectors have a solution, some row of the output is at least ``exp(log_yes)``;
    if not, every row is at most ``exp(log_no)``. An output whose error is at most
    ``error``, half of the difference, gives the right answer.

    Parameters
    ----------
    instance : VectorInstance
        The question.
    construction : str
        The name of the reduction.
    query : array, shape (n, d)
        The queries.
    keys, values : tuple of array, shapes (m, d) and (m, 1)
        One array for each factor: one for attention, two for tensor attention.
    scale : float
        The factor of the logits.
    log_yes, log_no : float
        Logarithms of the least output with a solution and the largest without.
    rows : int
        The output's first rows, those of the vectors, count.

    Examples
    --------
    >>> import fastattn
    >>> from lowerbounds import orthogonal_vectors, reduce_to_attention
    >>> made = reduce_to_attention(orthogonal_vectors(32, 30, rng=0))
    >>> output = fastattn.attention(
    ...     *made.arguments, scale=made.scale, method=fastattn.Exact()
    ... )
    >>> made.decide(output), made.decide(output - made.error)
    (True, True)
    """

    instance: VectorInstance
    construction: str
    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    scale: float
    log_yes: float
    log_no: float
    rows: int

    @property
    def order(self) -> int:
        """The number of factors, the query included."""
        return len(self.keys) + 1

    @property
    def key(self) -> Array:
        """The keys of an instance of order 2."""
        return self._only(self.keys)

    @property
    def value(self) -> Array:
        """The values of an instance of order 2."""
        return self._only(self.values)

    def _only(self, factors: tuple[Array, ...]) -> Array:
        if len(factors) > 1:
            raise ValueError(
                f"order: expected 2, got {self.order}: take keys and values"
            )
        return factors[0]

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """Arguments of attention; of tensor attention if the order is above 2."""
        if self.order == 2:
            return self.query, self.key, self.value
        return self.query, self.keys, self.values

    @property
    def entry_bound(self) -> float:
        """The largest absolute entry of the queries and keys, B."""
        return max(float(np.abs(x).max()) for x in (self.query, *self.keys))

    @property
    def log_threshold(self) -> float:
        """Logarithm of the output that separates the answers."""
        return self.log_yes + math.log1p(math.exp(self.log_no - self.log_yes)) - _LOG_2

    @property
    def threshold(self) -> float:
        """The output that separates the answers; 0 where it underflows."""
        return math.exp(self.log_threshold)

    @property
    def error(self) -> float:
        """The additive error that never flips the answer; 0 where it underflows."""
        share = -math.expm1(self.log_no - self.log_yes)
        return _SHRINK * share * math.exp(self.log_yes - _LOG_2)

    def decide(self, output: Array) -> bool:
        """Read the answer off an output of attention, exact or not.

        Parameters
        ----------
        output : array, shape (n, 1) or (n,)
            What attention returned for ``arguments`` and ``scale``.

        Returns
        -------
        bool
            Whether the vectors have a solution, if the output is within ``error``.

        Raises
        ------
        ValueError
            If the output has another shape, or NaN or infinities where it counts.
        RefusalError
            If the dtype of the output cannot hold numbers as small as the threshold.
        """
        x = self._flat("output", output)
        self.check_range(x.dtype)
        return bool(x.max() > self.threshold)

    def check_range(self, dtype: Any) -> None:
        """Raise ``RefusalError`` if ``dtype`` holds no numbers around the threshold."""
        least = float(np.finfo(dtype).tiny) * _HEADROOM
        if self.log_threshold < math.log(least):
            raise RefusalError(
                f"output: {dtype} cannot tell numbers around "
                f"10^{self.log_threshold / math.log(10):.0f}, take decide_log and the "
                "logarithm of the output, or another construction"
            )

    def decide_log(self, log_output: Array) -> bool:
        """Read the answer off the logarithm of an output; minus infinity is 0."""
        x = self._flat("log_output", log_output, infinite=True)
        return bool(x.max() > self.log_threshold)

    def _flat(self, name: str, given: Any, *, infinite: bool = False) -> Array:
        x = np.asarray(to_host(given))
        n = len(self.query)
        if x.shape not in ((n,), (n, 1)):
            raise ValueError(f"{name}: expected shape ({n}, 1), got {x.shape}")
        x = x.reshape(n)[: self.rows]
        bad = ~np.isfinite(x) & ~(np.isneginf(x) & infinite)
        if bad.any():
            raise ValueError(
                f"{name}: expected finite numbers, got {bad.sum()} NaN or infinite, "
                f"the first in row {bad.argmax()}"
            )
        return x

    def log_output(self) -> Array:
        """Compute the logarithm of the exact output, ``(n,)``.

        All tuples are enumerated; the output itself may be too small for any dtype.
        """
        tuples = math.prod(len(key) for key in self.keys)
        worth = self.products_of_values()
        found = np.empty(len(self.query))
        step = max(1, _BLOCK // tuples)
        for start in range(0, len(found), step):
            rows = slice(start, start + step)
            logits = self.logits(rows)
            logits -= logits.max(axis=1, keepdims=True)
            weights = logits[:, worth > 0]
            peak = weights.max(axis=1, keepdims=True)
            found[rows] = (
                np.log(np.exp(weights - peak).sum(axis=1))
                + peak[:, 0]
                - np.log(np.exp(logits).sum(axis=1))
            )
        return found

    def scaled(self, factor: float) -> "AttentionInstance":
        """Return the same instance with queries and keys times a factor.

        The threshold stays. Unless the construction is "padded", the bounds on outputs
        also hold with a factor above 1.
        """
        keys = tuple(factor * key for key in self.keys)
        return replace(self, query=factor * self.query, keys=keys)

    def logits(self, rows: slice = slice(None)) -> Array:
        """Compute the logits of some queries and all tuples of keys, in C order."""
        return logits_of(self.scale * self.query[rows], self.keys)

    def products_of_values(self) -> Array:
        """Compute the value of every tuple of keys, in C order."""
        return products_of(tuple(value[:, 0] for value in self.values))
