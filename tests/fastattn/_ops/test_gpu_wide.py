"""Laws of the GPU kernels for widths beyond a tile and work beyond one launch.

The laws of the ops, in the tests of their modules, run on a device too, and are of
narrow problems. ``test_cuda_source.py`` runs both on a CPU that emulates a device.
"""

import numpy as np
import pytest

from fastattn._ops.clusters import regroup
from fastattn._ops.linear import elu_plus_one, prefix_products, squares
from fastattn._ops.lowrank import Functions, key_sums, query_means
from fastattn._ops.multipole import BlockStatistics, describe, multipole
from fastattn._ops.multipole_rows import summarise
from fastattn.methods.lowrank.basis import Hermite
from tests.laws import DTYPES, Flat, bring, fetch, skip_without

# coordinates of the entries of the expansion below
SIDES = 9


def agree(op, arrays, options, slack, limits=()):
    """Compare the kernel with the reference in float64, relative to the largest."""
    skip_without("gpu")
    moved = [bring("gpu", x) for x in arrays]
    kernel, dtype = op.kernel("gpu"), arrays[0].dtype
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in limits:
            assert name in kernel.__globals__
            patch.setitem(kernel.__globals__, name, limit)
        got = kernel(*moved, **options)
    exact = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in arrays]
    want = op.reference(*exact, **options)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for ours, theirs in zip(map(fetch, got), want, strict=True):
        assert ours.shape == theirs.shape
        largest = 1 if theirs.dtype.kind != "f" else np.nanmax(np.abs(theirs))
        error = slack * np.finfo(dtype).eps * largest
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


def lowrank_inputs(dtype, rank, landmarks, p):
    """An expansion with many polynomials and landmarks, in few coordinates."""
    rng = np.random.default_rng(rank + landmarks)
    spread = np.linspace(0.8, 0.2, SIDES)
    projection = rng.standard_normal((2 * SIDES, SIDES + 1)) / 9
    marks = rng.standard_normal((landmarks, SIDES)) / 3
    weights = 1e-4 * rng.standard_normal((rank + landmarks, p + 1))
    weights[0, -1] = 5
    arrays = projection, marks, weights
    return rng, Hermite.of(spread, rank).op_arguments, [x.astype(dtype) for x in arrays]


class WideLaws:
    """A place supplies the kernel of an op for the GPU."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rank", "landmarks", "p"), [(1, 70, 3), (150, 33, 70)])
    @pytest.mark.parametrize("marks", [1 << 23, 40_000])
    def test_key_sums(self, dtype, rank, landmarks, p, marks):
        rng, op_arguments, (projection, points, _) = lowrank_inputs(
            dtype, rank, landmarks, p
        )
        m, d = 2500, len(projection)
        key, value = rng.standard_normal((m, d)), rng.standard_normal((m, p))
        center, value_center = rng.standard_normal(d) / 9, rng.standard_normal(p)
        arrays = [x.astype(dtype) for x in (key, value, center)]
        arrays += [projection, points, value_center.astype(dtype)]
        options = {"offset": -0.5, "longest": 30.0, **op_arguments}
        agree(key_sums, arrays, options, 400, [("_MARKS", marks)])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rank", "landmarks", "p"), [(1, 70, 3), (150, 33, 70)])
    @pytest.mark.parametrize("rows", [1 << 18, 100])
    def test_query_means(self, dtype, rank, landmarks, p, rows):
        rng, op_arguments, some = lowrank_inputs(dtype, rank, landmarks, p)
        projection, points, weights = some
        n, d = 300, len(projection)
        arrays = [
            rng.standard_normal((n, d)), projection, rng.standard_normal(SIDES + 1) / 9,
            points, np.full(SIDES, 0.1), weights, rng.standard_normal((40, d)) / 9,
            np.abs(rng.standard_normal((40, p + 1))) / 9,
            np.outer([-0.2, 0.2], np.ones(p)),
            rng.standard_normal(p),
        ]  # fmt: skip
        arrays = [x.astype(dtype) for x in arrays]
        limits = [("ROWS", rows), ("_MARKS", 30 * rows)]
        agree(Flat(query_means, Functions, 1), arrays, op_arguments, 400, limits)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("threshold", "numbers"), [(0, 1 << 26), (1e-3, 1 << 26), (1e-3, 1), (1e9, 1)]
    )
    def test_multipole(self, dtype, threshold, numbers):
        rng, d, p = np.random.default_rng(0), 35, 70
        query, key = (rng.standard_normal((x, d)) / 3 for x in (300, 330))
        arrays = [x.astype(dtype) for x in (query, key, rng.standard_normal((330, p)))]
        # some blocks of one row, and of more than a tile
        cuts = np.array([0, 1, 30, 31, 50, 114, 180, 200, 220, 240, 300])
        start = np.linspace(0, 330, 22).astype(int)
        described = describe.reference(arrays[0], cuts=cuts, rows=16)
        metric = np.linspace(1.5, 0.5, d).astype(dtype)
        options = {
            "cuts": cuts, "start": start, "group": np.arange(21) // 8,
            "threshold": threshold,
        }  # fmt: skip
        arrays = [arrays[0], *described, *arrays[1:], metric]
        agree(
            Flat(multipole, BlockStatistics, 1),
            arrays,
            options,
            3000,
            [("_NUMBERS", numbers)],
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("decay", [None, 0.99])
    @pytest.mark.parametrize("states", [1 << 26, 1])
    @pytest.mark.parametrize("shift", [-100, 0, 100])
    def test_prefix_products(self, dtype, decay, states, shift):
        rng, n, m, r, p = np.random.default_rng(1), 200, 230, 70, 70
        shapes = (n, r), (m, r), (m, p), (r, p)
        arrays = [rng.standard_normal(s).astype(dtype) for s in shapes]
        prefix_lengths = np.clip(np.arange(n) + 1 + shift, 0, m)
        options = {"prefix_lengths": prefix_lengths, "decay": decay}
        if decay is not None:
            options |= {"row": 120 + np.arange(n), "column": np.arange(m), "origin": 2}
        agree(prefix_products, arrays, options, 400, [("_STATES", states)])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_wide_rows(self, dtype):
        rng = np.random.default_rng(2)
        x = rng.standard_normal((60, 150)).astype(dtype)
        cuts = np.array([0, 1, 30, 60])
        agree(describe, [x], {"cuts": cuts, "rows": 7}, 100)
        agree(squares, [x], {}, 10)
        agree(regroup, [x, rng.permutation(60)], {"start": cuts}, 0)
        agree(regroup, [x, np.arange(60)], {"start": cuts}, 0, [("_PRODUCTS", 3)])
        agree(elu_plus_one, [x], {}, 10, [("_BLOCKS", 2)])
        x[:, 3] *= 8
        value = rng.standard_normal((60, 140)).astype(dtype)
        agree(summarise, [x, value, value[0]], {"start": cuts}, 3000)


@pytest.mark.gpu
# a first run on a device must not fail for a warning of another package
@pytest.mark.filterwarnings("default")
class TestDevice(WideLaws):
    pass
