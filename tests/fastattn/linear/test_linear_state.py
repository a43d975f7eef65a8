"""A state of linear attention is the causal answer, one token at a time."""

import numpy as np
import pytest

from fastattn import (
    Cosformer,
    EluPlusOne,
    Identity,
    LinearState,
    PolySketch,
    RandomFeatures,
    RefusalError,
    Taylor,
    linear_attention,
)
from tests.fastattn.linear.test_linear import MAPS, problem

OPTIONS = [{}, {"decay": 0.9}, {"normalize": False}, {"scale": 0.3}]


def rows_of(inputs, state):
    """Insert and query token by token."""
    query, key, value = inputs
    rows = []
    for i in range(query.shape[-2]):
        step = slice(i, i + 1)
        state.insert(key[..., step, :], value[..., step, :])
        rows.append(np.asarray(state.query(query[..., step, :])))
    return np.concatenate(rows, axis=-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_tokens_one_by_one_are_the_causal_rows(feature_map, options):
    inputs = problem(n=30, m=30, lead=(2, 3))
    got = rows_of(inputs, LinearState(feature_map, **options))
    options = {"feature_map": feature_map, "is_causal": True, **options}
    want = linear_attention(*inputs, **options)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("feature_map", MAPS)
def test_one_insert_of_many_keys_is_many_inserts(feature_map):
    query, key, value = problem(n=3, m=40)
    whole = LinearState(feature_map, decay=0.9).insert(key, value)
    steps = LinearState(feature_map, decay=0.9)
    for some in np.split(np.arange(40), [7, 8, 30]):
        steps.insert(key[some], value[some])
    assert whole.count == steps.count == 40
    np.testing.assert_allclose(whole.query(query), steps.query(query), rtol=1e-9)


def test_long_inserts_are_summed_in_blocks():
    query, key, value = problem(n=3, m=3000)
    feature_map = RandomFeatures(4096)
    got = LinearState(feature_map).insert(key, value).query(query)
    want = linear_attention(query, key, value, feature_map=feature_map)
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("decay", [None, 0.9, np.array([0.5, 0.9])])
@pytest.mark.parametrize("feature_map", [EluPlusOne(), RandomFeatures(9), PolySketch()])
def test_merge_is_concatenation(feature_map, decay):
    query, key, value = problem(n=5, m=40, lead=(2,))
    key[:, 20:] *= 3
    left, right, whole = (LinearState(feature_map, decay=decay) for _ in range(3))
    left.insert(key[:, :20], value[:, :20])
    right.insert(key[:, 20:], value[:, 20:])
    before = right.query(query)
    got = left.merge(right)
    assert got is left
    assert got.count == 40
    want = whole.insert(key, value).query(query)
    np.testing.assert_allclose(got.query(query), want, rtol=1e-9)
    np.testing.assert_array_equal(right.query(query), before)


def test_merging_with_an_empty_state_changes_nothing():
    query, key, value = problem()
    full = LinearState(EluPlusOne()).insert(key, value)
    want = full.query(query)
    np.testing.assert_array_equal(
        full.merge(LinearState(EluPlusOne())).query(query), want
    )
    np.testing.assert_array_equal(
        LinearState(EluPlusOne()).merge(full).query(query), want
    )


def test_a_merged_state_keeps_no_tie_to_the_other():
    query, key, value = problem()
    full = LinearState(EluPlusOne()).insert(key, value)
    want = full.query(query)
    LinearState(EluPlusOne()).merge(full).insert(3 * key, value)
    np.testing.assert_array_equal(full.query(query), want)


def test_size_does_not_grow_with_keys():
    _, key, value = problem(m=50, dtype=np.float32)
    state = LinearState(RandomFeatures(16))
    assert state.nbytes == 0
    sizes = {state.insert(key, value).nbytes for _ in range(5)}
    assert sizes == {16 * 4 * 4}


@pytest.mark.parametrize("feature_map", MAPS)
def test_library_and_dtype_follow_the_inputs(xp, feature_map):
    plain = problem(n=6, m=6, dtype=np.float32, lead=(2,))
    inputs = xp.asarrays(*plain)
    state = LinearState(feature_map, decay=0.8).insert(inputs[1], inputs[2])
    got = state.query(inputs[0])
    assert isinstance(got, xp.array_type)
    assert xp.dtype_name(got) == "float32"
    wide = [x.astype(float) for x in plain]
    want = LinearState(feature_map, decay=0.8).insert(*wide[1:]).query(wide[0])
    np.testing.assert_allclose(
        np.asarray(got), want, rtol=1e-3, atol=1e-3 * np.abs(want).max()
    )


def test_queries_of_grouped_heads_broadcast():
    query, _, _ = problem(lead=(2, 3), n=1)
    _, key, value = problem(lead=(2, 1))
    got = LinearState(EluPlusOne()).insert(key, value).query(query)
    want = linear_attention(query, key, value, feature_map=EluPlusOne())
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_misuse_is_named():
    query, key, value = problem()
    with pytest.raises(TypeError, match="feature_map: expected a feature map"):
        LinearState(EluPlusOne)
    with pytest.raises(TypeError, match="normalize: expected True or False"):
        LinearState(EluPlusOne(), normalize=None)
    with pytest.raises(ValueError, match="decay: expected numbers above 0"):
        LinearState(EluPlusOne(), decay=2.0)
    state = LinearState(EluPlusOne())
    with pytest.raises(ValueError, match="nothing was inserted yet"):
        state.query(query)
    with pytest.raises(ValueError, match="value: expected one row for each key"):
        state.insert(key, value[1:])
    state.insert(key, value)
    with pytest.raises(ValueError, match=r"key: expected shape \(rows, 4\)"):
        state.insert(key[:, :2], value)
    with pytest.raises(ValueError, match=r"value: expected shape"):
        state.insert(key, value[:, :2])
    with pytest.raises(ValueError, match="query: expected rows of 4 entries"):
        state.query(query[:, :2])
    with pytest.raises(TypeError, match="key: expected float64"):
        state.insert(key.astype(np.float32), value.astype(np.float32))
    with pytest.raises(ValueError, match="other: expected a state of"):
        state.merge(LinearState(Identity()))
    with pytest.raises(ValueError, match="other: expected sums of shape"):
        state.merge(LinearState(EluPlusOne()).insert(key, value[:, :2]))
    ordered = LinearState(Cosformer(100)).insert(key, value)
    with pytest.raises(ValueError, match="features that depend on positions"):
        ordered.merge(ordered)
    np.testing.assert_array_equal(state.count, len(key))


def test_a_refused_insert_leaves_the_state_as_it_was():
    query, key, value = problem()
    state = LinearState(EluPlusOne())
    with pytest.raises(TypeError, match="value: expected float64"):
        state.insert(key, value.astype(np.float32))
    assert state.count == state.nbytes == 0
    short = [x.astype(np.float32) for x in (query, key, value[:, :2])]
    assert state.insert(*short[1:]).query(short[0]).shape == (40, 2)


def test_decays_are_those_of_the_heads():
    _, key, value = problem(lead=(2,))
    with pytest.raises(ValueError, match="decay: expected one number, or one for each"):
        LinearState(EluPlusOne(), decay=np.full(3, 0.5)).insert(key, value)
    with pytest.raises(ValueError, match="decay: expected one number, or one for each"):
        LinearState(EluPlusOne(), decay=np.full(2, 0.5)).insert(key[0], value[0])


def test_weights_that_vanish_are_refused():
    query, key, value = problem(dtype=np.float32)
    query[1], key[:] = 50, -50
    state = LinearState(RandomFeatures(64)).insert(key, value)
    with pytest.raises(RefusalError, match="all weights of 1 rows vanish"):
        state.query(query)


def test_sums_that_overflow_are_refused():
    query, key, value = (1e15 * x for x in problem(dtype=np.float32))
    state = LinearState(Taylor())
    with pytest.raises(RefusalError, match="overflow float32"):
        state.insert(key, value).query(query)
