"""The polynomial method: laws of attention, identities of its ops, its settings."""

import numpy as np
import pytest

from fastattn import Polynomial, RefusalError, approximate
from fastattn._ops.monomials import means, moments, monomials
from fastattn.methods.polynomial.expansions import total_degree
from tests import oracles
from tests.laws import MethodLaws, OpLaws


def op_arguments(d, degree):
    index = total_degree(d, degree)
    return {"parent": index.parent, "coordinate": index.coordinate}


class TestMonomials(OpLaws):
    op = monomials
    sizes_used = ("n",)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        return [rng.uniform(-2, 2, (n, 3)).astype(dtype)], op_arguments(3, 4)

    def slack(self, arrays, options):  # noqa: ARG002
        # four factors, each at most 2, multiplied in one order
        return 8 * np.finfo(arrays[0].dtype).eps * 2.0**4


class TestMoments(OpLaws):
    op = moments
    sizes_used = ("m",)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        arrays = [
            rng.uniform(-1, 1, shape)
            for shape in [(m, 4), (m, 2), (4,), (4, 3), (4,), (2,)]
        ]
        return [x.astype(dtype) for x in arrays], op_arguments(3, 3)

    def slack(self, arrays, options):  # noqa: ARG002
        # coordinates reach 8, a monomial of degree 3 reaches 512, a weight exp(8)
        m = len(arrays[0])
        return (m + 64) * np.finfo(arrays[0].dtype).eps * 512 * 40


class TestMeans(OpLaws):
    op = means
    sizes_used = ("n",)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        options = op_arguments(3, 3)
        rank = len(options["parent"])
        arrays = [
            rng.uniform(-1, 1, shape)
            for shape in [(n, 4), (4,), (4, 3), (rank, 3), (2,)]
        ]
        # a constant that dominates keeps the sum of weights away from zero
        arrays[3] *= 1e-3
        arrays[3][0, -1] = 50.0
        return [x.astype(dtype) for x in arrays], options

    def slack(self, arrays, options):  # noqa: ARG002
        return 256 * np.finfo(arrays[0].dtype).eps

    @pytest.mark.parametrize("bad", [-1.0, 0.0, np.nan, np.inf])
    def test_rows_without_a_positive_sum_get_the_value_center(self, place, bad):
        arrays, options = self.inputs(np.random.default_rng(0), np.float64, 5, 1)
        arrays[3][:, -1] = 0
        arrays[3][0, -1] = bad
        value, total = self.op.kernel(None)(*arrays, **options)
        np.testing.assert_array_equal(value, np.tile(arrays[4], (5, 1)))
        assert not np.any((total > 0) & np.isfinite(total))
        self.agree_on_value_center(place, arrays, options)

    def agree_on_value_center(self, place, arrays, options):
        if place == "cpu":
            value, _ = self.op.kernel(place)(*arrays, **options)
            np.testing.assert_array_equal(value, np.tile(arrays[4], (5, 1)))


class TestPolynomialProven(MethodLaws):
    options = {  # noqa: RUF012
        "method": Polynomial(),
        "guarantee": "proven",
        "tol": 0.05,
    }
    scale_of_inputs = 0.3


class TestPolynomialFixedDegree(MethodLaws):
    options = {  # noqa: RUF012
        "method": Polynomial(degree=9),
        "guarantee": "proven",
        "tol": 0.5,
    }
    scale_of_inputs = 0.4


class TestPolynomialTruncated(MethodLaws):
    options = {  # noqa: RUF012
        "method": Polynomial(degree=8, rank=400),
        "guarantee": "proven",
        "tol": 2.0,
    }
    scale_of_inputs = 0.15


class TestAutoProven(MethodLaws):
    options = {"guarantee": "proven"}  # noqa: RUF012


@pytest.mark.parametrize("basis", ["minimax", "taylor", "hermite"])
def test_every_basis_approximates_small_logits(rng, basis):
    query, key, value = rng.standard_normal((3, 300, 6)) * 0.4
    method = Polynomial(degree=4, basis=basis)
    answer = approximate(query, key, value, tol=1e-2, method=method, rng=0)
    truth, normalizer = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= 1e-2
    np.testing.assert_allclose(answer.log_normalizer, normalizer, atol=1e-2)


def test_more_degrees_err_less(rng):
    query, key, value = rng.standard_normal((3, 200, 4)) * 0.5
    truth, _ = oracles.attention(query, key, value)
    errors = []
    for degree in range(1, 7):
        method = Polynomial(degree=degree)
        answer = approximate(query, key, value, tol=1e9, method=method, rng=0)
        errors.append(oracles.frobenius_error(answer.value, truth))
    assert np.all(np.diff(errors) < 0)


def test_the_whole_set_is_what_a_rank_that_large_keeps(rng):
    query, key, value = rng.standard_normal((3, 50, 3)) * 0.4
    whole, ranked = (
        approximate(
            query, key, value, tol=1, method=Polynomial(3, rank), guarantee="proven"
        )
        for rank in (None, 1000)
    )
    np.testing.assert_array_equal(whole.value, ranked.value)


@pytest.mark.parametrize("rank", [1, 2, 40, 200])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_any_rank_is_served_in_any_dimension(rng, rank, d):
    query, key, value = rng.standard_normal((3, 300, d)) * 0.2
    answer = approximate(query, key, value, tol=2, method=Polynomial(rank=rank), rng=0)
    truth, _ = oracles.attention(query, key, value)
    # the chance that certificates fail with is the business of test_certificates
    assert oracles.frobenius_error(answer.value, truth) <= 1


@pytest.mark.parametrize("degree", [100, 200])
@pytest.mark.parametrize("guarantee", ["sampled", "proven"])
def test_a_degree_beyond_float64_is_refused_without_a_warning(rng, degree, guarantee):
    query, key, value = rng.standard_normal((3, 300, 1)).astype(np.float32)
    method = Polynomial(degree=degree)
    with pytest.raises(ValueError, match="degree"):
        approximate(query, key, value, method=method, guarantee=guarantee, rng=0)


def test_a_few_rows_without_positive_sum_are_computed_exactly(rng):
    # odd degree: the polynomial is negative far to the left of the sampled logits
    query, key, value = rng.standard_normal((3, 1000, 4)) * 0.4
    query[17] *= 60
    method = Polynomial(degree=3)
    answer = approximate(query, key, value, tol=1e9, method=method, rng=0)
    assert np.all(np.isfinite(answer.value))
    assert np.all(np.isfinite(answer.log_normalizer))


def test_sharp_logits_are_refused_with_their_number(rng):
    query, key, value = rng.standard_normal((3, 400, 8)) * 6
    with pytest.raises(
        RefusalError, match=r"not positive in \d+ of 400 rows|misses tol"
    ):
        approximate(query, key, value, method=Polynomial(degree=3), rng=0)


@pytest.mark.parametrize("basis", ["taylor", "hermite"])
def test_only_minimax_is_proven(rng, basis):
    query, key, value = rng.standard_normal((3, 10, 4))
    method = Polynomial(basis=basis)
    with pytest.raises(RefusalError, match=rf"basis='{basis}' has no proven bound"):
        approximate(query, key, value, method=method, guarantee="proven")


def test_landmarks_are_not_silently_ignored(rng):
    query, key, value = rng.standard_normal((3, 300, 6)) * 0.4
    plain, corrected = (
        approximate(
            query, key, value, tol=1, method=Polynomial(rank=7, landmarks=c), rng=0
        ).value
        for c in (0, 64)
    )
    assert not np.array_equal(plain, corrected)
