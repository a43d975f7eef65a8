"""Derivatives by a low rank: its two passes, and how near they come to exact ones."""

import functools
from itertools import pairwise

import numpy as np
import pytest

from fastattn import (
    Auto,
    Exact,
    Polynomial,
    RandomFeatures,
    RefusalError,
    attention_vjp,
)
from fastattn._ops.lowrank import Functions
from fastattn._ops.lowrank_gradient import key_vjp, query_vjp
from fastattn.certificates.sampled import ROWS
from fastattn.gradients import backward
from fastattn.gradients import lowrank as lowrank_gradient
from fastattn.gradients.lowrank import lowrank_vjp, worth_a_try
from fastattn.methods.lowrank.basis import Hermite
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.polynomial.expansions import rank_of
from fastattn.problem.head import Head
from tests import oracles
from tests.derivatives import problem, softmax_vjp
from tests.laws import DTYPES, Flat, OpLaws


class TestQueryVjp(OpLaws):
    op = Flat(query_vjp, Functions, 5)
    sizes_used = ("n",)
    sizes = (9, 12)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        rank, landmarks = self.sizes
        shapes = [
            (n, 4), (n, 2), (n,), (n,), (n,), (4, 4), (4,), (landmarks, 3), (3,),
            (rank + landmarks, 3),
        ]  # fmt: skip
        arrays = [rng.uniform(-1, 1, x).astype(dtype) for x in shapes]
        for i in (5, 6):
            arrays[i] *= dtype(0.4)
        # sums of weights are positive
        arrays[9] *= dtype(0.1)
        arrays[9][0, -1] = 3
        arrays[2][1::5], arrays[4] = -np.inf, arrays[4] - 20
        arrays[8] = abs(arrays[8]) / 50
        # rows that are to add nothing, whatever they hold
        arrays[0][::7], arrays[2][3::7], arrays[4][5::7] = 1e15, np.inf, 20
        op_arguments = Hermite.of(np.array([0.4, 0.3, 0.2]), rank).op_arguments
        return arrays, op_arguments

    def slack(self, arrays, options):  # noqa: ARG002
        # features and their sums over 21 basis functions are up to some hundreds
        return 1e4 * (1 + len(arrays[0]) / 64) * np.finfo(arrays[0].dtype).eps

    def test_it_is_the_derivative_of_the_answer(self, place):
        arrays, options = self.inputs(np.random.default_rng(3), np.float64, 16, 1)
        got, sums, normalizer, delta = self.op.kernel(place)(*arrays, **options)
        used = np.isfinite(normalizer)
        assert np.array_equal(np.flatnonzero(~used), [0, 3, 5, 7, 10, 12, 14])
        np.testing.assert_array_equal(got[~used], 0)
        np.testing.assert_array_equal(normalizer[~used], np.inf)
        query, grad, elsewhere, partial = (x[used] for x in arrays[:4])
        projection, origin, marks, _, weights = arrays[5:]

        def known(query):
            """Basis functions, their factors, log-sum-exps and deltas."""
            both = query @ projection - origin
            functions = hermite_functions(both[:, :-1], marks, options)
            sums = functions @ weights * np.exp(both[:, -1:])
            other = np.exp(elsewhere)
            whole = sums[:, -1] + other
            moved = np.sum(grad * sums[:, :-1], axis=1) + other * partial
            return functions, np.exp(both[:, -1]), np.log(whole), moved / whole

        functions, factor, log, products = known(query)
        np.testing.assert_allclose(normalizer[used], log, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(delta[used], products, rtol=1e-10, atol=1e-12)
        right = np.column_stack([grad, -products]) * (factor * np.exp(-log))[:, None]
        np.testing.assert_allclose(sums, functions.T @ right, rtol=1e-9, atol=1e-9)
        for axis in range(4):
            step = np.zeros(4)
            step[axis] = 1e-5
            slope = (known(query + step)[3] - known(query - step)[3]) / 2e-5
            np.testing.assert_allclose(got[used, axis], slope, rtol=1e-6, atol=1e-7)


class TestQueryVjpOfPolynomials(TestQueryVjp):
    sizes = (30, 0)


class TestQueryVjpOfLandmarks(TestQueryVjp):
    sizes = (1, 12)


def hermite_functions(x, marks, op_arguments):
    """Orthonormal Hermite polynomials by NumPy's own, and exponentials."""
    columns = [np.zeros(3, int)]
    for parent, axis in zip(
        op_arguments["parent"][1:], op_arguments["coordinate"][1:], strict=True
    ):
        columns.append(columns[parent] + np.eye(3, dtype=int)[axis])
    functions = []
    for alpha in columns:
        product = 1.0
        for l, power in enumerate(alpha):
            unit = np.eye(power + 1)[power] / np.sqrt(
                float(np.prod(range(1, power + 1)))
            )
            product = product * np.polynomial.hermite_e.hermeval(x[:, l], unit)
        functions.append(product * np.ones(len(x)))
    exponentials = np.exp(x @ marks.T - np.sum(marks**2, axis=1) / 2)
    return np.column_stack([*functions, exponentials])


class TestKeyVjp(OpLaws):
    op = key_vjp
    sizes_used = ("m",)
    sizes = (9, 12)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        rank, landmarks = self.sizes
        shapes = [
            (m, 4), (m, 2), (m,), (4,), (4, 4), (landmarks, 3), (2,),
            (rank + landmarks, 3),
        ]  # fmt: skip
        arrays = [rng.uniform(-1, 1, x).astype(dtype) for x in shapes]
        arrays[4] *= dtype(0.5)
        arrays[2] = arrays[2] > 0.8
        op_arguments = Hermite.of(np.array([0.4, 0.3, 0.2]), rank).op_arguments
        return arrays, {"offset": -0.5, **op_arguments}

    def slack(self, arrays, options):  # noqa: ARG002
        return 1e5 * np.finfo(arrays[0].dtype).eps

    def test_it_is_the_derivative_of_the_sum(self, place):
        arrays, options = self.inputs(np.random.default_rng(3), np.float64, 1, 9)
        key, value, far, center, projection, marks, value_center, weights = arrays
        d_key, d_value = self.op.kernel(place)(*arrays, **options)

        def total(key, value):
            both = (key - center) @ projection
            y = both[:, :-1]
            log = both[:, -1] + np.sum(y**2, axis=1) / 2 + options["offset"]
            columns = [np.ones(len(y))]
            for j in range(1, len(options["parent"])):
                source = columns[options["parent"][j]]
                axis, power = options["coordinate"][j], options["power"][j]
                columns.append(source * y[:, axis] / np.sqrt(power))
            functions = np.column_stack([*columns, np.exp(y @ marks.T)])
            right = np.column_stack([value - value_center, np.ones(len(key))])
            return np.sum((functions @ weights) * right, axis=1) * np.exp(log)

        for x, got in ((0, d_key), (1, d_value)):
            for axis in range(got.shape[1]):
                step = [np.zeros(4), np.zeros(2)]
                step[x][axis] = 1e-5
                more = total(key + step[0], value + step[1])
                less = total(key - step[0], value - step[1])
                slope = np.where(far, 0, (more - less) / 2e-5)
                np.testing.assert_allclose(got[:, axis], slope, rtol=1e-6, atol=1e-7)


class TestKeyVjpOfPolynomials(TestKeyVjp):
    sizes = (30, 0)


class TestKeyVjpOfLandmarks(TestKeyVjp):
    sizes = (1, 12)


# a head that a low rank serves: its derivatives, and what is exact in them
def diffuse(n=4500, m=4400, dtype=np.float32):
    return problem(n=n, m=m, d=4, p=5, spread=0.6, dtype=dtype)


@functools.cache
def truth_of(*inputs):
    """The gradients of arrays that are given as bytes, shape and dtype."""
    arrays = (np.frombuffer(x, dtype).reshape(shape) for x, shape, dtype in inputs)
    return softmax_vjp(*arrays)


def errors(got, inputs):
    truth = truth_of(*((x.tobytes(), x.shape, x.dtype) for x in inputs))
    return [oracles.frobenius_error(x, y) for x, y in zip(got, truth, strict=True)]


@pytest.mark.parametrize(("rank", "landmarks"), [(126, 0), (1, 120), (35, 60)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_keeps_three_times_the_tolerance(rank, landmarks, dtype):
    inputs = diffuse(1500, 1400, dtype)
    method = Polynomial(rank=rank, landmarks=landmarks, basis="hermite")
    got = attention_vjp(*inputs, method=method, tol=1e-2, rng=0)
    assert max(errors(got, inputs)) <= 3e-2


def test_more_polynomials_err_less():
    inputs = diffuse(1500, 1400, np.float64)
    worst = []
    for rank in (15, 70, 210, 495):
        method = Polynomial(rank=rank, basis="hermite")
        got = attention_vjp(*inputs, method=method, tol=1, rng=0)
        worst.append(max(errors(got, inputs)))
    for less, more in pairwise(worst):
        assert more < less / 2


def test_auto_takes_a_low_rank_where_it_pays():
    inputs = diffuse()
    got = attention_vjp(*inputs, tol=3e-2, rng=0)
    worst = max(errors(got, inputs))
    # not exact, and within the tolerance
    assert 1e-5 < worst <= 9e-2
    again = attention_vjp(*inputs, tol=3e-2, rng=0, method=Auto())
    for one, other in zip(got, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", [None, Exact()])
def test_proven_derivatives_are_exact(method):
    inputs = diffuse()
    got = attention_vjp(*inputs, tol=3e-2, guarantee="proven", method=method, rng=0)
    assert max(errors(got, inputs)) < 1e-5


def test_sharp_heads_are_differentiated_exactly():
    query, key, value, grad = diffuse()
    sharp = [8 * query, 8 * key, value, grad]
    assert max(errors(attention_vjp(*sharp, tol=3e-2, rng=0), sharp)) < 1e-4


def test_far_keys_and_hard_queries_of_a_low_rank_are_exact():
    query, key, value, grad = diffuse(1500, 1400, np.float64)
    key[5] *= 30
    query[7] *= 30
    inputs = query, key, value, grad
    method = Polynomial(rank=210, basis="hermite")
    got = attention_vjp(*inputs, method=method, tol=0.3, rng=0)
    truth = softmax_vjp(*inputs)
    np.testing.assert_allclose(got[0][7], truth[0][7], rtol=1e-9, atol=1e-12)
    # far keys are exact but for the normalizers of the queries
    np.testing.assert_allclose(got[1][5], truth[1][5], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(got[2][5], truth[2][5], rtol=1e-3, atol=1e-3)
    assert max(errors(got, inputs)) < 3e-2


def test_low_rank_runs_in_every_library(xp):
    inputs = diffuse(700, 650, np.float64)
    method = Polynomial(rank=20, landmarks=8, basis="hermite")
    options = {"method": method, "tol": 0.3, "rng": 0}
    wanted = attention_vjp(*inputs, **options)
    got = attention_vjp(*xp.asarrays(*inputs), **options)
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, xp.array_type)
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-6, atol=1e-9)


def test_a_low_rank_that_misses_is_refused():
    inputs = diffuse(1500, 1400)
    method = Polynomial(rank=5, basis="hermite")
    with pytest.raises(RefusalError, match=r"miss 3 . tol with tol=0.01"):
        attention_vjp(*inputs, method=method, tol=1e-2, rng=0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Polynomial(degree=2), "Polynomial.basis='minimax'. has no derivative"),
        (RandomFeatures(8), "linear_attention_vjp"),
    ],
)
def test_methods_without_a_derivative_are_refused(method, message):
    with pytest.raises(RefusalError, match=message):
        attention_vjp(*problem(), method=method)


def test_low_ranks_are_not_proven():
    method = Polynomial(rank=5, basis="hermite")
    with pytest.raises(RefusalError, match="are not proven: use Exact"):
        attention_vjp(*problem(), method=method, guarantee="proven")


def test_auto_computes_exactly_what_fails_its_check(monkeypatch):
    inputs = diffuse()
    tried = []

    def misses(*args):
        gradients, error = lowrank_vjp(*args)
        tried.append(error)
        return gradients, 10 * error + 1

    monkeypatch.setattr(lowrank_gradient, "lowrank_vjp", misses)
    got = attention_vjp(*inputs, tol=3e-2, rng=0)
    assert tried
    assert max(errors(got, inputs)) < 1e-5


def test_the_check_sees_what_is_wrong():
    # it is an upper estimate: near the error, rarely below it
    query, key, value, grad = inputs = diffuse(1500, 1400, np.float64)
    head = Head(query, key, value, 0.5)
    for rank in (15, 70, 210):
        rng = np.random.default_rng(rank)
        empty = LowRank.plan(
            PlanningSample.of(head, rng), rank=rank, landmarks=0, rng=rng
        )
        gradients, seen = lowrank_vjp(head, grad, empty, rng)
        worst = max(errors(gradients, inputs))
        assert 0.8 * worst <= seen <= 4 * worst


def test_a_first_look_of_fewer_rows_may_be_enough(monkeypatch):
    # as if the head were long
    monkeypatch.setattr(backward, "sampled_rows", lambda _: 2 * ROWS)
    query, key, value, grad = inputs = diffuse(1500, 1400, np.float64)
    head = Head(query, key, value, 0.5)
    rng = np.random.default_rng(0)
    empty = LowRank.plan(PlanningSample.of(head, rng), rank=70, landmarks=0, rng=rng)
    counts = []

    def look(*args):
        counts.append(args[4])
        return real_look(*args)

    real_look = backward.Backward._estimate_error
    monkeypatch.setattr(backward.Backward, "_estimate_error", look)
    for enough in (0.0, 1.0, 1e-9):
        gradients, seen = lowrank_vjp(head, grad, empty, rng, enough)
        worst = max(errors(gradients, inputs))
        assert 0.8 * worst <= seen <= 4 * worst
    few, many, more = [ROWS] * 2, [2 * ROWS] * 2, [4 * ROWS] * 2
    assert counts == [many, few, few, more]


def test_a_flat_head_gets_all_monomials_of_a_degree():
    # a part of them serves the answer, but not its derivatives
    rng = np.random.default_rng(0)
    query, key = 0.3**0.5 * rng.standard_normal((2, 6000, 32))
    value, grad = rng.standard_normal((2, 6000, 6))
    head = Head(query, key, value, 32**-0.5)
    (candidate,) = worth_a_try(head, grad, 3e-2, np.random.default_rng(0))
    empty = candidate.empty
    assert (empty.rank, empty.landmarks) == (rank_of(32, 2), 0)
    _, seen = lowrank_vjp(head, grad, empty, rng)
    assert seen <= 9e-2
