"""Checks accept valid input and describe what is wrong with invalid input."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sketching._lib import validation
from sketching._lib.validation import (
    check_choice,
    check_finite,
    check_float_array,
    check_integer,
    check_number,
)


def test_choices_are_listed():
    check_choice("kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"kind: expected one of \('a', 'b'\), got 3"):
        check_choice("kind", 3, ("a", "b"))


@pytest.mark.parametrize("good", [1, 2.5, np.float32(0.5), np.int8(3)])
def test_real_numbers_become_floats(good):
    got = check_number("x", good)
    assert type(got) is float
    assert got == good


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (True, TypeError, "x: expected a real number, got bool"),
        ("1", TypeError, "x: expected a real number, got str"),
        (None, TypeError, "got NoneType"),
        (np.ones(1), TypeError, "got ndarray"),
        (1j, TypeError, "got complex"),
        (np.nan, ValueError, "x: expected a finite number, got nan"),
        (-np.inf, ValueError, "x: expected a finite number, got -inf"),
        (0, ValueError, "x: expected a number above 0, got 0.0"),
    ],
)
def test_other_numbers_are_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        check_number("x", bad, above=0)


def test_least_is_allowed():
    assert check_number("x", 2, least=2) == 2
    with pytest.raises(ValueError, match=r"x: expected a number >= 2, got 1\.5"):
        check_number("x", 1.5, least=2)


@pytest.mark.parametrize("good", [3, np.int64(3), np.uint8(3)])
def test_integers_become_ints(good):
    assert type(check_integer("k", good, least=3)) is int


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (2, ValueError, "k: expected an integer >= 3, got 2"),
        (3.0, TypeError, "k: expected an integer, got float"),
        (True, TypeError, "k: expected an integer, got bool"),
    ],
)
def test_other_integers_are_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        check_integer("k", bad, least=3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_pass(xp, dtype):
    if xp.name == "array_api_strict" and dtype is np.float16:
        pytest.skip("array_api_strict has no float16")
    check_float_array("x", xp.asarray(np.ones((2, 3), dtype)), least_ndim=2)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex128])
def test_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(TypeError, match="x: expected a floating-point dtype, got "):
        check_float_array("x", xp.asarray(np.ones((2, 3), dtype)), least_ndim=2)


@given(
    x=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
        elements={"allow_nan": True, "allow_infinity": True},
    )
)
def test_nan_and_infinity_are_counted_and_placed(x):
    bad = np.argwhere(~np.isfinite(x))
    if len(bad) == 0:
        check_finite("x", x)
        return
    with pytest.raises(ValueError, match="x: expected finite numbers") as error:
        check_finite("x", x)
    place = tuple(int(i) for i in bad[0])
    assert f"got {len(bad)} NaN or infinite, the first at {place}" in str(error.value)


def test_a_sum_that_overflows_is_no_infinity(xp):
    huge = np.full((4, 4), np.finfo(np.float32).max)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_finite("x", xp.asarray(huge))


def test_infinities_that_cancel_are_found(xp):
    x = np.array([[np.inf, 1.0], [-np.inf, 2.0]])
    with pytest.raises(ValueError, match=r"got 2 NaN or infinite, the first at \(0, 0"):
        check_finite("x", xp.asarray(x))


@pytest.mark.skipif(
    np.finfo(np.longdouble).bits == 64, reason="longdouble is float64 here"
)
def test_extended_precision_is_refused():
    with pytest.raises(
        TypeError, match=r"x: .*got float\d+; supported are float16, bf"
    ):
        check_float_array("x", np.ones((2, 3), np.longdouble), least_ndim=2)


@given(
    hnp.arrays(
        np.float16,
        hnp.array_shapes(max_dims=3, max_side=9),
        elements=st.sampled_from([0.0, 1.0, np.nan, np.inf]),
    )
)
def test_blocks_are_checked_as_a_whole(x):
    bad = np.argwhere(~np.isfinite(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_ENTRIES", 5)
        if not len(bad):
            check_finite("x", x)
            return
        first = tuple(int(i) for i in bad[0])
        text = re.escape(f"got {len(bad)} NaN or infinite, the first at {first}")
        with pytest.raises(ValueError, match=text):
            check_finite("x", x)
