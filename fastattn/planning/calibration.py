"""Measure the rates of the cost model on this machine, by the library's own work.

Every piece of work is timed in turns with a matrix product, so that what slows the
machine down for a while slows both. Predicted work is linear in the rates: those that
predict the measured times best are found by least squares, a little drawn to the ones
that are built in, which decide where the times say nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastattn._ops.quantized import attend_quantized, multiplies_quantized
from fastattn.costs.rates import (
    Rates,
    product_operands,
    seconds_a_product,
    time_product,
    timed,
    using,
)
from fastattn.costs.work import exact_work, lowrank_work, quantized_work
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.multipole.method import Multipole, configured_multipole
from fastattn.problem.head import Head
from sketching._lib.arrays import Array

# rounds, of which the median counts
_ROUNDS = 11
# how much the built-in rates weigh against one time
_PRIOR = 0.1
# no rate is further than this from the built-in one
_FACTOR = 8.0
# polynomials and landmarks
_LOW_RANKS = (1, 32), (1, 384), (384, 0)
_FLAT = 4096
# queries and keys, the errors wanted of the multipole method, and its clusters
_SHARP = (2048, 0.3, None), (8192, 0.1, None), (4096, 0.01, None), (4096, 0.2, 512)
_NAMES = tuple(field.name for field in fields(Rates))


@dataclass(frozen=True, slots=True)
class Piece:
    """Work that is timed, and what the cost model says of it under the rates in force.

    Parameters
    ----------
    run : callable
        Does the work.
    work : callable
        Predicts it, in multiply-adds.
    """

    run: Callable[[], Any]
    work: Callable[[], float]


def calibrate() -> tuple[Rates, float]:
    """Measure the rates, and the seconds of a multiply-add, on one thread."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        pieces = _pieces(np.random.default_rng(0))
        operands = product_operands()
        times = np.empty((_ROUNDS + 1, len(pieces), 2))
        for turn in times:
            for piece, pair in zip(pieces, turn, strict=True):
                pair[:] = timed(piece.run), time_product(*operands)
        # the first round compiles
        measured = np.median(times[1:, :, 0] / times[1:, :, 1], axis=0)
        return fit(pieces, measured), float(times[1:, :, 1].min())


def fit(pieces: list[Piece], measured: Array) -> Rates:
    """Find the rates under which the work of the pieces is what was measured."""
    from scipy.optimize import lsq_linear

    start = np.array([getattr(Rates(), name) for name in _NAMES])
    base = _predicted(pieces, np.zeros_like(start))
    slopes = np.stack(
        [_predicted(pieces, row) - base for row in np.diag(start)], axis=1
    )
    # relative errors of the times, and of the rates in units of the built-in ones
    rows = np.concatenate([slopes / measured[:, None], _PRIOR * np.eye(len(start))])
    wanted = np.append(1 - base / measured, np.full(len(start), _PRIOR))
    found = lsq_linear(rows, wanted, (1 / _FACTOR, _FACTOR)).x
    return _rates_of(found * start)


def _predicted(pieces: list[Piece], numbers: Array) -> Array:
    with using(_rates_of(numbers)):
        return np.array([piece.work() for piece in pieces])


def _rates_of(numbers: Array) -> Rates:
    return Rates(*(float(x) for x in numbers))


def _pieces(rng: np.random.Generator) -> list[Piece]:
    """Pieces of work, each of a few milliseconds, that show every rate."""
    heads = [_head(_FLAT // 2, d, 1.0, rng) for d in (32, 64)]
    pieces = [Piece(head.attend, _exact(head)) for head in heads]
    flat = _head(_FLAT, 32, 0.5, rng)
    sample = PlanningSample.of(flat, rng)
    for rank, landmarks in _LOW_RANKS:
        empty = LowRank.plan(sample, rank=rank, landmarks=landmarks, rng=rng)
        pieces.append(_low_rank(flat, empty))
    for n, error, clusters in _SHARP:
        pieces.append(_sharp(_head(n, 32, 2.0, rng), error, Multipole(clusters)))
    if multiplies_quantized(flat.query):
        pieces += [_quantized(head, x) for head in heads for x in (False, True)]
    return pieces


def _exact(head: Head) -> Callable[[], float]:
    return lambda: exact_work(*head.sizes)


def _quantized(head: Head, integers: bool) -> Piece:
    arrays = head.query, head.key, head.value
    options = {"scale": head.scale, "prefix_lengths": None, "integers": integers}
    return Piece(
        lambda: attend_quantized(*arrays, **options),
        lambda: quantized_work(*head.sizes, integers=integers),
    )


def _low_rank(head: Head, empty: LowRank) -> Piece:
    return Piece(
        lambda: empty.insert(head.key, head.value).query(head.query),
        lambda: lowrank_work(*head.sizes, empty.rank, empty.landmarks),
    )


def _sharp(head: Head, error: float, method: Multipole) -> Piece:
    """Clustering, trials and the answer of a head by the multipole method."""

    def configured() -> Any:
        # without a limit no choice depends on the rates
        return configured_multipole(
            head, error, np.random.default_rng(0), method=method
        )

    def work() -> float:
        return float(configured().plan.predicted_seconds / seconds_a_product())

    return Piece(lambda: configured().run(head), work)


def _head(n: int, d: int, spread: float, rng: np.random.Generator) -> Head:
    """Normal rows whose coordinates fade, with logits of a given deviation."""
    fade = np.arange(1, d + 1) ** -0.5
    fade *= (spread / np.linalg.norm(fade**2)) ** 0.5
    query, key, value = rng.standard_normal((3, n, d), dtype=np.float32)
    fade = fade.astype(np.float32)
    return Head(query * fade, key * fade, value, 1.0)
