"""Bad input is refused at the door, with a message that names it and has numbers."""

import re

import numpy as np
import pytest

import fastattn
from fastattn import (
    Exact,
    Polynomial,
    RefusalError,
    approximate,
    attention,
    explain,
)


def inputs(n=6, m=7, d=4, p=3, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(dtype) for s in ((n, d), (m, d), (m, p))]


def broken(place, change):
    """Inputs of which one was changed."""
    arrays = inputs()
    arrays[place] = change(arrays[place])
    return arrays


def with_entry(value):
    def change(x):
        x[2, 1] = value
        x[3, 0] = value
        return x

    return change


BAD_ARRAYS = {
    "NaN": (
        1,
        with_entry(np.nan),
        ValueError,
        "key: expected finite numbers, got 2 NaN or infinite, the first at (2, 1)",
    ),
    "infinity": (2, with_entry(-np.inf), ValueError, "value: expected finite numbers"),
    "infinities that cancel": (
        0,
        lambda x: np.where(np.eye(6, 4) > 0, [np.inf, -np.inf, 0, 0], x),
        ValueError,
        "query: expected finite numbers, got 2 NaN or infinite, the first at (0, 0)",
    ),
    "no rows": (0, lambda x: x[:0], ValueError, "query: expected a non-empty array"),
    "no columns": (2, lambda x: x[:, :0], ValueError, "got shape (7, 0)"),
    "integers": (
        0,
        lambda x: x.astype(np.int64),
        TypeError,
        "query: expected a floating-point dtype, got int64",
    ),
    "booleans": (1, lambda x: x > 0, TypeError, "key: expected a floating-point dtype"),
    "complex numbers": (
        2,
        lambda x: x + 0j,
        TypeError,
        "value: expected a floating-point dtype, got complex128",
    ),
    "objects": (2, lambda x: x.astype(object), TypeError, "floating-point dtype"),
    "one dimension": (
        0,
        lambda x: x[0],
        ValueError,
        "query: expected at least 2 dimensions, got shape (4,)",
    ),
    "other d": (1, lambda x: x[:, :3], ValueError, "query has 4 columns and key has 3"),
    "other m": (2, lambda x: x[:5], ValueError, "key has 7 rows and value has 5"),
    "lists": (0, lambda x: x.tolist(), TypeError, "expected arrays (numpy, cupy,"),
    "nothing": (1, lambda _: None, TypeError, "got NoneType"),
    "mixed dtypes": (
        1,
        lambda x: x.astype(np.float32),
        TypeError,
        "one dtype expected: query is float64, key float32, value float64",
    ),
}


@pytest.mark.parametrize("call", [attention, approximate, explain])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_named(call, case):
    place, change, kind, message = BAD_ARRAYS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call(*broken(place, change))


BAD_OPTIONS = {
    "tol zero": ({"tol": 0}, ValueError, "tol: expected a number above 0, got 0.0"),
    "tol negative": ({"tol": -1}, ValueError, "tol: expected a number above 0"),
    "tol NaN": ({"tol": np.nan}, ValueError, "tol: expected a finite number, got nan"),
    "tol text": ({"tol": "1"}, TypeError, "tol: expected a real number, got str"),
    "tol boolean": ({"tol": True}, TypeError, "tol: expected a real number, got bool"),
    "scale infinite": ({"scale": np.inf}, ValueError, "scale: expected a finite"),
    "scale complex": ({"scale": 1j}, TypeError, "scale: expected a real number"),
    "guarantee": (
        {"guarantee": "certain"},
        ValueError,
        "guarantee: expected one of ('sampled', 'proven'), got 'certain'",
    ),
    "method class": (
        {"method": Exact},
        TypeError,
        "method: expected a method object such as Auto(), Exact()",
    ),
    "method text": ({"method": "exact"}, TypeError, "got 'exact'"),
    "is_causal text": (
        {"is_causal": "yes"},
        TypeError,
        "is_causal: expected True or False, got str",
    ),
    "rng text": ({"rng": "a"}, TypeError, "rng: expected an int >= 0"),
    "rng negative": ({"rng": -1}, TypeError, "rng: expected an int >= 0"),
    "rng fraction": ({"rng": 0.5}, TypeError, "rng: expected an int >= 0"),
    "mask of another size": (
        {"key_mask": np.ones(6, bool)},
        ValueError,
        "key_mask: expected 7 entries in the last dimension",
    ),
    "mask of integers": (
        {"key_mask": np.ones(7, int)},
        TypeError,
        "key_mask: expected a boolean array (True keeps a key), got int64",
    ),
    "mask of no dimension": (
        {"key_mask": np.array(True)},
        ValueError,
        "key_mask: expected 7 entries",
    ),
    "mask list": ({"key_mask": [True] * 7}, TypeError, "key_mask"),
    "mask without heads": ({"key_mask": np.ones((0, 7), bool)}, ValueError, "key_mask"),
}


@pytest.mark.parametrize("call", [attention, approximate, explain])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_named(call, case):
    options, kind, message = BAD_OPTIONS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call(*inputs(), **options)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"degree": -1}, ValueError, "degree: expected an integer >= 0, got -1"),
        ({"degree": 2.0}, TypeError, "degree: expected an integer, got float"),
        ({"rank": 0}, ValueError, "rank: expected an integer >= 1, got 0"),
        ({"landmarks": -1}, ValueError, "landmarks: expected an integer >= 0"),
        ({"basis": "best"}, ValueError, "basis: expected one of ('minimax', 'taylor'"),
    ],
)
def test_bad_settings_of_polynomial_are_named(settings, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        Polynomial(**settings)


@pytest.mark.parametrize(("block", "kind"), [(0, ValueError), (1.5, TypeError)])
def test_bad_blocks_of_exact_are_named(block, kind):
    with pytest.raises(kind, match="block: expected an integer"):
        Exact(block=block)


def test_libraries_do_not_mix(xp):
    query, key, value = inputs()
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict missing")
    other = strict.asarray(key) if "strict" not in xp.name else key
    with pytest.raises(TypeError, match="arrays of one library expected, got a mix"):
        attention(xp.asarray(query), other, xp.asarray(value))


def test_mask_of_another_library_is_refused():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict missing")
    with pytest.raises(TypeError, match="arrays of one library expected"):
        attention(*inputs(), key_mask=strict.asarray(np.ones(7, bool)))


@pytest.mark.parametrize("kind", ["masked", "matrix"])
def test_arrays_that_mean_something_else_are_refused(kind):
    arrays = inputs()
    if kind == "masked":
        arrays[2] = np.ma.masked_greater(arrays[2], 0)
    else:
        # the constructor itself warns
        arrays = [x.view(np.matrix) for x in arrays]
    with pytest.raises(TypeError, match="expected"):
        attention(*arrays)


def test_leading_dimensions_that_do_not_broadcast_are_refused():
    query, key, value = inputs()
    message = (
        "leading dimensions do not broadcast: query (2, 6, 4), key (3, 7, 4), "
        "value (7, 3)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(np.stack([query] * 2), np.stack([key] * 3), value)


def test_mask_that_does_not_broadcast_is_refused():
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"key_mask \(2, 7\)"):
        attention(np.stack([query] * 3), key, value, key_mask=np.ones((2, 7), bool))


@pytest.mark.parametrize("method", [None, Exact()])
@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_a_tolerance_that_no_precision_keeps_is_refused(method, guarantee):
    arrays = inputs(dtype=np.float32)
    with pytest.raises(RefusalError, match="tol=1e-09") as refusal:
        approximate(*arrays, tol=1e-9, method=method, guarantee=guarantee)
    assert isinstance(refusal.value, ValueError)
    # a number says what could have been had
    assert re.search(r"\d\.\d+e-0[678]", str(refusal.value))


def test_too_small_a_degree_is_refused_with_numbers():
    message = r"cannot be proven: centred logits up to \d\.?\d*, degree 1, rank 5 are"
    with pytest.raises(RefusalError, match=message):
        approximate(
            *inputs(), tol=1e-3, method=Polynomial(degree=1), guarantee="proven"
        )


def test_logits_beyond_every_degree_are_refused_with_their_bound():
    query, key, value = inputs()
    with pytest.raises(RefusalError, match=r"logits up to \d+.*wider than"):
        approximate(query * 20, key, value, method=Polynomial(), guarantee="proven")


def test_too_many_monomials_are_refused_with_their_number():
    arrays = inputs(d=64)
    with pytest.raises(RefusalError, match="degree 4 in 64 coordinates needs 814385"):
        approximate(*arrays, tol=1, method=Polynomial(degree=4))


def test_a_missed_tolerance_names_the_error_seen():
    with pytest.raises(RefusalError, match=r"misses tol=0.0001: \d\.\d+e-\d+ on sampl"):
        approximate(*inputs(), tol=1e-4, method=Polynomial(degree=1), rng=0)


def test_explain_reports_a_refusal_instead_of_raising():
    options = {"tol": 1e-3, "method": Polynomial(degree=1), "guarantee": "proven"}
    (candidates,) = explain(*inputs(), **options).heads
    assert [c.accepted for c in candidates] == [False]
    assert "cannot be proven" in candidates[0].plan.reason


def test_samples_are_asked_for_by_their_names():
    with pytest.raises(
        ValueError, match=r"expected one of .*'minilm-sharp'.*'nothing'"
    ):
        fastattn.load_sample("nothing")


@pytest.mark.parametrize("name", fastattn.sample_names())
def test_samples_are_float32_heads(name):
    query, key, value = fastattn.load_sample(name)
    assert query.dtype == key.dtype == value.dtype == np.float32
    assert query.shape[:2] == key.shape[:2] == value.shape[:2]
    assert all(np.isfinite(x).all() for x in (query, key, value))


def test_either_byte_order_gives_one_answer():
    arrays = inputs()
    swapped = [x.astype(x.dtype.newbyteorder()) for x in arrays]
    np.testing.assert_array_equal(attention(*swapped, rng=0), attention(*arrays, rng=0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_tensors_that_require_gradients_are_answered_quietly(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    options = {"dtype": getattr(torch, name), "requires_grad": True}
    arrays = [torch.tensor(x, **options) for x in inputs()]
    with torch.no_grad():
        value = approximate(*arrays, tol=0.1, rng=0).value
    assert value.dtype == options["dtype"]
    assert not value.requires_grad


def test_masked_arrays_are_sent_to_key_mask():
    query, key, value = inputs()
    masked = np.ma.masked_array(np.ones(7, bool))
    with pytest.raises(TypeError, match=r"query: expected an array .* key_mask"):
        attention(np.ma.masked_array(query), key, value)
    with pytest.raises(TypeError, match="key_mask: expected an array without a mask"):
        attention(query, key, value, key_mask=masked)


def test_bfloat16_of_numpy_is_refused_with_what_to_do(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    arrays = [x.astype(ml_dtypes.bfloat16) for x in inputs()]
    message = r"expected a floating-point dtype of NumPy, got bfloat16 .*float32"
    with pytest.raises(TypeError, match=f"query: {message}"):
        attention(*arrays)
    with pytest.raises(TypeError, match=message):
        fastattn.prepare(*arrays[1:], queries=arrays[0])
