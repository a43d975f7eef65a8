"""The plan of a head, its answer, and the protocol of methods."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from fastattn.costs.work import seconds
from fastattn.problem.head import Head
from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate, RefusalError

_H = TypeVar("_H")


class Task(NamedTuple, Generic[_H]):
    """A head, the tolerance and guarantee asked for, and a source of randomness."""

    head: _H
    tol: float
    guarantee: str
    rng: np.random.Generator


@dataclass(frozen=True, slots=True)
class Plan:
    """The method that runs for one head, with predicted error and work.

    Parameters
    ----------
    method : object
        The method with all parameters chosen, for example ``Polynomial(degree=2)``.
    predicted_error : float
        Relative Frobenius error, or the proven bound; 0 for exact attention, NaN
        where it is unknown.
    work : float
        Predicted work in multiply-adds of a float32 matrix product, as
        ``fastattn.costs.work`` counts it; NaN where it is unknown.
    reason : str
        Why this method was chosen or refused, in a few words.
    """

    method: Any
    predicted_error: float
    work: float
    reason: str

    @property
    def predicted_seconds(self) -> float:
        """Seconds of the work on this machine, whose speed is measured when asked."""
        return seconds(self.work)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method that was considered for a head: accepted or refused, and why."""

    plan: Plan
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class HeadAnswer:
    """The output and log-sum-exps of one head, with its certificate.

    ``log_error``, shape (n,) on the host, bounds the errors of the log-sum-exps; None
    where there is no bound.
    """

    value: Array
    log_normalizer: Array
    error: float
    failure: float
    norm: str
    source: str
    plan: Plan
    log_error: Array | None = None

    @staticmethod
    def under(
        certificate: Certificate, value: Array, log_normalizer: Array, plan: Plan
    ) -> "HeadAnswer":
        """Combine an output with a certificate that was known beforehand."""
        c = certificate
        promise = c.error, c.failure, c.norm, c.source
        return HeadAnswer(value, log_normalizer, *promise, plan)

    @property
    def certificate(self) -> Certificate:
        """The certificate."""
        return Certificate(self.error, self.failure, self.norm, self.source)


class Method(Protocol):
    """A method of attention with its parameters."""

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Compute the head to ``tol``; raise ``RefusalError`` if that is impossible."""
        ...

    def candidates(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[Candidate]:
        """Yield the candidates for the head, without running them."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ConfiguredMethod:
    """A method with all parameters chosen for a head, ready to run.

    Parameters
    ----------
    plan : Plan
        The method, with predicted error and time.
    run : callable
        Maps a head to outputs (n, p), log-sum-exps (n,), whether each row is reliable
        (n,) and, where the method knows it, the error profile (n,).
    bound : float
        Proven bound on the largest absolute error, which is the certificate; infinite
        where there is none.
    retighten : callable, optional
        Maps a factor to the method configured for that many times the error.
    limit : float
        Proven bound on the largest absolute error that is not the certificate itself,
        but serves to compute a relative one.
    rounding : callable, optional
        Maps a head to the standard deviations (n,) of the rounding errors of its
        logits, if these are the only error: running again would not reduce it.
    log_errors : callable, optional
        Maps a head and its log-sum-exps to bounds (n,) on their errors.
    """

    plan: Plan
    run: Callable[[Head], tuple[Array, ...]]
    bound: float
    retighten: "Callable[[float], ConfiguredMethod] | None" = None
    limit: float = math.inf
    rounding: Callable[[Head], Array] | None = None
    log_errors: Callable[[Head, Array], Array | None] | None = None


class Configurable(Protocol):
    """A method of which the parameters are chosen, or that refuses, for each head."""

    __slots__ = ()

    def configure(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> ConfiguredMethod:
        """Choose all parameters for one head; raise ``RefusalError`` if none serve."""
        ...

    def candidates(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[Candidate]:
        """Yield the plan, or the reason for a refusal."""
        try:
            plan = self.configure(head, tol, guarantee, rng).plan
        except RefusalError as error:
            plan = Plan(self, math.nan, math.nan, str(error))
            yield Candidate(plan, accepted=False)
        else:
            yield Candidate(plan, accepted=True)
