"""Kernels of the scans compute what their references compute."""

import numpy as np
import pytest

from sketching._ops import distances as ops
from sketching._ops.ensemble import median, median_distances
from sketching._ops.search import search
from sketching.index.int16_rows import halved, widened

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# around the rows of a tile, and those of a span of tiles
SIZES = pytest.mark.parametrize("n", [1, 7, 1023, 1025, 70_000])


def problem(dtype, n, q, d=6):
    rng = np.random.default_rng(n + q)
    points, queries = (rng.standard_normal((m, d)).astype(dtype) for m in (n, q))
    points[: n // 3] = queries[0]
    return points, queries


def close(got, want, dtype):
    slack = 200 * np.finfo(dtype).eps
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=slack, atol=slack)


@DTYPES
@SIZES
@pytest.mark.parametrize("q", [1, 64])
def test_scan(n, q, dtype):
    points, queries = problem(dtype, n, q)
    h, own = (np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (points, queries))
    of_points = np.stack([h, 1e-3 * h, np.sqrt(h)])
    arguments = (points, queries, of_points, np.stack([own, np.sqrt(own)]))
    options = {"rounding": 1e-4, "tolerance": 1e-2}
    got = ops.scan(*arguments, **options)
    want = ops.scan.reference(*arguments, **options)
    close(got, want, dtype)
    np.testing.assert_array_equal(np.isnan(got[0]).sum(axis=1), got[1])
    assert got[1][0] >= n // 3


@DTYPES
@SIZES
@pytest.mark.parametrize("q", [1, 64])
def test_brackets_and_lower_bounds(n, q, dtype):
    points, queries = problem(dtype, n, q)
    rng = np.random.default_rng(0)
    h, own = (np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (points, queries))
    least = rng.random(n)
    of_points = np.stack([h, 1e-5 * h, least, least + 0.01])
    arguments = (points, queries, of_points, np.stack([own, rng.random(q)]))
    got = ops.brackets(*arguments, rounding=1e-6, tolerance=0.2)
    want = ops.brackets.reference(*arguments, rounding=1e-6, tolerance=0.2)
    # a distance may lie on either side of the tolerance
    differ = np.isnan(got[0]) != np.isnan(want[0])
    assert differ.mean() < 1e-3
    assert (np.abs(got[2] - want[2]) <= differ.sum(axis=1)).all()
    both = ~np.isnan(got[0]) & ~np.isnan(want[0])
    close((got[0][both],), (want[0][both],), dtype)
    np.testing.assert_allclose(got[1], want[1], atol=1e-3)
    close(
        (ops.lower_bounds(*arguments, rounding=1e-6),),
        (ops.lower_bounds.reference(*arguments, rounding=1e-6),),
        np.float32,
    )


@SIZES
@pytest.mark.parametrize("q", [1, 5])
def test_median_distances(n, q):
    rng = np.random.default_rng(n)
    sketches = rng.standard_normal((4, n, 6)).astype(np.float32)
    sampled = np.array([2, 0, 2])
    queries = rng.standard_normal((3, q, 6)).astype(np.float32)
    sketches[:, : n // 3] = queries[:1, :1]
    codes, steps = halved(sketches)
    sketches = widened(codes, steps)
    squares = np.einsum("lnm,lnm->ln", sketches, sketches)
    floor = np.full(n, 0.1, np.float32)
    arguments = (codes, np.stack([steps, squares]), sampled, queries, floor)
    got = median_distances(*arguments, rounding=0.01)
    want = median_distances.reference(*arguments, rounding=0.01)
    differ = np.isnan(got) != np.isnan(want)
    assert differ.sum() <= 1e-3 * differ.size
    both = ~np.isnan(got) & ~np.isnan(want)
    close((got[both],), (want[both],), np.float32)
    apart = sketches[sampled][:, None] - queries[:, :, None]
    true = np.median(np.linalg.norm(apart, axis=3), axis=0)
    close((got[both],), (true[both],), np.float32)


@DTYPES
@SIZES
def test_search(n, dtype):
    points, queries = problem(dtype, n, 3)
    h, own = (np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (points, queries))
    of_points = np.stack([h, 1e-6 * h, np.sqrt(h)])
    of_queries = np.stack([own, np.sqrt(own)])
    truth = np.sqrt(np.maximum(h + own[:, None] - 2.0 * queries @ points.T, 0))
    bounds = (0.9 * truth).astype(dtype)
    k, first = min(n, 4), min(n, 8)
    for most in (first, n):
        options = {"k": k, "first": first, "most": most}
        options |= {"rounding": 1e-6, "tolerance": 1e-3}
        arguments = (points, queries, bounds, of_points, of_queries)
        got, want = (x(*arguments, **options) for x in (search, search.reference))
        # of many bounds that are equal, any may be among the first
        np.testing.assert_allclose(got[2], want[2], atol=first)
        assert (got[2] >= k).all()
        for slots, values, count, row in zip(*got, truth, strict=True):
            if count > most:
                assert (slots == -1).all()
                continue
            assert (np.diff(slots[:count]) > 0).all()
            assert (slots[count:] == -1).all()
            assert np.sort(row)[:k] == pytest.approx(np.sort(row[slots[:count]])[:k])
            known = ~np.isnan(values)
            close((values[known],), (row[slots[known]],), np.float32)


@pytest.mark.parametrize("count", [1, 3, 9, 31])
def test_median_of_any_odd_number_and_shape(count, rng):
    values = rng.standard_normal((count, 3, 4)).round(1)
    np.testing.assert_array_equal(median(values), np.median(values, axis=0))
    assert median(values).shape == (3, 4)
