"""Lengths of rows: the kernel against its reference."""

import numpy as np
import pytest

from fastattn._ops.rows import squared_lengths
from tests.laws import DTYPES, OpLaws


class TestSquaredLengths(OpLaws):
    op = squared_lengths
    sizes_used = ("n",)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        arrays = [rng.standard_normal((n, 7)), *rng.standard_normal((2, 7))]
        return [x.astype(dtype) for x in arrays], {}

    def slack(self, arrays, options):  # noqa: ARG002
        return 1e3 * np.finfo(arrays[0].dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_that_overflow_are_infinite(dtype):
    x = np.array([[1.0, 2.0], [np.finfo(dtype).max, 0.0]], dtype)
    got = squared_lengths(x, x[0] * 0, x[0] * 0 + 1)
    assert got[0] == 5
    assert np.isinf(got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_columns_have_no_length(dtype):
    empty = np.zeros(0, dtype)
    got = squared_lengths(np.zeros((3, 0), dtype), empty, empty)
    np.testing.assert_array_equal(got, np.zeros(3, dtype))
