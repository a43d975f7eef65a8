"""Sums over keys, what rows make of them, and causal products by chunks."""

import numpy as np

from fastattn._ops.linear import key_sums, prefix_products, row_means
from tests.laws import OpLaws


class TestPrefixProducts(OpLaws):
    op = prefix_products
    decay = None

    def inputs(self, rng, dtype, n, m):
        left, right = rng.random((n, 5)), rng.random((m, 5))
        value, state = rng.standard_normal((m, 3)), rng.standard_normal((5, 3))
        prefix_lengths = np.sort(rng.integers(0, m + 1, n))
        options = {"prefix_lengths": prefix_lengths}
        if self.decay is not None:
            column = 3 + np.sort(rng.choice(2 * m, m, replace=False))
            # no row is behind a key that it sees
            least = np.where(prefix_lengths, column[prefix_lengths - 1], 3)
            options |= {"decay": self.decay, "column": column, "origin": 2}
            options["row"] = np.maximum.accumulate(least + rng.integers(0, 3, n))
        return [x.astype(dtype) for x in (left, right, value, state)], options

    def slack(self, arrays, options):  # noqa: ARG002
        return 16 * np.finfo(arrays[0].dtype).eps * (5 + len(arrays[1]))


class TestFadingPrefixProducts(TestPrefixProducts):
    decay = 0.8


class TestPrefixProductsInStep(TestPrefixProducts):
    """The first rows see one key more each: their chunks are found side by side."""

    gap = 0

    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        number = np.arange(max(n, m))
        options["prefix_lengths"] = np.minimum(number[:n] + 1, m)
        if self.decay is not None:
            # later rows, or keys, are further away than the first
            place = 5 + number + self.gap * (number > 200)
            options |= {"row": place[:n], "column": place[:m]}
        return arrays, options


class TestFadingPrefixProductsInStep(TestPrefixProductsInStep):
    decay = 0.8


class TestFadingPrefixProductsOutOfStep(TestFadingPrefixProductsInStep):
    gap = 3


class TestKeySums(OpLaws):
    op = key_sums
    sizes_used = ("m",)

    def inputs(self, rng, dtype, n, m):
        arrays = rng.random((m, 7)), rng.standard_normal((m, min(n, 40)))
        return [x.astype(dtype) for x in arrays], {}

    def slack(self, arrays, options):  # noqa: ARG002
        return 4 * np.finfo(arrays[0].dtype).eps * (5 + len(arrays[0]))


def test_weights_of_many_keys_are_added_up_as_those_of_few():
    # one after the other, in single precision, they would be off by a thousandth
    right, value = (np.full((2**16, 3), 0.1, np.float32) for _ in range(2))
    total = key_sums(right, value)[:, -1]
    truth = 2**16 * float(np.float32(0.1))
    np.testing.assert_allclose(total, truth, rtol=32 * np.finfo(np.float32).eps)


class TestRowMeans(OpLaws):
    op = row_means
    sizes_used = ("n",)
    normalize = True

    def inputs(self, rng, dtype, n, m):
        arrays = rng.random((n, 7)), rng.random((7, min(m, 40) + 1))
        options = {"offset": 0.5, "normalize": self.normalize}
        return [x.astype(dtype) for x in arrays], options

    def slack(self, arrays, options):  # noqa: ARG002
        return 64 * np.finfo(arrays[0].dtype).eps


class TestRowSums(TestRowMeans):
    normalize = False


def test_row_means_are_put_where_there_is_memory_for_them(rng):
    left, sums = rng.random((300, 7)), rng.random((7, 5))
    out = np.full((300, 4), np.nan)
    options = {"offset": 0.0, "normalize": True}
    value, _ = row_means(left, sums, **options, out=out)
    assert value is out
    np.testing.assert_array_equal(out, row_means(left, sums, **options)[0])
