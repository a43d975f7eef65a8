"""Codes of points: what rounding and updates add to them is in their bounds."""

import numpy as np
import pytest

from sketching import Filter, MahalanobisIndex, MahalanobisMetric
from sketching.index.bounds import ProjectionBounds


def test_tails_of_points_along_the_head_may_be_zero(rng):
    # a tail is a difference of squares: all that is left here is their rounding
    basis = np.linalg.qr(rng.standard_normal((40, 3)))[0].T
    images = 1e3 * rng.standard_normal((500, 3)) @ basis
    bounds = ProjectionBounds.along(basis, np.float64)
    columns = bounds.blank(len(images))
    bounds.encode(columns, slice(0, len(images)), images)
    least, largest = columns["stats"][2:]
    rest = images - (images @ basis.T) @ basis
    tails = np.linalg.norm(rest.astype(np.longdouble), axis=1)
    assert np.all(least <= tails)
    assert np.all(tails <= largest)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codes_after_updates_are_within_their_errors(dtype, rng):
    d = 24
    x = rng.standard_normal((300, d)).astype(dtype)
    index = MahalanobisIndex(MahalanobisMetric(np.eye(d)), mode=Filter(size=4), rng=0)
    index.insert(x)
    for _ in range(8):
        # as many as are queued, so that codes are updated and not made anew
        index.update_metric(*(0.3 * rng.standard_normal((2, 5, d))))
        index._engine.flush()
    state = index._engine.state
    bounds = state.sketch
    assert isinstance(bounds, ProjectionBounds)
    factor = state.metric.factor.astype(np.longdouble)
    images = state.points.rows.astype(np.longdouble) @ factor.T
    heads = images @ bounds.basis.astype(np.longdouble).T
    off = np.linalg.norm(heads - bounds.table["codes"], axis=1)
    assert off.max() > 0
    assert np.all(off <= bounds.table["slip"])
