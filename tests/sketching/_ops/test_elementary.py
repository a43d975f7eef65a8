"""exp and maximum of the numba kernels, against NumPy in long double."""

import numpy as np
import pytest
from numba import njit

from sketching._ops.cpu.elementary import exp, maximum

# the largest arguments, and the least that are not clamped
RANGE = {np.float32: (-87.0, 88.0), np.float64: (-708.0, 709.0)}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@njit
def _exps(x, out):
    for i in range(x.size):
        out[i] = exp(x[i])


@njit
def _maxima(x, y, out):
    for i in range(x.size):
        out[i] = maximum(x[i], y[i])


def exps(x):
    out = np.empty_like(x)
    _exps(x, out)
    return out


def ulps(x, got):
    """Error of ``got`` as exp of ``x``, in units of its last place."""
    truth = np.exp(x.astype(np.longdouble))
    return np.abs(got - truth) / np.spacing(truth.astype(x.dtype))


@DTYPES
def test_exp_is_within_two_units_in_the_last_place(dtype):
    low, high = RANGE[dtype]
    x = np.linspace(low, high, 200_003).astype(dtype)
    assert ulps(x, exps(x)).max() <= 2


@DTYPES
def test_exp_is_within_two_units_near_zero_and_where_ranges_meet(dtype):
    near = np.concatenate([s * np.geomspace(1e-30, 1, 5001) for s in (-1, 1)])
    # halves of ln 2: where the reduced argument changes sign
    k = np.arange(-120, 121) / 2
    seams = np.concatenate([k * np.log(2) + e for e in (-1e-7, -1e-13, 0, 1e-13, 1e-7)])
    x = np.concatenate([near, seams]).astype(dtype)
    assert ulps(x, exps(x)).max() <= 2


@DTYPES
def test_exp_of_zero_is_one(dtype):
    np.testing.assert_array_equal(exps(np.array([0.0, -0.0], dtype)), 1)


@DTYPES
def test_exp_of_what_is_below_the_range_is_negligible_and_positive(dtype):
    low, _ = RANGE[dtype]
    x = np.array([low, low - 1, 10 * low, -1e30, -np.inf], dtype)
    got = exps(x)
    np.testing.assert_array_equal(got, got[0])
    assert 0 < got[0] < 4 * np.finfo(dtype).tiny


@DTYPES
def test_exp_is_monotone_to_rounding(dtype):
    low, high = RANGE[dtype]
    got = exps(np.linspace(low, high, 100_003).astype(dtype))
    eps = np.finfo(dtype).eps
    assert np.all(got[1:] >= got[:-1] * (1 - 4 * eps))


@DTYPES
def test_exp_keeps_the_dtype(dtype):
    assert exps(np.ones(3, dtype)).dtype == dtype


@DTYPES
def test_maximum_is_the_larger(dtype):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1000)).astype(dtype)
    x[:4], y[:4] = [-np.inf, np.inf, 0, 3], [1, 1, -0.0, 3]
    out = np.empty_like(x)
    _maxima(x, y, out)
    np.testing.assert_array_equal(out, np.maximum(x, y))
