"""What probes say about the error of a structure whose keys are gone.

Some of the queries that a structure was prepared for are kept with their exact answers
over all keys. Exact answers over disjoint keys merge by their log-sum-exps, so that
they are kept up to date, key by key, at the price of one row of attention a probe.

Few queries whose logits vary most may hold most of the error. Of the queries that are
held out, those are probes all, and each of a few others stands for many.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.certificates.ratio_estimate import Margin, RatioEstimate
from fastattn.certificates.rounding import cut_weights
from fastattn.certificates.sampled import FLOAT64_BELOW, TRUTH, SampledError
from fastattn.prepared.kv_buffer import bytes_of
from fastattn.prepared.states import Packed
from fastattn.problem.head import Head
from fastattn.problem.partial_softmax import Answer, empty_partial, merge_partials
from fastattn.problem.row_statistics import logit_spread
from sketching._lib.arrays import Array, array_namespace, compute_dtype, to_host

# pairs of values and log-sum-exps that a file keeps of probes
_ANSWERS = ("truth", "answer", "tail")

# probes of a structure, the fewest of them that must be answered, and the fewest
# queries that some of which say enough about the others
HELD_OUT = 128
_ANSWERED = 32
FEWEST_QUERIES = 256

# queries that are held out, of which the probes are the hardest and some others
_HELD = 2048
_MOST_OUTLIERS = 64
# a sample hides the tail beyond its largest: so many times its share is added
_TAIL = 8.0
# standard errors that are added for a structure that was asked for, and for those that
# are tried in turn: twice the normal quantiles of .04, and of .03, .01 and .01, which
# make up the chance of failure. No guess of the errors steers this sample
MARGIN, MARGINS = 3.5, (3.76, 4.65, 4.65)


@dataclass(frozen=True, slots=True, eq=False)
class QuerySplit:
    """Queries that become probes, and those that are left to plan with.

    Parameters
    ----------
    held_out, rest : array, shapes (k, d), (r, d)
        In the library of the queries.
    weight : array, shape (k,)
        How many of the queries that were held out each probe stands for.
    """

    held_out: Array
    rest: Array
    weight: Array

    @staticmethod
    def of(head: Head, rng: np.random.Generator) -> "QuerySplit":
        """Hold out some queries of a head; take the hardest of them, and others."""
        n = head.sizes[0]
        order = rng.permutation(n)
        size = min(_HELD, (n + 1) // 2)
        held, rest = np.sort(order[:size]), np.sort(order[size:])
        n_outliers = min(_MOST_OUTLIERS if size > HELD_OUT else size, size)
        if n_outliers < size:
            spread = logit_spread(head.with_rows(held), rng)
            held = held[np.argsort(-spread, kind="stable")]
        others = rng.permutation(held[n_outliers:])[: HELD_OUT - n_outliers]
        weight = np.ones(n_outliers + len(others))
        weight[n_outliers:] = (size - n_outliers) / max(len(others), 1)
        chosen = np.concatenate([held[:n_outliers], others])
        return QuerySplit(
            head.with_rows(chosen).query, head.with_rows(rest).query, weight
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutQueries:
    """Queries with what they should be told, and what they are told.

    Parameters
    ----------
    query : array, shape (k, d)
        In the library of the inputs.
    weight : array, shape (k,)
        How many of the queries that were held out each probe stands for.
    scale : float
        The factor of the logits.
    tol : float
        The tolerance that the answers are held against.
    margin : float
        Standard errors that are added to what is estimated.
    truth, answer : answers
        Over the keys that were summed: exact ones, and those of the structure. On the
        host in float64, like the next.
    tail : answers
        Exact ones over the keys that are still kept.
    reliable : boolean array, shape (k,)
        The other probes are refused by the structure.
    mass : float
        Number of keys times their largest absolute value, summed over what came in.
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
        """Forget the keys."""
        none = empty_partial(*self.truth[0].shape)
        reliable = np.ones(len(self.reliable), bool)
        return replace(
            self, truth=none, answer=none, tail=none, reliable=reliable, mass=0.0
        )

    def with_buffered(self, key: Array, value: Array) -> "HeldOutQueries":
        """Take note of keys that are kept."""
        tail, mass = self._exact(key, value)
        return replace(
            self, tail=merge_partials(self.tail, tail), mass=self.mass + mass
        )

    def with_summed(self, key: Array, value: Array) -> "HeldOutQueries":
        """Take note of keys that were summed; ``update_predictions`` has to follow."""
        truth, mass = self._exact(key, value)
        return replace(
            self, truth=merge_partials(self.truth, truth), mass=self.mass + mass
        )

    def fold(self) -> "HeldOutQueries":
        """Move the tail to the sums; ``update_predictions`` has to follow."""
        none = empty_partial(*self.tail[0].shape)
        return replace(self, truth=merge_partials(self.truth, self.tail), tail=none)

    def merge(self, other: "HeldOutQueries") -> "HeldOutQueries":
        """Add the keys of another structure; ``update_predictions`` has to follow."""
        return replace(
            self,
            truth=merge_partials(self.truth, other.truth),
            tail=merge_partials(self.tail, other.tail),
            mass=self.mass + other.mass,
        )

    def update_predictions(
        self, value: Array, logarithm: Array, reliable: Array
    ) -> "HeldOutQueries":
        """Take note of what the structure says over the keys that were summed."""
        value, logarithm, reliable = (to_host(x) for x in (value, logarithm, reliable))
        # rows that are refused have no answer
        logarithm = np.where(reliable, logarithm, 0.0)
        answer = value.astype(np.float64), logarithm.astype(np.float64)
        return replace(self, answer=answer, reliable=reliable.astype(bool))

    def error(self) -> SampledError:
        """The error of queries drawn like those held out, of those that are answered.

        It is the root of a ratio of means of squares; what is added for the sampling
        follows from the squared errors less the ratio times the squared answers.
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
        if k < _ANSWERED or not (np.isfinite(squares).all() and unit < math.inf):
            text = f"{k} of {len(reliable)} probes were answered with finite numbers"
            return SampledError(math.inf, math.inf, text)
        sizes = np.sum((truth / unit) ** 2, axis=1)
        if squares.any() and sizes.any():
            estimate, upper = self._ratio(squares, sizes)
        else:
            estimate = upper = math.inf if squares.any() else 0.0
        exponent = float(np.abs(logarithm[np.isfinite(logarithm)]).max(initial=0.0))
        # the truth was rounded, and answers are rounded to the dtype of the queries
        info = array_namespace(self.query).finfo
        upper += TRUTH * float(info(self._dtype).eps) * (1 + exponent)
        upper += float(info(self.query.dtype).eps) / 2
        weight = self.weight[reliable]
        upper += self._lost(unit * math.sqrt(float(np.average(sizes, weights=weight))))
        largest = math.sqrt(float(squares.max()))
        return SampledError(estimate, upper, self._source(estimate, largest))

    def _ratio(self, squares: Array, sizes: Array) -> tuple[float, float]:
        """Root of the ratio of weighted means, and with its margin."""
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
            f"{k} probes, the {certain} hardest and {k - certain} others of "
            f"{self.weight.sum():.0f} queries that prepare() held out, answered "
            "exactly over all keys: the root mean square error of queries drawn like "
            f"those is estimated at {estimate:.2e} of their root mean square answer; "
            f"the largest error seen is {largest:.2e} of the largest entry"
            + (f"; {refused} probes are refused and do not count" if refused else "")
        )

    @property
    def _dtype(self) -> Any:
        xp = array_namespace(self.query)
        if self.tol < FLOAT64_BELOW:
            return xp.float64
        return compute_dtype(xp, self.query.dtype)

    def _exact(self, key: Array, value: Array) -> tuple[Answer, float]:
        """Answers over the given keys, and the mass of those."""
        head = Head(self.query, key, value, self.scale)
        m = head.sizes[1]
        out, logarithm = (to_host(x) for x in head.attend(self._dtype))
        answer = out.astype(np.float64), logarithm.astype(np.float64)
        return answer, m * head.largest_value if m else 0.0

    def _lost(self, size: float) -> float:
        """What weights that underflow may add to an answer of norm ``size``."""
        if self.mass == 0:
            return 0.0
        xp = array_namespace(self.query)
        lost = cut_weights(xp, compute_dtype(xp, self.query.dtype), 1) * self.mass
        root = math.sqrt(self.truth[0].shape[1])
        return root * lost / size if size > 0 else math.inf


def pack_held_out(held_out: HeldOutQueries) -> Packed:
    """Arrays and plain values of probes."""
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
