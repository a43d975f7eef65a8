r"""Held-out queries: the error of a key-value state, which no longer has its keys.

Some of the queries given to ``prepare`` are held out. The exact output :math:`o_i` of a
held-out query :math:`q_i` over all keys is known: exact outputs over disjoint keys
merge by their log-sum-exps, so that the insertion of a key costs one logit for each
held-out query. With the outputs :math:`\tilde o_i` of the state, the relative error is
estimated by the ratio

.. math:: \Big(\sum_i w_i \|\tilde o_i - o_i\|^2 \Big/ \sum_i w_i \|o_i\|^2\Big)^{1/2}.

The sample is stratified, because few queries of high logit variance may have most of
the error: of up to 2048 candidates, the 64 of the highest logit variance are all held
out (:math:`w_i = 1`), and 64 of the rest are drawn uniformly (:math:`w_i` is the number
of candidates that each represents). To the estimate are added ``margin`` standard
errors, and an allowance for a heavy tail of the uniform stratum (``RatioEstimate``).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import Margin, RatioEstimate
from fastattn.certificates.rounding import cut_weights
from fastattn.certificates.sampled import FLOAT64_BELOW, TRUTH, SampledError
from fastattn.costs.policy import POLICY
from fastattn.prepared.kv_buffer import bytes_of
from fastattn.prepared.states import Packed
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import Answer, empty_partial, merge_partials
from fastattn.problem.row_statistics import logit_spread
from sketching._lib.arrays import Array, array_namespace, compute_dtype, to_host

# pairs of outputs and log-sum-exps in a file
_ANSWERS = ("truth", "answer", "tail")


# a sample does not show the tail beyond its maximum: this many times the maximum's
# share is added
_TAIL = 8.0
# standard errors that are added for a given method, and for methods that are tried in
# turn: twice the normal quantiles of .04, and of .03, .01 and .01, which share the
# failure probability of .05. No error profile steers this sample
MARGIN, MARGINS = 3.5, (3.76, 4.65, 4.65)


@dataclass(frozen=True, slots=True, eq=False)
class QuerySplit:
    """Queries that are held out, and the rest, to plan with.

    Parameters
    ----------
    held_out, rest : array, shapes (k, d), (r, d)
        In the library of the queries.
    weight : array, shape (k,)
        How many candidates each held-out query represents.
    """

    held_out: Array
    rest: Array
    weight: Array

    @staticmethod
    def of(head: Head, rng: np.random.Generator) -> "QuerySplit":
        """Hold out queries of a head: those of the highest logit variance, and some."""
        policy = POLICY.prepared
        n = head.sizes[0]
        order = rng.permutation(n)
        size = min(policy.candidates, (n + 1) // 2)
        held, rest = np.sort(order[:size]), np.sort(order[size:])
        n_outliers = min(policy.most_outliers if size > policy.held_out else size, size)
        if n_outliers < size:
            spread = logit_spread(head.with_rows(held), rng)
            held = held[np.argsort(-spread, kind="stable")]
        others = rng.permutation(held[n_outliers:])[: policy.held_out - n_outliers]
        weight = np.ones(n_outliers + len(others))
        weight[n_outliers:] = (size - n_outliers) / max(len(others), 1)
        chosen = np.concatenate([held[:n_outliers], others])
        return QuerySplit(
            head.with_rows(chosen).query, head.with_rows(rest).query, weight
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutQueries:
    """Held-out queries with their exact outputs and those of the structure.

    Parameters
    ----------
    query : array, shape (k, d)
        In the library of the inputs.
    weight : array, shape (k,)
        How many candidates each held-out query represents.
    scale : float
        The factor of the logits.
    tol : float
        The tolerance of the structure.
    margin : float
        Standard errors that are added to the estimated error.
    truth, answer : pair of arrays, shapes (k, p), (k,)
        Outputs and log-sum-exps over the keys of the state: exact ones, and those of
        the state. On the host in float64, as ``tail``.
    tail : pair of arrays, shapes (k, p), (k,)
        Exact ones over the keys in the tail, which are not in the state yet.
    reliable : boolean array, shape (k,)
        False for queries that the structure refuses.
    mass : float
        Number of keys times their largest absolute value, summed over insertions.
    """

    query: Array
    weight: Array
    scale: float
    tol: float
    margin: float
    truth: Answer
    answer: Answer
    tail: Answer
    reliable: Array
    mass: float

    @staticmethod
    def of(
        split: QuerySplit, p: int, scale: float, tol: float, margin: float
    ) -> "HeldOutQueries":
        """Start without keys."""
        query, weight = split.held_out, split.weight
        none, reliable = empty_partial(len(weight), p), np.ones(len(weight), bool)
        return HeldOutQueries(
            query, weight, scale, tol, margin, none, none, none, reliable, 0.0
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        answers = (*self.truth, *self.answer, *self.tail, self.reliable, self.weight)
        return bytes_of(self.query) + sum(int(x.nbytes) for x in answers)

    def empty(self) -> "HeldOutQueries":
        """Return the held-out queries without keys."""
        none = empty_partial(*self.truth[0].shape)
        reliable = np.ones(len(self.reliable), bool)
        return replace(
            self, truth=none, answer=none, tail=none, reliable=reliable, mass=0.0
        )

    def with_buffered(self, key: Array, value: Array) -> "HeldOutQueries":
        """Add keys that go into the tail."""
        tail, mass = self._exact(key, value)
        return replace(
            self, tail=merge_partials(self.tail, tail), mass=self.mass + mass
        )

    def with_summed(self, key: Array, value: Array) -> "HeldOutQueries":
        """Add keys that go into the state; call ``update_predictions`` next."""
        truth, mass = self._exact(key, value)
        return replace(
            self, truth=merge_partials(self.truth, truth), mass=self.mass + mass
        )

    def fold(self) -> "HeldOutQueries":
        """Move the tail into the state; call ``update_predictions`` next."""
        none = empty_partial(*self.tail[0].shape)
        return replace(self, truth=merge_partials(self.truth, self.tail), tail=none)

    def merge(self, other: "HeldOutQueries") -> "HeldOutQueries":
        """Add the keys of another structure; call ``update_predictions`` next."""
        return replace(
            self,
            truth=merge_partials(self.truth, other.truth),
            tail=merge_partials(self.tail, other.tail),
            mass=self.mass + other.mass,
        )

    def update_predictions(
        self, value: Array, logarithm: Array, reliable: Array
    ) -> "HeldOutQueries":
        """Set the outputs and log-sum-exps of the state for the held-out queries."""
        value, logarithm, reliable = (to_host(x) for x in (value, logarithm, reliable))
        # refused rows have no output
        logarithm = np.where(reliable, logarithm, 0.0)
        answer = value.astype(np.float64), logarithm.astype(np.float64)
        return replace(self, answer=answer, reliable=reliable.astype(bool))

    def error(self) -> SampledError:
        """Estimate, and bound, the relative error over queries that are not refused.

        The estimate is the root of a ratio of weighted means of squares; its standard
        error is that of the squared errors less the ratio times the squared outputs.
        """
        reliable, k = self.reliable, int(self.reliable.sum())
        truth, logarithm = merge_partials(self.truth, self.tail)
        answer, _ = merge_partials(self.answer, self.tail)
        truth, answer, logarithm = (
            truth[reliable],
            answer[reliable],
            logarithm[reliable],
        )
        unit = float(np.abs(truth).max(initial=0.0)) or 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.sum(((answer - truth) / unit) ** 2, axis=1)
        if k < POLICY.prepared.answered or not (
            np.isfinite(squares).all() and unit < math.inf
        ):
            text = f"{k} of {len(reliable)} held-out queries have finite answers"
            return SampledError(math.inf, math.inf, text)
        sizes = np.sum((truth / unit) ** 2, axis=1)
        if squares.any() and sizes.any():
            estimate, upper = self._ratio(squares, sizes)
        else:
            estimate = upper = math.inf if squares.any() else 0.0
        exponent = float(np.abs(logarithm[np.isfinite(logarithm)]).max(initial=0.0))
        # exact outputs were rounded, and answers are rounded to the dtype of queries
        info = array_namespace(self.query).finfo
        upper += TRUTH * float(info(self._dtype).eps) * (1 + exponent)
        upper += float(info(self.query.dtype).eps) / 2
        weight = self.weight[reliable]
        upper += self._lost(unit * math.sqrt(float(np.average(sizes, weights=weight))))
        largest = math.sqrt(float(squares.max()))
        return SampledError(estimate, upper, self._source(estimate, largest))

    def _ratio(self, squares: Array, sizes: Array) -> tuple[float, float]:
        """Root of the ratio of weighted means, without and with its margin."""
        weight = self.weight[self.reliable]
        n = float(weight.sum())
        found = RatioEstimate(
            squares, n, weight * len(weight) / n, sizes, certain=weight == 1
        )
        upper = found.upper_ratio(Margin(self.margin, _TAIL))
        return math.sqrt(found.ratio), math.sqrt(upper)

    def _source(self, estimate: float, largest: float) -> str:
        certain = int(np.sum(self.weight == 1))
        k, refused = len(self.reliable), len(self.reliable) - int(self.reliable.sum())
        return (
            f"{k} held-out queries, the {certain} of the highest logit variance and "
            f"{k - certain} random ones of {self.weight.sum():.0f} queries given to "
            "prepare(), compared with exact attention over all keys: estimated "
            f"relative error {estimate:.2e} for queries drawn like these; the largest "
            f"error of a row is {largest:.2e} of the largest entry"
            + (f"; {refused} refused queries do not count" if refused else "")
        )

    @property
    def _dtype(self) -> Any:
        xp = array_namespace(self.query)
        if self.tol < FLOAT64_BELOW:
            return xp.float64
        return compute_dtype(xp, self.query.dtype)

    def _exact(self, key: Array, value: Array) -> tuple[Answer, float]:
        """Exact outputs and log-sum-exps over the given keys, and their mass."""
        head = Head(self.query, key, value, self.scale)
        m = head.sizes[1]
        out, logarithm = (to_host(x) for x in head.attend(self._dtype))
        answer = out.astype(np.float64), logarithm.astype(np.float64)
        return answer, m * head.largest_value if m else 0.0

    def _lost(self, size: float) -> float:
        """Relative error of an output of norm ``size`` by weights that underflow."""
        if self.mass == 0:
            return 0.0
        xp = array_namespace(self.query)
        lost = cut_weights(xp, compute_dtype(xp, self.query.dtype), 1) * self.mass
        root = math.sqrt(self.truth[0].shape[1])
        return root * lost / size if size > 0 else math.inf


def pack_held_out(held_out: HeldOutQueries) -> Packed:
    """Arrays and plain values of held-out queries."""
    arrays = {
        "probe_query": to_host(held_out.query),
        "probe_good": held_out.reliable,
        "probe_weight": held_out.weight,
    }
    for name in _ANSWERS:
        value, logarithm = getattr(held_out, name)
        arrays |= {f"probe_{name}": value, f"probe_{name}_log": logarithm}
    values = {
        "probe_scale": held_out.scale,
        "tol": held_out.tol,
        "margin": held_out.margin,
    }
    return arrays, {**values, "probe_mass": held_out.mass}


def unpack_held_out(
    arrays: dict[str, Array], values: dict[str, Any], move: Any
) -> HeldOutQueries:
    """Undo ``pack_held_out``."""
    truth, answer, tail = (
        (arrays[f"probe_{name}"], arrays[f"probe_{name}_log"]) for name in _ANSWERS
    )
    return HeldOutQueries(
        move(arrays["probe_query"]),
        arrays["probe_weight"],
        float(values["probe_scale"]),
        float(values["tol"]),
        float(values["margin"]),
        truth,
        answer,
        tail,
        arrays["probe_good"].astype(bool),
        float(values["probe_mass"]),
    )
