"""Attention of one head whose keys and values are larger than memory.

A key-value state is planned on a sample of the rows, and filled with all keys, block by
block. Its error is estimated on held-out queries. Where it misses the tolerance, the
keys are read again, once for each block of queries, for exact attention.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.costs.policy import POLICY
from fastattn.costs.work import exact_work, lowrank_work, polynomial_work
from fastattn.methods.exact import Exact
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.planning.explanation import Explanation
from fastattn.prepared.heads import StateHead
from fastattn.prepared.planning import Request, prepare_head
from fastattn.prepared.protocol import PreparedHead
from fastattn.problem.head import Head
from fastattn.problem.plan import Candidate, Method, Plan, Task
from fastattn.streaming.exact import rounded, solve_exactly, stream_exactly
from fastattn.streaming.rows import FileHead, Put, Step
from sketching._lib.arrays import compute_dtype
from sketching._lib.certificate import Certificate, RefusalError
from sketching._lib.threads import single_threaded_blas

_NO_PROOF = "a proven state needs the keys of a head in memory: these stream"


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """The certificate and plan of answers that were passed to ``put``."""

    certificate: Certificate
    plan: Plan


class _Way(NamedTuple):
    """A way to answer a head in a file.

    ``run`` takes the reason against the way before, or an empty string, and the
    functions ``put`` and ``step``.
    """

    plan: Plan
    run: Callable[[str, Put, Step], Streamed]


def attend_streamed(
    head: FileHead,
    tol: float,
    method: Method,
    guarantee: str,
    rng: np.random.Generator,
    put: Put,
    step: Step,
) -> Streamed:
    """Answer all queries of a head in a file; ``put`` gets the answers in blocks."""
    ways = _ways(method, Task(head, tol, guarantee, rng))
    # check all queries before the keys, which take long
    for _ in head.each_block():
        pass
    against = ""
    # with several threads BLAS results may differ in the last digit
    with single_threaded_blas():
        for way in ways:
            try:
                return way.run(against, put, step)
            except RefusalError as error:
                against = str(error)
                # the other half is for exact attention
                step = _half(step)
    raise RefusalError(against)


def _half(step: Step) -> Step:
    return lambda share: step(share / 2)


def explain_streamed(
    head: FileHead,
    tol: float,
    method: Method,
    guarantee: str,
    rng: np.random.Generator,
) -> Explanation:
    """Say what would be run: what is planned on the sample, then exact attention."""
    with single_threaded_blas():
        plans = [way.plan for way in _ways(method, Task(head, tol, guarantee, rng))]
    return Explanation((), (tuple(Candidate(x, accepted=True) for x in plans),))


@singledispatch
def _ways(method: Any, task: Task[FileHead]) -> Iterator[_Way]:
    """Yield the ways to answer a head, the first choice first.

    A method is registered with a function of the method and the task.
    """
    raise RefusalError(
        f"{type(method).__name__} needs the keys of a head in memory, of which "
        f"{task.head.memory} bytes may be used: allow more, or use Auto() or Exact()"
    )


@_ways.register
def _by_exact(
    method: Exact, task: Task[FileHead], reason: str = "requested"
) -> Iterator[_Way]:
    plan = Plan(method, 0.0, exact_work(*task.head.sizes), reason)

    def run(against: str, put: Put, step: Step) -> Streamed:
        made = replace(plan, reason=against or reason)
        return Streamed(solve_exactly(task, method, put, step), made)

    yield _Way(plan, run)


@_ways.register
def _by_polynomial(
    method: Polynomial,
    task: Task[FileHead],
) -> Iterator[_Way]:
    if task.guarantee == "proven":
        raise RefusalError(f"{_NO_PROOF}; allow more memory, or use Exact()")
    yield _by_state(task, _planned(method, task))


@_ways.register
def _by_the_cheapest(
    method: Auto,
    task: Task[FileHead],
) -> Iterator[_Way]:
    reason = "if the state over all keys misses the tolerance"
    try:
        if task.guarantee == "proven":
            raise RefusalError(_NO_PROOF)
        state = _planned(method, task)
        share = _work(task.head, state.plan.method) / exact_work(*task.head.sizes)
        if share > POLICY.time_share:
            raise RefusalError(
                f"{state.plan.method} would take {share:.1f} times as long"
            )
        yield _by_state(task, state)
    except RefusalError as error:
        reason = str(error)
    yield from _by_exact(Exact(), task, reason)


def _by_state(task: Task[FileHead], state: StateHead) -> _Way:
    """Answer by a state, to be filled with all keys."""

    def run(_against: str, put: Put, step: Step) -> Streamed:
        # the other half is for exact attention, where the state is refused
        found = _sum(task.head, state, task.tol, put, _half(step))
        _half(step)(1.0)
        return found

    return _Way(state.plan, run)


def _planned(method: Method, task: Task[FileHead]) -> StateHead:
    """An empty state, planned on a sample of the rows; refused if there is none."""
    head, tol, guarantee, rng = task
    sample = _sample(head, rng)

    def fill(empty: PreparedHead) -> PreparedHead:
        return empty.insert(sample.key, sample.value, fold=True)

    request = Request(sample, fill, head.sizes[1], tol, guarantee)
    found = prepare_head(method, request, rng)
    if not isinstance(found, StateHead):
        raise RefusalError(found.plan.reason)
    reason = f"planned on a sample of {len(sample.key)} keys: {found.plan.reason}"
    work = _work(head, found.plan.method)
    plan = replace(found.plan, work=work, reason=reason)
    return replace(found.empty(), plan=plan)


def _sample(head: FileHead, rng: np.random.Generator) -> Head:
    """Copy a sample of the queries, and of the keys and values."""
    n, m, _, _ = head.sizes
    keys = np.sort(rng.choice(m, min(m, POLICY.streaming.keys), replace=False))
    queries = np.sort(rng.choice(n, min(n, POLICY.streaming.queries), replace=False))
    query = head.query.take(queries)
    return Head(query, head.key.take(keys), head.value.take(keys), head.scale)


def _work(head: FileHead, method: Polynomial) -> float:
    """Work of filling a state, with its held-out queries, and of all queries."""
    n, m, d, p = head.sizes
    held_out = exact_work(POLICY.prepared.held_out, m, d, p)
    rank = method.rank or 1
    if method.fits_a_basis:
        return held_out + lowrank_work(n, m, d, p, rank, method.landmarks)
    return held_out + polynomial_work(n, m, d, p, rank)


def _sum(
    head: FileHead, summed: StateHead, tol: float, put: Put, step: Step
) -> Streamed:
    """Fill a state with all keys, certify it, and answer all queries by it."""
    most = summed.nbytes + head.memory // POLICY.streaming.memory_share
    for key, value in head.each_key_block():
        summed = summed.insert(key, value, fold=True)
        if summed.nbytes > most:
            raise RefusalError(
                f"{summed.plan.method} has too many far keys: {summed.nbytes} bytes"
            )
        step(1 / head.n_key_blocks)
    error = summed.held_out.error()
    if not error.upper <= tol:
        raise RefusalError(
            f"{summed.plan.method}, planned on a sample, misses tol={tol:g} over all "
            f"keys: {error.upper:.2e} is certified ({error.source})"
        )
    refused = []
    for start, query in head.each_block():
        value, logarithm, reliable = summed.state.query(query)
        bad = np.flatnonzero(~reliable)
        # refused rows are put again below, after exact attention
        value[bad], logarithm[bad] = 0, 0
        put(start, *rounded(head, value, logarithm))
        refused.append(start + bad)
    count = _answer_exactly(head, np.concatenate(refused), put)
    reason = summed.plan.reason + (f"; {count} rows computed exactly" if count else "")
    certificate = Certificate(error.upper, FAILURE, "relative-frobenius", error.source)
    return Streamed(certificate, replace(summed.plan, reason=reason))


def _answer_exactly(head: FileHead, rows: np.ndarray, put: Put) -> int:
    """Compute the queries that the state refuses exactly; returns their number."""
    dtype = compute_dtype(np, head.query.dtype)
    for start in range(0, len(rows), head.block):
        some = rows[start : start + head.block]
        found = stream_exactly(head, head.query.take(some), dtype)
        value, logarithm = rounded(head, *found)
        for i, row in enumerate(some):
            put(int(row), value[i : i + 1], logarithm[i : i + 1])
    return len(rows)
