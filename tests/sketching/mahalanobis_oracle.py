"""Mahalanobis distances from the definition, in NumPy alone."""

import numpy as np


def distances(factor, queries, points):
    """``|U (q - x)|`` of every query and point, in long double, ``(q, n)``."""
    apart = queries[:, None, :].astype(np.longdouble) - points[None]
    image = np.einsum("qnd,kd->qnk", apart, factor.astype(np.longdouble))
    return np.sqrt((image**2).sum(axis=2)).astype(np.float64)


def assert_within(certificate, answer, truth):
    """Every distance keeps the relative error that the certificate names."""
    assert certificate.norm == "relative"
    # distances that are rounded to the dtype of the answer
    slack = float(certificate.error) + 4 * np.finfo(answer.dtype).eps
    off = np.abs(answer.astype(np.float64) - truth)
    assert (off <= slack * truth).all(), (off / np.maximum(truth, 1e-300)).max()
