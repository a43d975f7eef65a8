"""Products with basis functions, one to a line: by BLAS or in tiles."""

import numpy as np

from fastattn._ops.cpu.tile_products import combine_functions, weigh_values
from tests.pairwise import pairwise


@pairwise(
    "dtype, functions, rows, columns",
    [np.float32, np.float64],
    [1, 7, 8, 9, 40],
    [1, 8, 13, 64],
    [0, 1, 31, 32, 64],
)
def test_products_are_those_of_the_definition(dtype, functions, rows, columns):
    rng = np.random.default_rng(functions)
    features = rng.standard_normal((functions, rows)).astype(dtype)
    values = rng.standard_normal((rows, columns)).astype(dtype)
    readout = rng.standard_normal((functions, columns)).astype(dtype)
    sums = np.full((functions, columns), np.nan, dtype)
    answers = np.full((rows, columns), np.nan, dtype)
    weigh_values(features, values, sums)
    combine_functions(features, readout, answers)
    for got, left, right in (
        (sums, features, values),
        (answers, features.T, readout),
    ):
        want = left.astype(float) @ right.astype(float)
        # every term is rounded once more than it is added
        size = np.abs(left).astype(float) @ np.abs(right).astype(float)
        slack = (left.shape[1] + 1) * np.finfo(dtype).eps * size
        assert np.all(np.abs(got - want) <= slack)
