"""What an answer promises, and what is raised when nothing can be promised."""

from dataclasses import dataclass
from typing import Any

from sketching._lib.arrays import Array


@dataclass(frozen=True, slots=True)
class Certificate:
    """A bound on the error of one answer, for the inputs it was computed from.

    ``norm(answer - truth) <= error`` except with probability ``failure``.

    Parameters
    ----------
    error : float or array
        The bound. For a batch of heads an array over the leading dimensions.
    failure : float or array
        Probability that the bound does not hold; 0 for a proven bound.
    norm : str
        ``"relative-frobenius"``: ``||answer - truth||_F / ||truth||_F`` of a head.
        ``"max"``: the largest absolute difference of a head.
        ``"relative"``: of each distance, ``|answer - truth| / truth``.
    source : str or array of str
        The theorem or the sampling rule that the bound rests on.
    """

    error: Any
    failure: Any
    norm: str
    source: Any


@dataclass(frozen=True, slots=True)
class Approximation:
    """An answer with its certificate.

    Parameters
    ----------
    value : array
        The answer, an array of the library of the inputs.
    certificate : Certificate
        What is promised about ``value``.
    plan : object
        What was run; for a batch an object array over the leading dimensions.
    log_normalizer : array or None
        Log-sum-exp of each row's logits, so that answers over disjoint sets of keys
        can be merged; None where the answer has none.
    log_normalizer_error : array or None
        Bound on the absolute error of each of them, infinite where a row's is unknown;
        None where nothing is promised of any.
    """

    value: Array
    certificate: Certificate
    plan: Any
    log_normalizer: Array | None
    log_normalizer_error: Array | None = None


class RefusalError(ValueError):
    """A method cannot guarantee the requested error; the message has numbers."""
