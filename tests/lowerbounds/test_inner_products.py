"""Extreme inner products of packed bits, against their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowerbounds._instance import _pack, largest_product, least_product
from lowerbounds._ops.inner_products import extremes


@st.composite
def bit_matrices(draw, count=2):
    """Matrices of bits with one number of columns, some of them all 0 or all 1."""
    d = draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    sizes = [draw(st.integers(1, 9)) for _ in range(count)]
    return [(rng.random((n, d)) < density).astype(np.uint8) for n in sizes]


def first_extremes(left, right):
    """The definition: products, and where the first least and largest are."""
    products = left.astype(int) @ right.T.astype(int)
    least = np.unravel_index(products.argmin(), products.shape)
    largest = np.unravel_index(products.argmax(), products.shape)
    return [[products[least], *least], [products[largest], *largest]]


@pytest.mark.parametrize("kernel", [extremes.kernel("cpu"), extremes.reference])
@given(bits=bit_matrices())
def test_extremes_are_those_of_the_matrix_of_products(kernel, bits):
    got = kernel(*map(_pack, bits))
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, first_extremes(*bits))


def test_every_library_finds_the_same_pairs(xp, rng):
    bits = [(rng.random((n, 90)) < 0.4).astype(np.uint8) for n in (40, 30)]
    got = extremes(*xp.asarrays(*map(_pack, bits)))
    assert isinstance(got, xp.array_type)
    np.testing.assert_array_equal(np.asarray(got), first_extremes(*bits))


def test_blocks_of_the_reference_make_one_answer(rng):
    # more pairs than exist at a time, and the extremes in the last block
    bits = [(rng.random((n, 70)) < 0.5).astype(np.uint8) for n in (700, 300)]
    bits[0][-1], bits[1][-1] = 1, 1
    bits[1][-2] = 0
    got = extremes.reference(*map(_pack, bits))
    np.testing.assert_array_equal(got, first_extremes(*bits))
    assert got[1, 0] == 70


@pytest.mark.parametrize("block", [1, 7, 1 << 15])
@given(bits=bit_matrices(count=4))
def test_tuples_are_looked_at_whatever_the_block(block, bits):
    products = np.einsum("al,bl,cl,dl->abcd", *(x.astype(int) for x in bits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowerbounds._instance._BLOCK", block)
        assert least_product(tuple(bits)) == products.min()
        assert largest_product(tuple(bits)) == products.max()
