"""Feature maps against their definitions, and what random ones are on average."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

import fastattn
from fastattn import (
    Cosformer,
    EluPlusOne,
    Identity,
    PolySketch,
    RandomFeatures,
    RandomMaclaurin,
    Relu,
    Taylor,
    TensorSketch,
)
from fastattn._ops.linear import (
    divided,
    elu_plus_one,
    exponentials,
    positive,
    squares,
)
from fastattn.linear.protocol import Drawn, Reader
from fastattn.linear.random_features import KINDS
from sketching.projections import tensor_sketch as projections
from tests import linear_kernels as kernels
from tests.chance import assert_fails_rarely
from tests.laws import OpLaws

D = 4


def cases():
    """Every map with its kernel from the definition."""
    yield Identity(), kernels.logits
    yield EluPlusOne(), kernels.products(kernels.elu_plus_one)
    yield Relu(), kernels.products(kernels.relu)
    yield Cosformer(2048), kernels.cosformer(2048)
    yield Taylor(), kernels.taylor
    for kind in KINDS:
        for orthogonal in (True, False):
            made = RandomFeatures(6, kind, orthogonal, rng=1)
            yield made, kernels.random_features(*made.draw(D), kind)
    made = RandomMaclaurin(40, rng=2)
    yield made, kernels.random_maclaurin(*made.draw(D))
    for degree, constant in ((1, 0.0), (2, 0.5), (3, 0.0)):
        made = TensorSketch(degree, 5, constant, rng=3)
        yield made, kernels.tensor_sketch(made.draw(D), constant)
    for degree in (2, 4, 8):
        made = PolySketch(degree, 3, rng=4)
        yield made, kernels.poly_sketch(made.draw(D))


CASES = [pytest.param(*case, id=str(case[0])) for case in cases()]
MAPS = [pytest.param(case[0], id=str(case[0])) for case in cases()]


def weights(feature_map, query, key, scale=1.0):
    """All weights as products of features, their factors multiplied in."""
    features = Reader.of(feature_map, query, scale)
    left, right = (
        read(x, np.arange(len(x)))
        for read, x in ((features.query, query), (features.key, key))
    )
    left, right = (x if log is None else x * np.exp(log) for x, log in (left, right))
    return left @ right.T


@pytest.mark.parametrize(("feature_map", "kernel"), CASES)
def test_products_of_features_are_the_weights(rng, feature_map, kernel):
    query, key = rng.standard_normal((7, D)), rng.standard_normal((9, D))
    want = kernel(query, key)
    got = weights(feature_map, query, key)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11 * np.abs(want).max())


@pytest.mark.parametrize("scale", [0.3, 2.0, -0.5])
@pytest.mark.parametrize("feature_map", [Identity(), Taylor(), TensorSketch(2, 9)])
def test_scale_is_a_factor_of_logits(rng, feature_map, scale):
    query, key = rng.standard_normal((2, 6, D))
    got = weights(feature_map, query, key, scale)
    want = weights(feature_map, scale * query, key)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "feature_map",
    [
        EluPlusOne(),
        Relu(),
        Cosformer(40),
        Taylor(),
        RandomFeatures(6),
        RandomFeatures(6, "hyperbolic"),
        PolySketch(2),
        PolySketch(8, 3),
    ],
)
def test_no_weight_is_negative(rng, feature_map):
    query, key = 2 * rng.standard_normal((2, 40, D))
    found = weights(feature_map, query, key)
    assert found.min() >= -1e-12 * found.max()


@pytest.mark.parametrize("feature_map", MAPS)
def test_a_map_is_the_same_wherever_it_is_used(rng, feature_map):
    query, key = rng.standard_normal((2, 5, D))
    np.testing.assert_array_equal(
        weights(feature_map, query, key), weights(feature_map, query, key)
    )


@pytest.mark.parametrize("make", [RandomFeatures, RandomMaclaurin, PolySketch])
def test_a_generator_is_asked_for_an_int_that_is_kept(make):
    first, second = (make(rng=np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert isinstance(first.rng, int)
    assert make(rng=6) != make(rng=7)
    generator = np.random.default_rng(5)
    assert make(rng=generator) != make(rng=generator)


def test_approximates_softmax_is_said_by_every_map():
    said = {
        case.values[0].__class__: case.values[0].approximates_softmax for case in MAPS
    }
    assert {kind for kind, says in said.items() if says} == {
        RandomFeatures,
        RandomMaclaurin,
        Taylor,
    }
    assert all(hasattr(kind, "solve") == says for kind, says in said.items())


@pytest.mark.parametrize("feature_map", MAPS)
def test_derivative_of_features_is_a_finite_difference(rng, feature_map):
    x, step = rng.standard_normal((2, 5, D))
    features = Reader.of(feature_map, x, 1.0)
    position = np.arange(5)
    found, log = features.key(x, position)
    grad = rng.standard_normal(found.shape)
    factor = 0.0 if log is None else log

    def loss(x):
        found, log = features.key(x, position)
        # relative to the factors at x itself, which the derivative takes as they are
        found = found if log is None else found * np.exp(log - factor)
        return np.sum(grad * found)

    h = 1e-6
    want = (loss(x + h * step) - loss(x - h * step)) / 2 / h
    got = np.sum(features.key_vjp(x, position, grad) * step)
    assert got == pytest.approx(want, rel=1e-5, abs=1e-7)


def quadrature(d, size=48):
    """Nodes, (size ** d, d), and weights that integrate against a normal vector."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(size)
    masses = masses / masses.sum()
    grid = np.array(list(itertools.product(nodes, repeat=d)))
    mass = np.array([math.prod(x) for x in itertools.product(masses, repeat=d)])
    return grid, mass


def estimates(kind, query, key):
    """What one direction says of ``exp(q . k)``, and the mass of each direction."""
    grid, mass = quadrature(len(query))
    one = RandomFeatures(1, kind)
    found = []
    for node in grid:
        left, right = (
            features * np.exp(log)
            for features, log in (
                one.apply(x[None], Drawn((node[:, None],))) for x in (query, key)
            )
        )
        found.append(float(np.sum(left * right)))
    return np.array(found), mass


@pytest.mark.parametrize("kind", KINDS)
def test_random_features_are_unbiased(kind):
    query, key = np.array([0.5, -0.7]), np.array([0.9, 0.2])
    found, mass = estimates(kind, query, key)
    assert found @ mass == pytest.approx(np.exp(query @ key), rel=1e-10)


def variance(kind, query, key):
    """Variances of one direction, as the papers have them."""
    squared, product = np.sum((query + key) ** 2), np.exp(2 * query @ key)
    if kind == "positive":
        return product * (np.exp(squared) - 1)
    if kind == "hyperbolic":
        return product * (np.exp(squared) - 1) * (1 - np.exp(-squared)) / 2
    squared = np.sum((query - key) ** 2)
    lengths = np.exp(query @ query + key @ key)
    return lengths * (1 - np.exp(-squared)) ** 2 / 2


@pytest.mark.parametrize("kind", KINDS)
def test_variance_of_random_features_is_the_formula(kind):
    query, key = np.array([0.5, -0.3]), np.array([0.4, 0.2])
    found, mass = estimates(kind, query, key)
    mean = found @ mass
    want = variance(kind, query, key)
    assert (found - mean) ** 2 @ mass == pytest.approx(want, rel=1e-9)


def test_variance_of_independent_directions_falls_as_one_over_their_number(rng):
    query, key = 0.4 * rng.standard_normal((2, 3))
    size, trials = 64, 400
    found = np.array(
        [
            weights(RandomFeatures(size, orthogonal=False, rng=seed), *rows)[0, 0]
            for seed in range(trials)
            for rows in [(query[None], key[None])]
        ]
    )
    single = np.exp(2 * query @ key) * np.expm1(np.sum((query + key) ** 2))
    # Chebyshev on the mean: it fails with a chance of one in 10^4 at most
    slack = 100 * math.sqrt(single / size / trials)
    assert abs(found.mean() - np.exp(query @ key)) <= slack
    assert found.var() == pytest.approx(single / size, rel=0.5)


def test_directions_are_orthogonal_and_lengths_those_of_normal_vectors():
    d, size = 8, 20
    (directions,) = RandomFeatures(size, rng=0).draw(d)
    assert directions.shape == (d, size)
    gram = directions[:, :d].T @ directions[:, :d]
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
    draws = [RandomFeatures(d, rng=seed).draw(d)[0] for seed in range(250)]
    squared = np.sum(np.stack(draws) ** 2, axis=1).ravel()
    # a sum of 2000 * 8 squares of normal numbers has mean 16000 and variance 32000
    assert abs(squared.sum() - squared.size * d) <= 7 * math.sqrt(2 * squared.size * d)


def test_no_half_space_is_preferred_by_orthogonal_directions():
    # LAPACK's QR of a normal matrix always has its first column on one side
    trials = 400
    up = sum(RandomFeatures(1, rng=seed).draw(3)[0][0, 0] > 0 for seed in range(trials))
    low, high = binom.ppf([1e-9, 1 - 1e-9], trials, 0.5)
    assert low <= up <= high


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_random_maclaurin_is_unbiased_for_every_order(order):
    x, y = np.array([[0.7, -1.2]]), np.array([[0.4, 0.9]])
    one = RandomMaclaurin(1)
    total = 0.0
    choices = list(itertools.product([-1.0, 1.0], repeat=2 * order))
    for signs in choices:
        omegas = np.array(signs).reshape(order, 2, 1)
        left, right = (one.apply(z, Drawn((np.ones(1), *omegas)))[0] for z in (x, y))
        total += float(left[0, 0] * right[0, 0]) / len(choices)
    assert total == pytest.approx(float((x @ y.T)[0, 0]) ** order, rel=1e-12)


def test_orders_of_random_maclaurin_have_the_chances_their_factors_make_up_for():
    size = 4000
    factor, *signs = RandomMaclaurin(size, rng=0).draw(3)
    order = np.zeros(size, int)
    for omega in signs:
        order[: omega.shape[1]] += 1
    for k in range(4):
        chance = 2.0 ** -(k + 1)
        low, high = binom.ppf([1e-9, 1 - 1e-9], size, chance)
        assert low <= np.count_nonzero(order == k) <= high
        # chance times factor squared is the coefficient of the power series
        want = 1 / math.factorial(k) / chance / size
        np.testing.assert_allclose(factor[order == k] ** 2, want, rtol=1e-12)


def test_tensor_sketch_is_unbiased_over_all_hashes_and_signs():
    x, y = np.array([[0.7, -1.2]]), np.array([[0.4, 0.9]])
    size, degree, d = 2, 2, 2
    found = []
    single = list(itertools.product(range(size), [-1.0, 1.0]))
    for choice in itertools.product(single, repeat=d * degree):
        matrices = np.zeros((degree, d, size))
        for number, (place, sign) in enumerate(choice):
            matrices[number // d, number % d, place] = sign
        sketch = projections.TensorSketch(tuple(matrices))
        found.append(float((sketch.apply(x) @ sketch.apply(y).T)[0, 0]))
    product = float((x @ y.T)[0, 0])
    assert np.mean(found) == pytest.approx(product**degree, rel=1e-12)
    lengths = float((x @ x.T)[0, 0] * (y @ y.T)[0, 0])
    assert np.var(found) <= (2 + 3**degree) * lengths**degree / size


def test_poly_sketch_is_close_to_the_power_where_it_is_wide(rng):
    query, key = rng.standard_normal((2, 20, 8))
    power = (query @ key.T) ** 4
    lengths = np.sum(query**2, 1)[:, None] ** 4 * np.sum(key**2, 1) ** 4
    bound = math.sqrt(lengths.sum())

    def trial(stream):
        found = weights(PolySketch(4, 64, rng=stream), query, key)
        return np.linalg.norm(found - power) <= 0.5 * bound

    assert_fails_rarely(trial, failure=0.1, trials=60)


def test_poly_sketch_is_unbiased_before_it_is_squared():
    x, y = np.array([[0.7, -1.2]]), np.array([[0.4, 0.9]])
    grid, mass = quadrature(2, 6)
    total = 0.0
    for (left, one), (right, other) in itertools.product(
        zip(grid, mass, strict=True), repeat=2
    ):
        a, b = ((z @ left[:, None]) * (z @ right[:, None]) for z in (x, y))
        total += one * other * float(a[0, 0] * b[0, 0])
    assert total == pytest.approx(float((x @ y.T)[0, 0]) ** 2, rel=1e-10)
    # the matrices of the map have the variance that makes their products so
    (first, *_) = PolySketch(4, 400, rng=0).draw(400)
    assert first.var() == pytest.approx(400**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFeatures(0), "size: expected an integer >= 1"),
        (lambda: RandomFeatures(kind="softmax"), "kind: expected one of"),
        (lambda: RandomMaclaurin(-1), "size: expected an integer >= 1"),
        (lambda: TensorSketch(0), "degree: expected an integer >= 1"),
        (lambda: TensorSketch(constant=-1.0), "constant: expected a number >= 0"),
        (lambda: PolySketch(3), "degree: expected 2, 4, 8 or 16, got 3"),
        (lambda: Cosformer(0), "length: expected an integer >= 1"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cosformer_refuses_rows_beyond_its_length(rng):
    query, key, value = rng.standard_normal((3, 9, 2))
    with pytest.raises(ValueError, match=r"Cosformer\(length=8\) is for fewer rows"):
        fastattn.linear_attention(query, key, value, feature_map=Cosformer(8))


class MapOpLaws(OpLaws):
    """Ops of one array: rows of any number and width."""

    sizes_used = ("n",)

    def inputs(self, rng, dtype, n, m):
        return [3 * rng.standard_normal((n, min(m, 20))).astype(dtype)], {}

    def slack(self, arrays, options):  # noqa: ARG002
        return 16 * np.finfo(arrays[0].dtype).eps


class TestEluPlusOne(MapOpLaws):
    op = elu_plus_one


class TestPositive(MapOpLaws):
    op = positive


class TestExponentials(MapOpLaws):
    op = exponentials


class TestSquares(MapOpLaws):
    op = squares


class TestDivided(MapOpLaws):
    op = divided

    def inputs(self, rng, dtype, n, m):
        (sums,), _ = super().inputs(rng, dtype, n, m + 1)
        # a row without weights
        sums[0] = 0
        return [sums], {"offset": 0.0}


@pytest.mark.parametrize("op", [elu_plus_one, positive, exponentials, squares])
def test_ops_take_leading_dimensions(op, rng):
    x = rng.standard_normal((2, 3, 5, 4))
    whole, one = op(x), op(x[1, 2])
    whole, one = (y if isinstance(y, tuple) else (y,) for y in (whole, one))
    for left, right in zip(whole, one, strict=True):
        np.testing.assert_array_equal(left[1, 2], right)
