"""Rows that are computed in full after an approximate answer."""

import numpy as np

from fastattn import Polynomial, approximate
from fastattn.certificates import certify
from fastattn.certificates.certify import recompute_rows
from fastattn.problem.batch import Batch
from tests import oracles


def test_rows_that_are_not_sampled_are_as_good_as_the_truth_of_the_others(rng):
    # logits of hundreds: in float32 such rows are off by far more than their storage
    query, key, value = rng.standard_normal((3, 300, 8)).astype(np.float32)
    query *= 60
    head = Batch.of(query, key, value, None, False, None).head(0)
    rows, want = np.arange(300), oracles.attention(query, key, value)[0]
    off = []
    for dtype in (None, np.float64):
        found, _ = recompute_rows(
            head, np.empty_like(value), np.empty(300, "f4"), rows, dtype
        )
        off.append(np.linalg.norm(found - want) / np.linalg.norm(want))
    assert off[1] < np.finfo(np.float32).eps < off[0]


def test_precise_certificates_recompute_in_float64(rng, monkeypatch):
    asked = []

    def spy(head, value, normalizer, rows, dtype=None):
        asked.append(dtype)
        return recompute_rows(head, value, normalizer, rows, dtype)

    monkeypatch.setattr(certify, "recompute_rows", spy)
    query, key, value = 0.2 * rng.standard_normal((3, 600, 4)).astype(np.float32)
    query[:2] *= 20
    for tol in (1e-2, 5e-5):
        method = Polynomial(degree=8)
        approximate(query, key, value, tol=tol, method=method, rng=0)
    assert asked == [None, np.float64]
