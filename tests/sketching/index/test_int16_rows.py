"""Rows of 16-bit integers: their rounding errors, and rows at the limits."""

import numpy as np
import pytest

from sketching.index.int16_rows import STEPS, halved, widened


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_number_is_off_by_half_a_step(size, dtype, rng):
    rows = (size * rng.standard_normal((3, 50, 7))).astype(dtype)
    codes, steps = halved(rows)
    largest = np.abs(rows).max(axis=2)
    np.testing.assert_allclose(steps, largest / STEPS, rtol=1e-6)
    off = np.abs(widened(codes, steps) - rows)
    # and a little for the step itself, which is rounded to single precision
    assert (off <= largest[..., None] * (0.5 / STEPS + 2e-7)).all()


def test_rounding_twice_changes_nothing(rng):
    codes, steps = halved(rng.standard_normal((100, 5)))
    again, same = halved(widened(codes, steps))
    np.testing.assert_array_equal(codes, again)
    np.testing.assert_allclose(steps, same, rtol=1e-6)


def test_rows_of_zeros_and_of_one_sign():
    rows = np.array([[0.0, 0.0], [-3.0, -1.5], [2.0, 2.0]])
    np.testing.assert_allclose(widened(*halved(rows)), rows, atol=1e-4)
    np.testing.assert_array_equal(halved(rows)[0].max(axis=1), [0, -16384, STEPS])
