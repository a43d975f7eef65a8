"""Attention of one head whose keys and values are larger than memory.

A key-value state is planned on a sample of the rows, and filled with all keys, block by
block. Its error is estimated on held-out queries. Where it misses the tolerance, the
keys are read again, once for each block of queries, for exact attention.
"""

from dataclasses import dataclass, replace

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
from fastattn.problem.plan import Candidate, Method, Plan
from fastattn.streaming.exact import rounded, solve_exactly, stream_exactly
from fastattn.streaming.rows import FileHead, Put, Step
from sketching._lib.arrays import compute_dtype
from sketching._lib.certificate import Certificate, RefusalError
from sketching._lib.threads import single_threaded_blas


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """The certificate and plan of answers that were passed to ``put``."""

    certificate: Certificate
    plan: Plan


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
    # check all queries before the keys, which take long
    for _ in head.each_block():
        pass
    exact = method if isinstance(method, Exact) else Exact()
    reason = "requested"
    # with several threads BLAS results may differ in the last digit
    with single_threaded_blas():
        if exact is not method:
            planned = _plan(head, tol, method, guarantee, rng)
            if isinstance(planned, StateHead):
                # the other half is for exact attention, where the state is refused
                step = _half(step)
                try:
                    found = _sum(head, planned, tol, put, step)
                    step(1.0)
                    return found
                except RefusalError as error:
                    if not isinstance(method, Auto):
                        raise
                    reason = str(error)
            else:
                reason = planned
        certified = solve_exactly(head, exact, tol, guarantee, rng, reason, put, step)
        return Streamed(*certified)


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
    considered = []
    reason = "requested"
    with single_threaded_blas():
        if not isinstance(method, Exact):
            planned = _plan(head, tol, method, guarantee, rng)
            reason = "if the state over all keys misses the tolerance"
            if isinstance(planned, StateHead):
                considered.append(Candidate(planned.plan, accepted=True))
            else:
                reason = planned
    if isinstance(method, (Exact, Auto)):
        exact = method if isinstance(method, Exact) else Exact()
        plan = Plan(exact, 0.0, exact_work(*head.sizes), reason)
        considered.append(Candidate(plan, accepted=True))
    return Explanation((), (tuple(considered),))


def _plan(
    head: FileHead, tol: float, method: Method, guarantee: str, rng: np.random.Generator
) -> StateHead | str:
    """Plan a state on a sample of the rows: an empty state, or why there is none."""
    if not isinstance(method, (Auto, Polynomial)):
        raise RefusalError(
            f"{type(method).__name__} needs the keys of a head in memory, of which "
            f"{head.memory} bytes may be used: allow more, or use Auto() or Exact()"
        )
    if guarantee == "proven":
        reason = "a proven state needs the keys of a head in memory: these stream"
        if isinstance(method, Auto):
            return reason
        raise RefusalError(f"{reason}; allow more memory, or use Exact()")
    sample = _sample(head, rng)

    def fill(empty: PreparedHead) -> PreparedHead:
        return empty.insert(sample.key, sample.value, fold=True)

    request = Request(sample, fill, head.sizes[1], tol, guarantee)
    found = prepare_head(request, method, rng)
    if not isinstance(found, StateHead):
        return found.plan.reason
    work = _work(head, found.plan.method)
    share = work / exact_work(*head.sizes)
    if isinstance(method, Auto) and share > POLICY.time_share:
        return f"{found.plan.method} would take {share:.1f} times as long"
    reason = f"planned on a sample of {len(sample.key)} keys: {found.plan.reason}"
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
