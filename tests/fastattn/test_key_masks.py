"""Masks of keys: one for each sequence, or each head, and never one for the other."""

import numpy as np
import pytest

import fastattn
from fastattn import EluPlusOne, attention, attention_vjp, linear_attention

BATCH, HEADS, KEYS = 2, 2, 10


def problem(lead=(BATCH, HEADS)):
    return np.random.default_rng(0).standard_normal((3, *lead, KEYS, 4))


def padding(batch=BATCH):
    """The first sequence has five tokens, the others all."""
    mask = np.ones((batch, KEYS), bool)
    mask[0, 5:] = False
    return mask


def alone(query, key, value):
    """What the first sequence gets without its padding."""
    return attention(query[0], key[0, ..., :5, :], value[0, ..., :5, :])


CALLS = {
    "attention": lambda q, k, v, mask: attention(q, k, v, key_mask=mask),
    "explain": lambda q, k, v, mask: fastattn.explain(q, k, v, key_mask=mask),
    "attention_vjp": lambda q, k, v, mask: attention_vjp(q, k, v, v, key_mask=mask),
    "linear": lambda q, k, v, mask: linear_attention(
        q, k, v, feature_map=EluPlusOne(), key_mask=mask
    ),
    "tensor": lambda q, k, v, mask: fastattn.tensor_attention(
        q, (k, k), (v, v), key_mask=(mask, None)
    ),
    "prepare": lambda q, k, v, mask: fastattn.prepare(k, v, queries=q, key_mask=mask),
    "insert": lambda q, k, v, mask: fastattn.prepare(k, v, queries=q).insert(
        k, v, key_mask=mask
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("heads", [BATCH, 1])
def test_a_mask_of_batch_and_keys_is_refused_where_heads_could_be_meant(call, heads):
    inputs = problem((BATCH, heads))
    with pytest.raises(ValueError, match=r"key_mask.*two ways.*key_mask\[:, None\]"):
        call(*inputs, padding())
    call(*inputs, padding()[:, None])


def test_with_other_numbers_of_heads_the_message_says_which_shape_is_meant():
    inputs = problem((3, HEADS))
    with pytest.raises(ValueError, match=r"heads, \(3, 2\).*key_mask\[:, None\]"):
        attention(*inputs, key_mask=padding(3))


def test_a_mask_for_each_sequence_hides_its_padding():
    inputs = problem()
    got = attention(*inputs, key_mask=padding()[:, None])
    np.testing.assert_allclose(got[0], alone(*inputs))
    np.testing.assert_allclose(got[1], attention(*(x[1] for x in inputs)))


def test_a_mask_for_each_head_is_taken_where_batches_cannot_be_meant():
    inputs = problem((3, HEADS))
    got = attention(*inputs, key_mask=padding(HEADS))
    np.testing.assert_array_equal(got, attention(*inputs, key_mask=padding()[None]))
    query, key, value = (x[:, 0] for x in inputs)
    want = attention(query, key[:, :5], value[:, :5])
    np.testing.assert_allclose(got[:, 0], want)


@pytest.mark.parametrize(
    ("lead", "shape"),
    [
        ((BATCH, HEADS), (BATCH, 1, 1, KEYS)),
        ((BATCH, HEADS), (BATCH, HEADS, 1, KEYS)),
        ((BATCH, 1), (BATCH, 1, 1, KEYS)),
        ((BATCH,), (BATCH, 1, KEYS)),
    ],
)
def test_an_axis_of_queries_is_taken_as_scaled_dot_product_attention_takes_it(
    lead, shape
):
    inputs = problem(lead)
    rows = padding().reshape(BATCH, *(1,) * (len(shape) - 2), KEYS)
    got = attention(*inputs, key_mask=np.broadcast_to(rows, shape))
    assert got.shape == inputs[2].shape
    np.testing.assert_allclose(got[0], alone(*inputs))


def test_one_head_takes_one_row_of_a_mask():
    query, key, value = problem(())
    got = attention(query, key, value, key_mask=padding()[:1])
    assert got.shape == query.shape
    np.testing.assert_allclose(got, attention(query, key[:5], value[:5]))


def test_a_row_of_one_mask_for_all_is_no_riddle():
    inputs = problem()
    got = attention(*inputs, key_mask=padding()[:1])
    np.testing.assert_array_equal(got, attention(*inputs, key_mask=padding()[0]))
