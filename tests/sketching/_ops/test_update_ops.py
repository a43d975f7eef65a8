"""Updates of a metric: kernels against references, rounding against exact results."""

import numpy as np
import pytest

from sketching._ops.cpu.short_products import (
    is_fast,
    share,
    short_products,
    shortened,
)
from sketching._ops.updates import changed_factor, changed_norms
from sketching.index.int16_rows import halved

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# around the rows of a tile, and those of a span of tiles
SIZES = pytest.mark.parametrize("n", [1, 7, 1023, 1025, 70_000])
ROUNDING = 1e-6


@pytest.mark.parametrize("r", [1, 2, 5, 40])
@pytest.mark.parametrize("k", [3, 150])
def test_a_factor_changes_by_one_update_after_the_other(r, k, rng):
    factor, left = rng.standard_normal((k, 6)), rng.standard_normal((r, k))
    right, images = rng.standard_normal((r, 6)), []
    want = factor.copy()
    for a, b in zip(left, right, strict=True):
        images.append(want.T @ a)
        want += np.outer(a, b)
    for change in (changed_factor, changed_factor.reference):
        got = change(factor.copy(), left, right)
        np.testing.assert_allclose(got[0], want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got[1], np.stack(images), rtol=1e-9, atol=1e-9)


def problem(n, d, r, m, dtype, size=1.0):
    """Points, vectors of updates, statistics of both, and updates seen by some."""
    rng = np.random.default_rng(n + r)
    points = rng.standard_normal((n, d)).astype(dtype)
    left, right = size * rng.standard_normal((r, 4)), rng.standard_normal((r, d))
    ratios = rng.standard_normal(r)
    images = ratios[:, None] * right
    images[:m] = rng.standard_normal((m, d))
    lengths = (np.linalg.norm(x, axis=1) for x in (right, images))
    order = rng.permutation(r)
    of_updates = np.stack([(left**2).sum(axis=1), ratios, *lengths, order])
    point_norm = np.linalg.norm(points.astype(np.float64), axis=1)
    of_points = np.stack([9 * point_norm**2, np.full(n, 1e-9), point_norm])
    seen = np.where(rng.random(n) < 0.2, rng.integers(0, r + 1, n), 0)
    vectors = np.concatenate([right, images[:m]]).astype(dtype)
    return points, vectors, of_points, seen, of_updates


def compare(arrays, dtype, **options):
    points, vectors, of_points, *rest = arrays
    got, kept = changed_norms(points, vectors, of_points.copy(), *rest, **options)
    want, all_kept = changed_norms.reference(*arrays, **options)
    slack = 400 * np.finfo(dtype).eps
    for one, other in zip(got, want, strict=True):
        atol = slack * float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=slack, atol=atol)
    assert kept.dtype == all_kept.dtype
    np.testing.assert_allclose(kept, all_kept, rtol=slack, atol=slack)


@DTYPES
@SIZES
@pytest.mark.parametrize(("r", "m"), [(1, 1), (1, 0), (2, 0), (5, 5), (5, 2)])
@pytest.mark.parametrize("keep", [False, True])
def test_changes_of_norms(n, r, m, dtype, keep):
    compare(problem(n, 6, r, m, dtype), dtype, rounding=ROUNDING, keep=keep)


@pytest.mark.parametrize(("r", "m"), [(1, 1), (5, 2)])
def test_changes_of_norms_of_points_in_half_the_width(r, m):
    points, *rest = problem(1500, 6, r, m, np.float32)
    codes, steps = halved(points)
    compare((codes, *rest), np.float32, rounding=ROUNDING, steps=steps)


@pytest.mark.parametrize("size", [1e-4, 3.0])
@pytest.mark.parametrize("m", [0, 40])
def test_norms_are_off_by_no_more_than_is_said(size, m):
    # small updates may be rounded to short integers, large ones not
    arrays = problem(2000, 100, 40, m, np.float32, size)
    arrays[4][1] *= size
    arrays[4][3] *= size
    points, vectors, of_points, seen, of_updates = arrays
    vectors[40:] *= np.float32(size)
    rounding = 2.0**-24 * 8 * 11
    got, _ = changed_norms(
        *arrays[:2], of_points.copy(), *arrays[3:], rounding=rounding
    )
    exact = points.astype(np.float64), vectors.astype(np.float64)
    want, _ = changed_norms.reference(
        *exact, of_points, seen, of_updates, rounding=rounding
    )
    error = np.abs(got[0] - want[0])
    assert (error <= got[1]).all()
    assert (got[1] > 1.01 * want[1]).any() == (size < 1 and is_fast())
    # sketches that follow the products count on single precision
    kept = arrays[0], vectors, of_points.copy(), seen, of_updates
    _, products = changed_norms(*kept, rounding=rounding, keep=True)
    assert np.abs(products - exact[0] @ exact[1][:40].T)[seen == 0].max() < 1e-4
    # and by no more than a fresh norm may be, plus the rounding of single precision
    assert (got[1] <= want[1] + 3 * rounding * want[0]).all()


needs_short = pytest.mark.skipif(
    not is_fast(), reason="the processor does not multiply short integers at once"
)


@needs_short
@pytest.mark.parametrize(("n", "d", "r"), [(1, 1, 1), (7, 33, 3), (131, 100, 6)])
def test_products_of_short_integers(n, d, r, rng):
    points, rows = (rng.standard_normal((m, d)).astype(np.float32) for m in (n, r))
    # all of a length in one number, and no length
    points[0] = 0
    points[0, -1], rows[-1] = -3, 0
    lengths, others = (
        np.linalg.norm(x.astype(np.float64), axis=1) for x in (points, rows)
    )
    got = np.empty((n, r), np.float32)
    short_products(points, lengths, *shortened(rows), got)
    want = points.astype(np.float64) @ rows.T.astype(np.float64)
    # as is promised with the constant of eight deviations
    unit = share(d) * 2.0**-24 * 8 * (1 + np.sqrt(d))
    assert (np.abs(got - want) <= unit * np.outer(lengths, others)).all()
    assert unit < 2e-4 + 1e-6 * np.sqrt(d)


@needs_short
def test_short_integers_do_not_overflow_where_all_terms_agree():
    row = np.ones((2, 4096), np.float32)
    got = np.empty((2, 2), np.float32)
    short_products(row, np.full(2, 64.0), *shortened(row), got)
    np.testing.assert_allclose(got, 4096, rtol=1e-3)
