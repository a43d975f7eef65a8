"""Plans for a head, the answer to it, and what a method is asked."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastattn.problem.head import Head
from sketching._lib.arrays import Array
from sketching._lib.certificate import Certificate, RefusalError


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run for one head, and what was expected of it.

    Parameters
    ----------
    method : object
        The method with every choice made, for example ``Polynomial(degree=2)``.
    predicted_error : float
        Relative Frobenius error, or the proven bound; 0 for exact attention.
    predicted_seconds : float
        From the cost model of this machine.
    reason : str
        Why this method was taken, in a few words.
    """

    method: Any
    predicted_error: float
    predicted_seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method that was considered for a head: taken or refused, and why."""

    plan: Plan
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class HeadAnswer:
    """The answer of one head with what it promises.

    ``log_error``, on the host, bounds the error of each row's log-sum-exp; None where
    nothing is known of it.
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
        """Join an answer with a promise that was made before it."""
        c = certificate
        promise = c.error, c.failure, c.norm, c.source
        return HeadAnswer(value, log_normalizer, *promise, plan)

    @property
    def certificate(self) -> Certificate:
        """What is promised."""
        return Certificate(self.error, self.failure, self.norm, self.source)


class Method(Protocol):
    """A recipe for attention."""

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Answer the head within ``tol``; raise ``RefusalError`` if that cannot be."""
        ...

    def candidates(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[Candidate]:
        """Say what would be tried for the head, without running it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ConfiguredMethod:
    """A method with every choice made, ready to answer the queries of its head.

    Parameters
    ----------
    plan : Plan
        What will run.
    run : callable
        From a head to values, log-sum-exps, whether each row can be trusted and, where
        the method knows, how the squares of the rows' errors are guessed to compare.
    bound : float
        Proven bound on the largest absolute error; infinite where none is claimed.
    retighten : callable, optional
        From a factor to an attempt with that many times the error.
    limit : float
        The same where it is not the certificate, which is to be relative to the answer,
        but may serve to make it.
    rounding : callable, optional
        From a head to the deviation of the error of each row's logits, where all are
        rounded; another attempt of the same kind would then err alike.
    log_errors : callable, optional
        From a head and its log-sum-exps to bounds on their errors.
    """

    plan: Plan
    run: Callable[[Head], tuple[Array, ...]]
    bound: float
    retighten: "Callable[[float], ConfiguredMethod] | None" = None
    limit: float = math.inf
    rounding: Callable[[Head], Array] | None = None
    log_errors: Callable[[Head, Array], Array | None] | None = None


def candidate_of(method: Any, plan: Callable[[], Plan]) -> Candidate:
    """Say what a method plans to run, or why it would be refused."""
    try:
        return Candidate(plan(), accepted=True)
    except RefusalError as error:
        return Candidate(Plan(method, math.nan, math.nan, str(error)), accepted=False)
