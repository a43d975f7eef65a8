"""Certificates from bounds that are known before any row is computed exactly.

A bound on every entry is one on the Frobenius norm, and the answer's own norm less that
is a lower bound on the truth's. Where this meets the tolerance nothing need be sampled.
"""

import math

from fastattn.certificates.ratio_estimate import relative
from sketching._lib.certificate import Certificate

# norms of answers are sums in working precision
_NORM = 1e-5


def relative_of_max(
    bound: float, size: tuple[float, float], entries: int, share: float = 0.0
) -> float:
    """Turn a bound on every entry into one relative to the truth's Frobenius norm.

    Parameters
    ----------
    bound : float
        At most so much is ``|answer - truth|`` in any entry.
    size : tuple of float
        The answer's largest absolute value, and its Frobenius norm in units of that, as
        ``scaled_frobenius`` gives them.
    entries : int
        Number of entries of the answer.
    share : float
        Every entry may be off by so much of itself beside.

    Returns
    -------
    float
        Infinite where the answer may be all error.
    """
    peak, norm = size
    if not math.isfinite(peak):
        return math.inf
    if peak == 0:
        # an answer of zeros: right if there are only zeros to average
        return 0.0 if bound == 0 else math.inf
    off = bound / peak * math.sqrt(entries) + share * norm
    return relative(off, norm * (1 - _NORM))


def apriori_certificate(
    bound: float, size: tuple[float, float], entries: int, tol: float, source: str
) -> Certificate | None:
    """Certify an answer by a bound on its entries, where that meets ``tol``.

    The other parameters are those of ``relative_of_max``; ``source`` names the theorem.
    """
    error = relative_of_max(bound, size, entries)
    if not error <= tol:
        return None
    source = f"{source}; a bound on every entry, relative to the answer's norm"
    return Certificate(error, 0.0, "relative-frobenius", source)
