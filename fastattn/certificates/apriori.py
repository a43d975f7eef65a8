r"""Certificates from bounds that are known before any row is computed exactly.

If every entry of the output :math:`\tilde O` of shape ``(n, p)`` has an error of at
most ``b``, then :math:`\|\tilde O - O\|_F \le b \sqrt{n p}` and :math:`\|O\|_F \ge
\|\tilde O\|_F - b \sqrt{n p}`. Where the quotient meets the tolerance, no row has to be
sampled.
"""

import math

from fastattn.certificates.ratio_estimate import relative
from sketching._lib.certificate import Certificate

# relative error of the norm of an output, which is summed in working precision
_NORM = 1e-5


def relative_of_max(
    bound: float, size: tuple[float, float], entries: int, share: float = 0.0
) -> float:
    """Turn a bound on every entry into a bound on the relative Frobenius error.

    Parameters
    ----------
    bound : float
        Upper bound on ``|output - exact output|`` of every entry.
    size : tuple of float
        Largest absolute value of the output, and its Frobenius norm in units of that
        value, as returned by ``scaled_frobenius``.
    entries : int
        Number of entries of the output, ``n p``.
    share : float
        Further relative error that every entry may have.

    Returns
    -------
    float
        Bound on ``||output - exact output|| / ||exact output||``; infinite where the
        error may be as large as the output.
    """
    peak, norm = size
    if not math.isfinite(peak):
        return math.inf
    if peak == 0:
        # a zero output is exact only if all values are zero
        return 0.0 if bound == 0 else math.inf
    off = bound / peak * math.sqrt(entries) + share * norm
    return relative(off, norm * (1 - _NORM))


def apriori_certificate(
    bound: float, size: tuple[float, float], entries: int, tol: float, source: str
) -> Certificate | None:
    """Certify an output by a bound on its entries; None where that exceeds ``tol``.

    Parameters as in ``relative_of_max``; ``source`` names the theorem.
    """
    error = relative_of_max(bound, size, entries)
    if not error <= tol:
        return None
    source = f"{source}; a bound on every entry, relative to the norm of the output"
    return Certificate(error, 0.0, "relative-frobenius", source)
