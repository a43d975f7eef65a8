"""Polynomials whose proven bound is small enough for a relative tolerance.

The bound holds for every row before anything runs. A few exact rows estimate the norm
of the output and the error of the polynomial. Where the bound meets the tolerance, it
becomes the certificate; where it is not much larger than the error, it is the range of
the squared errors in an empirical Bernstein bound.
"""

import math

import numpy as np

from fastattn.certificates.ratio_estimate import FailureBudget, promises
from fastattn.certificates.sampled import ROWS
from fastattn.methods.polynomial.polynomial_expansion import PolynomialExpansion
from fastattn.methods.polynomial.proven import proven_expansion
from fastattn.problem.head import Head, host_rows
from sketching._lib.arrays import Array, to_host
from sketching._lib.certificate import RefusalError

# exact rows that estimate the norm of the output; safety factor of that estimate
_ROWS, _ROOM = 16, 0.8
# tolerance with which the expansion is built, before its bound is compared; largest
# tolerance for which a bound is tried
_ANY, _MEANT = 1e6, 1.0


def apriori_expansion(
    head: Head, degree: int, tol: float, rng: np.random.Generator
) -> tuple[PolynomialExpansion, float] | None:
    """Return the proven polynomial of a degree, if its bound is small enough.

    Parameters
    ----------
    head : Head
        One head without a causal mask; others return None.
    degree : int
        Degree of the polynomial.
    tol : float
        Tolerance, the relative Frobenius error.
    rng : Generator
        Draws the rows from which the transform is computed, and the exact rows.

    Returns
    -------
    expansion, error : PolynomialExpansion and float, or None
        The polynomial with its bound, and the relative error on the exact rows.
    """
    if head.prefix_lengths is not None or head.sizes[1] == 0 or tol > _MEANT:
        return None
    try:
        expansion = proven_expansion(head, _ANY, rng, degree)
    except RefusalError:
        return None
    n, p = head.sizes[0], head.sizes[3]
    rows = np.sort(rng.choice(n, min(n, _ROWS), replace=False))
    truth = to_host(head.with_rows(rows).attend()[0]).astype(np.float64)
    size = float(np.sqrt(np.mean(np.sum(truth**2, axis=1))))
    if not size > 0:
        return None
    error = float(np.linalg.norm(_answers(head, expansion, rows) - truth))
    expected = error / math.sqrt(len(rows)) / size
    bound = expansion.bound * math.sqrt(p) / size
    failure = FailureBudget().next
    if bound <= _ROOM * tol or promises(bound**2, expected**2, ROWS, failure):
        return expansion, expected
    return None


def _answers(head: Head, expansion: PolynomialExpansion, rows: Array) -> Array:
    """Outputs of the polynomial in the given rows, computed from all logits."""
    t = expansion.transform
    every = np.arange(head.sizes[1])
    query, key, value = (
        host_rows(x, some).astype(np.float64)
        for x, some in ((head.query, rows), (head.key, every), (head.value, every))
    )
    key = key - t.key_center
    logits = ((query - t.query_center) @ t.query_map) @ (key @ t.key_map).T
    weights = np.polynomial.polynomial.polyval(logits, expansion.coefficients)
    tilt = key @ t.tilt
    weights = weights * np.exp(tilt - tilt.max())
    answer: Array = weights @ value / weights.sum(axis=1, keepdims=True)
    return answer
