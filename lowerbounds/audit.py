"""Attention methods as deciders: right, wrong and refused answers, and certificates.

A method whose certificate holds cannot be wrong where the certificate is as small as
the error that the instance allows. A method without a certificate may be wrong
anywhere, and is wrong on some of these instances.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

import fastattn
from lowerbounds._attention_instance import AttentionInstance
from lowerbounds._instance import VectorInstance
from lowerbounds.reductions import reduce_to_attention
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import Approximation, Certificate, RefusalError

# from inputs of attention to its output, with a certificate or without
Decider: TypeAlias = Callable[[AttentionInstance], Array | Approximation]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Answers of one method over one family of instances.

    Parameters
    ----------
    method, family : str
        Their names.
    instances : int
        The instances, the sum of ``right``, ``wrong`` and ``refused``.
    right, wrong, refused : int
        Answers, and instances that the method would not answer.
    certified : int
        Answers with a proven bound as small as the error that the instance allows.
    certified_wrong : int
        Those of them that were wrong: there must be none.
    broken : int
        Outputs whose error against exact attention exceeds their certificate.

    Examples
    --------
    >>> from lowerbounds import AuditRow
    >>> AuditRow("Exact", "planted", 2, 2, 0, 0, 2, 0, 0).accuracy
    1.0
    """

    method: str
    family: str
    instances: int
    right: int
    wrong: int
    refused: int
    certified: int
    certified_wrong: int
    broken: int

    @property
    def accuracy(self) -> float:
        """The share of right answers among those that were given."""
        answered = self.right + self.wrong
        return self.right / answered if answered else float("nan")


def audit_methods(
    methods: Mapping[str, Decider],
    families: Mapping[str, Iterable[VectorInstance | AttentionInstance]],
    *,
    construction: str = "calibrated",
) -> tuple[AuditRow, ...]:
    """Run methods over families of instances, and count their answers.

    Parameters
    ----------
    methods : mapping of str to callable
        Each takes an `AttentionInstance` and returns an output or an approximation
        with its certificate; a `fastattn.RefusalError` counts as a refusal.
        `at_allowed_error` makes one of a method of the library.
    families : mapping of str to iterable of VectorInstance or AttentionInstance
        The instances.
    construction : str
        As for `reduce_to_attention`, where the instances are vectors.

    Returns
    -------
    tuple of AuditRow
        A row for each family and method.

    Examples
    --------
    >>> import fastattn
    >>> from lowerbounds import at_allowed_error, audit_methods, orthogonal_vectors
    >>> methods = {
    ...     "exact": at_allowed_error(fastattn.Exact()),
    ...     "mean of the values": lambda made: 0 * made.query[:, :1] + 0.5,
    ... }
    >>> planted = [orthogonal_vectors(16, 40, rng=seed) for seed in range(3)]
    >>> none = [orthogonal_vectors(16, 40, planted=False, rng=9)]
    >>> for row in audit_methods(methods, {"planted": planted, "none": none}):
    ...     print(row.family, row.method, row.right, row.wrong, row.certified)
    planted exact 3 0 3
    planted mean of the values 0 3 0
    none exact 1 0 1
    none mean of the values 1 0 0
    """
    rows = []
    for family, instances in families.items():
        reduced = [
            x
            if isinstance(x, AttentionInstance)
            else reduce_to_attention(x, construction=construction)
            for x in instances
        ]
        truths = [np.exp(x.log_output()) for x in reduced]
        for name, method in methods.items():
            answers = [_ask(method, x, y) for x, y in zip(reduced, truths, strict=True)]
            rows.append(_count(name, family, answers))
    return tuple(rows)


def at_allowed_error(
    method: Any = None, *, guarantee: str = "proven", tol: float | None = None
) -> Decider:
    """Make a decider of a method of the library.

    Parameters
    ----------
    method : AttentionMethod, optional
        By default the one that the library chooses.
    guarantee : {"proven", "sampled"}
        As for `fastattn.approximate`.
    tol : float, optional
        The tolerance. By default what makes a proven bound as small as the error that
        the instance allows.

    Returns
    -------
    callable
        From an `AttentionInstance` to an approximation.

    Examples
    --------
    >>> from lowerbounds import at_allowed_error, orthogonal_vectors
    >>> from lowerbounds import reduce_to_attention
    >>> made = reduce_to_attention(orthogonal_vectors(16, 40, rng=0))
    >>> answer = at_allowed_error()(made)
    >>> bool(answer.certificate.error <= made.error)
    True
    """

    def decider(made: AttentionInstance) -> Approximation:
        # values and their products are 0 or 1: half their range is 1 / 2
        wanted = 2 * made.error if tol is None else tol
        if not wanted > 0:
            raise RefusalError(
                f"the error allowed, 10^{made.log_yes / np.log(10):.0f}, underflows"
            )
        return fastattn.approximate(
            *made.arguments,
            scale=made.scale,
            tol=wanted,
            method=method,
            guarantee=guarantee,
            rng=0,
        )

    return decider


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer: whether it was given, right, certified, and its certificate true."""

    given: bool
    right: bool = False
    certified: bool = False
    broken: bool = False


def _ask(method: Decider, made: AttentionInstance, truth: Array) -> _Answer:
    try:
        found = method(made)
        output = found.value if isinstance(found, Approximation) else found
        right = made.decide(output) is made.instance.has_solution
    except RefusalError:
        return _Answer(given=False)
    if not isinstance(found, Approximation):
        return _Answer(given=True, right=right)
    certificate = found.certificate
    proven = certificate.failure == 0 and certificate.norm == "max"
    return _Answer(
        given=True,
        right=right,
        certified=bool(proven and certificate.error <= made.error),
        broken=_is_broken(certificate, output, truth, _rounding(made)),
    )


def _rounding(made: AttentionInstance) -> float:
    """Rounding error of exact attention itself, relative to each entry."""
    largest_logit = made.entry_bound**made.order
    return 8 * float(np.finfo(np.float64).eps) * (1 + largest_logit)


def _is_broken(
    certificate: Certificate, output: Array, truth: Array, rounding: float
) -> bool:
    """Whether the error of the output exceeds its certificate."""
    off = np.asarray(to_host(output), np.float64).reshape(-1) - truth
    if certificate.norm == "max":
        return bool(np.abs(off).max() > certificate.error + rounding * truth.max())
    norm = np.linalg.norm(truth)
    return bool(np.linalg.norm(off) > (certificate.error + rounding) * norm)


def _count(method: str, family: str, answers: list[_Answer]) -> AuditRow:
    given = [x for x in answers if x.given]
    return AuditRow(
        method=method,
        family=family,
        instances=len(answers),
        right=sum(x.right for x in given),
        wrong=sum(not x.right for x in given),
        refused=len(answers) - len(given),
        certified=sum(x.certified for x in given),
        certified_wrong=sum(x.certified and not x.right for x in given),
        broken=sum(x.broken for x in given),
    )
