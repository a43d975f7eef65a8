"""Linear attention against the sum over all weights, and what it owes its callers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import (
    Cosformer,
    EluPlusOne,
    Identity,
    PolySketch,
    RandomFeatures,
    RandomMaclaurin,
    RefusalError,
    Relu,
    Taylor,
    TensorSketch,
    linear_attention,
)
from tests import linear_kernels as kernels
from tests.laws import BLOCK_EDGES, DTYPES

D = 4
SPREAD = 0.5


def kernel_of(feature_map, scale=1.0):
    """The weights of a map from the definition; the scale goes to the logits."""
    root = np.sqrt(abs(scale))
    if isinstance(feature_map, RandomFeatures):
        (directions,) = feature_map.draw(D)
        plain = kernels.random_features(directions, feature_map.kind)
    elif isinstance(feature_map, TensorSketch):
        drawn = feature_map.draw(D)
        plain = kernels.tensor_sketch(drawn, feature_map.constant)
    elif isinstance(feature_map, PolySketch):
        plain = kernels.poly_sketch(feature_map.draw(D))
    elif isinstance(feature_map, RandomMaclaurin):
        plain = kernels.random_maclaurin(*feature_map.draw(D))
    elif isinstance(feature_map, Cosformer):
        plain = kernels.cosformer(feature_map.length)
    else:
        plain = {
            Identity: kernels.logits,
            EluPlusOne: kernels.products(kernels.elu_plus_one),
            Relu: kernels.products(kernels.relu),
            Taylor: kernels.taylor,
        }[type(feature_map)]
    return lambda query, key: plain(np.sign(scale) * root * query, root * key)


POSITIVE = [
    EluPlusOne(),
    Relu(),
    Cosformer(3000),
    Taylor(),
    RandomFeatures(8),
    RandomFeatures(8, "hyperbolic", orthogonal=False),
    PolySketch(4, 3),
]
SIGNED = [
    Identity(),
    RandomFeatures(64, "trigonometric"),
    RandomMaclaurin(256),
    TensorSketch(2, 5),
]
MAPS = [pytest.param(x, id=str(x)) for x in POSITIVE + SIGNED]
OFTEN = [pytest.param(x, id=str(x)) for x in (EluPlusOne(), RandomFeatures(8), Relu())]
KINDS_OF_ROWS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "decay": 0.9},
    {"normalize": False},
    {"is_causal": True, "decay": 0.5, "normalize": False},
]


def problem(n=40, m=50, p=3, seed=0, dtype=np.float64, lead=()):
    """Query, key and value of small entries."""
    rng = np.random.default_rng(seed)
    shapes = (*lead, n, D), (*lead, m, D), (*lead, m, p)
    query, key, value = (rng.standard_normal(shape) for shape in shapes)
    return [x.astype(dtype) for x in (SPREAD * query, SPREAD * key, value)]


def truth_of(inputs, feature_map, *, scale=None, **options):
    scale = feature_map.default_scale(D) if scale is None else scale
    return kernels.linear_attention(
        *inputs, kernel_of(feature_map, scale), offset=feature_map.offset, **options
    )


def assert_true(inputs, feature_map, rtol=1e-9, **options):
    got = linear_attention(*inputs, feature_map=feature_map, **options)
    want = truth_of(inputs, feature_map, **options)
    assert got.shape == want.shape
    assert got.dtype == inputs[0].dtype
    slack = rtol * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=slack)
    return got


@pytest.mark.parametrize("options", KINDS_OF_ROWS, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_answer_is_the_definition(feature_map, options):
    assert_true(problem(), feature_map, **options)


@pytest.mark.parametrize("options", KINDS_OF_ROWS[:3], ids=str)
@pytest.mark.parametrize("size", BLOCK_EDGES)
@pytest.mark.parametrize("feature_map", OFTEN)
def test_answer_is_the_definition_around_blocks(feature_map, size, options):
    assert_true(problem(n=size, m=33, dtype=np.float32), feature_map, 1e-5, **options)
    assert_true(problem(n=33, m=size, dtype=np.float32), feature_map, 1e-5, **options)
    assert_true(problem(n=size, m=size), feature_map, **options)


@pytest.mark.parametrize("options", KINDS_OF_ROWS, ids=str)
@pytest.mark.parametrize("feature_map", OFTEN)
def test_answer_is_the_definition_over_several_blocks(feature_map, options):
    query, key, value = problem(n=4100, m=2100, p=1, dtype=np.float32)
    # a late key of large weight: what was summed before is scaled down
    key[2070] *= 4
    assert_true((query, key, value), feature_map, 1e-4, **options)


@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    p=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    which=st.sampled_from(POSITIVE),
    options=st.sampled_from(KINDS_OF_ROWS),
    masked=st.booleans(),
)
def test_answer_is_the_definition_on_small_problems(
    n, m, p, seed, dtype, which, options, masked
):
    inputs = problem(n, m, p, seed, dtype)
    if masked:
        mask = np.random.default_rng(seed).random(m) < 0.5
        options = {**options, "key_mask": mask}
    # few weights may almost vanish where rectified: their sums round
    assert_true(inputs, which, 1e-3 if dtype == np.float32 else 1e-8, **options)


@pytest.mark.parametrize("options", KINDS_OF_ROWS, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_masked_keys_do_not_count(feature_map, options):
    query, key, value = problem(n=70, m=200)
    mask = np.random.default_rng(5).random(200) < 0.3
    mask[:4] = False
    # a long run: more keys come into sight at once than a chunk has
    mask[40:60] = False
    loud = np.where(mask[:, None], value, 1e6)
    got = assert_true((query, key, value), feature_map, key_mask=mask, **options)
    again = linear_attention(
        query, key, loud, feature_map=feature_map, key_mask=mask, **options
    )
    np.testing.assert_array_equal(got, again)
    if options.get("is_causal"):
        np.testing.assert_array_equal(got[:4], 0)


@pytest.mark.parametrize("options", KINDS_OF_ROWS, ids=str)
def test_no_key_gives_zeros(options):
    inputs = problem()
    options = {**options, "key_mask": np.zeros(50, bool)}
    got = linear_attention(*inputs, feature_map=EluPlusOne(), **options)
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("options", KINDS_OF_ROWS[:3], ids=str)
@pytest.mark.parametrize("feature_map", OFTEN)
def test_a_batch_is_a_loop_over_its_heads(feature_map, options):
    inputs = problem(lead=(2, 3))
    mask = np.random.default_rng(1).random((2, 1, 50)) < 0.8
    options = {**options, "key_mask": mask}
    if "decay" in options:
        options["decay"] = np.array([0.5, 0.9, 1.0])
    whole = assert_true(inputs, feature_map, **options)
    for b, h in np.ndindex(2, 3):
        one = {**options, "key_mask": mask[b, 0]}
        if "decay" in options:
            one["decay"] = float(options["decay"][h])
        part = linear_attention(
            *(x[b, h] for x in inputs), feature_map=feature_map, **one
        )
        np.testing.assert_array_equal(whole[b, h], part)


@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads_broadcast(is_causal):
    query, _, _ = problem(lead=(2, 3), n=11)
    _, key, value = problem(lead=(2, 1))
    assert_true((query, key, value), EluPlusOne(), is_causal=is_causal)
    assert_true((query[0, 0], key, value), EluPlusOne(), is_causal=is_causal)
    assert_true((query, key[0, 0], value), EluPlusOne(), is_causal=is_causal)


@pytest.mark.parametrize("options", KINDS_OF_ROWS[:3], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_library_and_dtype_follow_the_inputs(xp, feature_map, options):
    for dtype, rtol in ((np.float32, 1e-3), (np.float64, 1e-9)):
        plain = problem(n=150, m=130, dtype=dtype)
        mask = np.random.default_rng(1).random(130) < 0.8
        *inputs, key_mask = xp.asarrays(*plain, mask)
        got = linear_attention(
            *inputs, feature_map=feature_map, key_mask=key_mask, **options
        )
        assert isinstance(got, xp.array_type)
        assert xp.dtype_name(got) == np.dtype(dtype).name
        want = truth_of(plain, feature_map, key_mask=mask, **options)
        slack = rtol * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=slack)


def test_half_precision_is_computed_in_float32():
    inputs = problem(dtype=np.float16)
    got = linear_attention(*inputs, feature_map=EluPlusOne())
    assert got.dtype == np.float16
    wide = linear_attention(
        *(x.astype(np.float32) for x in inputs), feature_map=EluPlusOne()
    )
    np.testing.assert_array_equal(got, wide.astype(np.float16))


@pytest.mark.parametrize("feature_map", MAPS)
def test_inputs_are_left_as_they_were(feature_map):
    inputs = problem()
    before = [x.copy() for x in inputs]
    linear_attention(*inputs, feature_map=feature_map, is_causal=True)
    for x, old in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, old)


@pytest.mark.parametrize("feature_map", MAPS)
def test_constant_values_come_back_where_weights_add_up_to_one(feature_map):
    query, key, value = problem()
    got = linear_attention(
        query, key, np.full_like(value, 0.7), feature_map=feature_map
    )
    total = truth_of((query, key, np.ones_like(value)), feature_map)
    np.testing.assert_allclose(got, 0.7 * total, rtol=1e-9)


@pytest.mark.parametrize("feature_map", MAPS)
def test_a_row_sees_no_later_key(feature_map):
    query, key, value = problem(n=150, m=150)
    options = {"feature_map": feature_map, "is_causal": True}
    whole = linear_attention(query, key, value, **options)
    some = linear_attention(query[:70], key[:70], value[:70], **options)
    np.testing.assert_allclose(whole[:70], some, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "longest"), [("positive", 30), ("hyperbolic", 30), ("trigonometric", 10)]
)
def test_large_exponents_do_not_overflow(kind, is_causal, longest):
    query, key, value = problem(n=90, m=90, dtype=np.float32)
    key = key * np.linspace(0.1, longest, 90, dtype=np.float32)[:, None]
    feature_map = RandomFeatures(16, kind)
    got = linear_attention(
        query, key, value, feature_map=feature_map, is_causal=is_causal
    )
    wide = linear_attention(
        *(x.astype(float) for x in (query, key, value)),
        feature_map=feature_map,
        is_causal=is_causal,
    )
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, wide, rtol=0, atol=2e-2)


def test_weights_that_vanish_are_refused():
    query, key, value = problem(dtype=np.float32)
    query[1], key[:] = 50, -50
    with pytest.raises(RefusalError, match="all weights of 1 rows vanish in float32"):
        linear_attention(query, key, value, feature_map=RandomFeatures(64))


def test_sums_that_overflow_are_refused():
    query, key, value = problem(dtype=np.float32)
    with pytest.raises(RefusalError, match="weights or sums overflow float32"):
        linear_attention(1e15 * query, 1e15 * key, value, feature_map=Taylor())
    linear_attention(
        *(x.astype(float) for x in (1e15 * query, 1e15 * key, value)),
        feature_map=Taylor(),
    )


def test_plain_linear_attention_may_leave_the_range_of_the_values():
    query = np.array([[1.0]])
    key, value = np.array([[1.0], [-0.9]]), np.array([[0.0], [1.0]])
    got = linear_attention(query, key, value, feature_map=Identity())
    np.testing.assert_allclose(got, [[-9.0]])


def test_weights_that_cancel_give_zeros():
    query = np.array([[1.0]])
    key, value = np.array([[1.0], [-1.0]]), np.array([[0.0], [1.0]])
    got = linear_attention(query, key, value, feature_map=Identity())
    np.testing.assert_array_equal(got, 0)


BAD = [
    (
        {"feature_map": EluPlusOne},
        TypeError,
        "feature_map: expected a feature map such",
    ),
    ({"feature_map": "elu"}, TypeError, "feature_map: expected a feature map such"),
    ({"decay": 0.5}, ValueError, "decay: expected is_causal=True"),
    ({"decay": 1.5, "is_causal": True}, ValueError, "decay: expected numbers above 0"),
    ({"decay": 0.0, "is_causal": True}, ValueError, "decay: expected numbers above 0"),
    ({"decay": "x", "is_causal": True}, TypeError, "decay: expected real numbers"),
    (
        {"decay": [0.5, 0.5], "is_causal": True},
        ValueError,
        "decay: expected one number",
    ),
    ({"normalize": 1}, TypeError, "normalize: expected True or False, got int"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ({"key_mask": np.ones(50)}, TypeError, "key_mask: expected a boolean array"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_named(options, error, message):
    options = {"feature_map": EluPlusOne(), **options}
    with pytest.raises(error, match=message):
        linear_attention(*problem(), **options)


# one of several blocks, which are checked one by one
@pytest.mark.parametrize("place", [(0, 0), (4500, 3), (4999, 63)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_number_that_is_not_finite_is_found(name, bad, place, is_causal):
    inputs = {x: np.ones((5000, 64), np.float32) for x in ("query", "key", "value")}
    inputs[name][place] = bad
    message = f"{name}: expected finite numbers, got 1 .* at \\({place[0]}, {place[1]}"
    # the map sends a number of minus infinity to zero
    with pytest.raises(ValueError, match=message):
        linear_attention(**inputs, feature_map=Relu(), is_causal=is_causal)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"key_mask": [1, 1, 0]}])
def test_a_key_that_no_row_sees_is_looked_at(options):
    if "key_mask" in options:
        options = {"key_mask": np.array(options["key_mask"], bool)}
    query, key, value = np.ones((2, 4)), np.ones((3, 4)), np.ones((3, 4))
    value[2, 1] = np.nan
    with pytest.raises(ValueError, match="value: expected finite numbers"):
        linear_attention(query, key, value, feature_map=Relu(), **options)
