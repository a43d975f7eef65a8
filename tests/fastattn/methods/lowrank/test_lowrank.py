"""The low-rank softmax: its two passes, and its laws as a structure."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from fastattn import RefusalError, load_sample
from fastattn._ops.lowrank import Functions, key_sums, query_means
from fastattn.methods.lowrank.basis import Hermite
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.problem.head import Head
from tests import oracles
from tests.laws import Flat, OpLaws, bring, fetch, skip_without

SIZES = [(9, 0), (1, 12), (9, 12), (1, 0)]
PLANS = pytest.mark.parametrize(("rank", "landmarks"), [(60, 0), (1, 64), (30, 48)])


def gaussian(n=1100, m=1300, d=6, p=5, spread=0.7, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    query, key = (spread * rng.standard_normal((x, d)) for x in (n, m))
    return [x.astype(dtype) for x in (query, key, rng.standard_normal((m, p)))]


def plan(query, key, value, rank, landmarks, scale=None, seed=0):
    scale = query.shape[1] ** -0.5 if scale is None else scale
    head, rng = Head(query, key, value, scale), np.random.default_rng(seed)
    sample = PlanningSample.of(head, rng)
    return LowRank.plan(sample, rank=rank, landmarks=landmarks, rng=rng)


def error_of(structure, query, key, value):
    """Relative error on the reliable rows, and their number."""
    got, _, reliable = (np.asarray(x) for x in structure.query(query))
    truth, _ = oracles.attention(query, key, value)
    return oracles.frobenius_error(got[reliable], truth[reliable]), int(reliable.sum())


def run(op, place, arrays, options):
    """The result of a kernel for arrays that are moved to its device."""
    skip_without(place)
    return fetch(op.kernel(place)(*[bring(place, x) for x in arrays], **options))


class TestKeySums(OpLaws):
    op = key_sums
    sizes_used = ("m",)
    sizes = (9, 12)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        rank, landmarks = self.sizes
        shapes = [(m, 4), (m, 2), (4,), (4, 4), (landmarks, 3), (2,)]
        arrays = [rng.uniform(-1, 1, x).astype(dtype) for x in shapes]
        op_arguments = Hermite.of(np.array([0.4, 0.3, 0.2]), rank).op_arguments
        # about one key in twenty is far
        return arrays, {"offset": -0.5, "longest": 4.5, **op_arguments}

    def slack(self, arrays, options):  # noqa: ARG002
        # y and landmarks are up to 8 and 1, exponents up to 60, whose exp is one sum
        return (len(arrays[0]) + 512) * np.finfo(arrays[0].dtype).eps

    def test_far_keys_are_left_out(self, place):
        arrays, options = self.inputs(np.random.default_rng(0), np.float64, 1, 300)
        sums, _, far = run(self.op, place, arrays, options)
        length = np.sum((arrays[0] - arrays[2]) ** 2, axis=1)
        assert np.all(far[length > options["longest"]])
        assert 0 < far.sum() < 150
        arrays[0], arrays[1] = arrays[0][~far], arrays[1][~far]
        near, _, none = run(self.op, place, arrays, options)
        assert not none.any()
        np.testing.assert_allclose(sums, near, rtol=1e-12)


class TestKeySumsOfPolynomials(TestKeySums):
    sizes = (9, 0)


class TestKeySumsOfLandmarks(TestKeySums):
    sizes = (1, 12)


class TestQueryMeans(OpLaws):
    op = Flat(query_means, Functions, 1)
    sizes_used = ("n",)
    sizes = (9, 12)

    def inputs(self, rng, dtype, n, m):  # noqa: ARG002
        rank, landmarks = self.sizes
        op_arguments = Hermite.of(np.array([0.4, 0.3, 0.2]), rank).op_arguments
        shapes = [
            (n, 4), (4, 4), (4,), (landmarks, 3), (3,), (rank + landmarks, 3),
            (6, 4), (6, 3), (2, 2), (2,),
        ]  # fmt: skip
        arrays = [rng.uniform(-1, 1, x) for x in shapes]
        # some rows are unreliable; the sum of weights stays away from its limit
        arrays[4] = np.abs(arrays[4]) / 4
        arrays[5] *= 1e-3
        arrays[5][0, -1] = 5.0
        arrays[7] = np.abs(arrays[7])
        arrays[8] = np.sort(arrays[8], axis=0)
        return [x.astype(dtype) for x in arrays], op_arguments

    def slack(self, arrays, options):  # noqa: ARG002
        return 512 * np.finfo(arrays[0].dtype).eps

    def test_unreliable_rows_get_the_value_center(self, place):
        arrays, options = self.inputs(np.random.default_rng(0), np.float64, 200, 1)
        arrays[0][5] *= 1e3
        arrays[0][9] *= 1e300
        value, logarithm = run(self.op, place, arrays, options)
        bad = np.isnan(logarithm)
        assert bad[5]
        assert bad[9]
        assert 0 < bad.sum() < 200
        np.testing.assert_array_equal(value[bad], np.tile(arrays[9], (bad.sum(), 1)))
        arrays[5][0, -1] = -100
        assert np.isnan(run(self.op, place, arrays, options)[1]).all()

    def test_means_are_cut_to_the_bounds(self, place):
        arrays, options = self.inputs(np.random.default_rng(0), np.float64, 200, 1)
        arrays[5][0, :2] = 100, -100
        value, logarithm = run(self.op, place, arrays, options)
        reliable = ~np.isnan(logarithm)
        ends = arrays[8] + arrays[9]
        np.testing.assert_allclose(value[reliable, 0], ends[1, 0], rtol=1e-12)
        np.testing.assert_allclose(value[reliable, 1], ends[0, 1], rtol=1e-12)


class TestQueryMeansOfPolynomials(TestQueryMeans):
    sizes = (9, 0)


class TestQueryMeansOfLandmarks(TestQueryMeans):
    sizes = (1, 12)


def test_hermite_polynomials_expand_the_exponential():
    """``exp(x . y) = exp(|y|^2 / 2) sum He_alpha(x) y^alpha / sqrt(alpha!)``."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 40, 2))
    hermite = Hermite.of(np.array([0.5, 0.5]), 91)
    assert len(hermite) == 91
    eye, zero, none = np.eye(2, 3), np.zeros(2), np.zeros((0, 2))
    for row in y:
        sums, _, _ = key_sums(
            row[None], np.zeros((1, 1)), zero, eye, none, np.zeros(1),
            offset=0.0, longest=10.0, **hermite.op_arguments,
        )  # fmt: skip
        _, logarithm = query_means(
            x, Functions(eye, np.zeros(3), none, zero), 100 * sums, none,
            np.zeros((0, 2)), np.zeros((2, 1)), np.zeros(1), **hermite.op_arguments,
        )  # fmt: skip
        # what is beyond degree 12, orthonormal: a fraction of |y|^13 / sqrt(13!)
        np.testing.assert_allclose(
            np.exp(logarithm) / 100, np.exp(x @ row), rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("rank", [1, 2, 50, 400])
def test_index_sets_list_parents_first(rank):
    hermite = Hermite.of(np.array([0.9, 0.3, 0.29, 0.01]), rank)
    assert len(hermite) == rank
    tuples = [()]
    for j in range(1, rank):
        assert hermite.parent[j] < j
        index = (*tuples[hermite.parent[j]], int(hermite.coordinate[j]))
        assert index == tuple(sorted(index))
        assert hermite.power[j] == index.count(index[-1])
        tuples.append(index)
    assert len(set(tuples)) == rank
    counts = [np.bincount(x, minlength=4) for x in map(list, tuples[1:])]
    factorial = [np.prod([float(np.prod(range(1, a + 1))) for a in x]) for x in counts]
    np.testing.assert_allclose(hermite.factorial[1:], factorial)


def test_many_polynomials_of_few_coordinates_reproduce_softmax():
    query, key, value = gaussian(d=2, spread=0.5, dtype=np.float64)
    structure = plan(query, key, value, 91, 0).insert(key, value)
    got, normalizer, reliable = structure.query(query)
    truth, logarithm = oracles.attention(query, key, value)
    assert reliable.sum() > 0.99 * len(reliable)
    assert oracles.frobenius_error(got[reliable], truth[reliable]) < 1e-7
    np.testing.assert_allclose(normalizer[reliable], logarithm[reliable], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_as_many_landmarks_as_keys_reproduce_softmax(dtype):
    query, key, value = gaussian(m=40, spread=0.5, dtype=dtype)
    structure = plan(query, key, value, 1, 40).insert(key, value)
    # one key in five is never a landmark of its own
    assert structure.landmarks == 32
    error, reliable = error_of(structure, query, key, value)
    assert error < 0.02
    assert reliable > 0.99 * len(query)


@pytest.mark.parametrize("rank", [1, 20])
def test_duplicated_keys_make_no_landmark_twice(rank):
    query, key, value = gaussian(m=10)
    key = np.repeat(key, 100, axis=0)
    value = np.repeat(value, 100, axis=0)
    structure = plan(query, key, value, rank, 64).insert(key, value)
    assert structure.landmarks <= 10
    error, _ = error_of(structure, query, key, value)
    # what 20 polynomials leave is small next to the rounding of float32
    assert error < (1e-4 if rank == 1 else 1e-3)


@PLANS
def test_one_huge_key_is_kept_apart(rank, landmarks):
    query, key, value = gaussian(spread=0.5)
    key[17] *= 1e6
    structure = plan(query, key, value, rank, landmarks).insert(key, value)
    np.testing.assert_allclose(
        structure.far_key[0] + structure.basis.whitening.center, key[17], rtol=1e-6
    )
    assert len(structure.far_key) == 1
    error, reliable = error_of(structure, query, key, value)
    # rows that the huge key dominates are unreliable
    assert 0.3 * len(query) < reliable < 0.7 * len(query)
    assert error < 0.1


@PLANS
def test_merge_is_concatenation(rank, landmarks):
    query, key, value = gaussian()
    empty = plan(query, key, value, rank, landmarks)
    whole = empty.insert(key, value)
    halves = [empty.insert(key[x], value[x]) for x in np.split(np.arange(1300), 2)]
    pieces = empty
    for rows in np.array_split(np.arange(1300), 7):
        pieces = pieces.insert(key[rows], value[rows])
    assert whole.nbytes == pieces.nbytes
    # float32, and landmarks that 30 polynomials leave little of
    slack = 3e-4 if rank > 1 and landmarks else 1e-4
    for other in (halves[0].merge(halves[1]), halves[1].merge(halves[0]), pieces):
        assert other.count + len(other.far_key) == 1300
        for one, two in zip(whole.query(query), other.query(query), strict=True):
            np.testing.assert_allclose(one, two, rtol=slack, atol=slack)


def test_structures_of_different_plans_do_not_merge():
    query, key, value = gaussian()
    one = plan(query, key, value, 9, 12, seed=0)
    with pytest.raises(ValueError, match="different bases"):
        one.merge(plan(query, key, value, 9, 12, seed=1))
    again = plan(query, key, value, 9, 12, seed=0)
    assert one.insert(key, value).merge(again).count == one.insert(key, value).count


def test_memory_does_not_grow_with_the_keys():
    query, key, value = gaussian()
    empty = plan(query, key, value, 9, 12)
    once = empty.insert(key, value)
    assert once.insert(key, value).nbytes == once.nbytes
    assert once.rank == 9
    assert once.landmarks == 12


@PLANS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_answers_do_not_depend_on_the_threads(rank, landmarks, dtype):
    query, key, value = gaussian(n=3000, m=5000, dtype=dtype)
    answers = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads, "blas"):
            structure = plan(query, key, value, rank, landmarks).insert(key, value)
            answers.append((structure.sums, *structure.query(query)))
    for other in answers[1:]:
        for one, two in zip(answers[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@PLANS
def test_rows_do_not_see_each_other(rank, landmarks):
    query, key, value = gaussian()
    query[::50] *= 1e20
    structure = plan(query, key, value, rank, landmarks).insert(key, value)
    whole = structure.query(query)
    some = structure.query(query[300:777])
    for one, two in zip(whole, some, strict=True):
        np.testing.assert_allclose(one[300:777], two, rtol=1e-4, atol=1e-4)


@PLANS
def test_outlying_queries_are_not_reliable(rank, landmarks):
    query, key, value = gaussian()
    query[[3, 500]] *= 100
    query[700] = 1e30
    structure = plan(query, key, value, rank, landmarks).insert(key, value)
    got, normalizer, reliable = structure.query(query)
    assert not reliable[[3, 500, 700]].any()
    assert reliable.sum() > 0.98 * len(reliable)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(reliable, ~np.isnan(normalizer))


@PLANS
def test_answers_stay_within_the_range_of_the_values(rank, landmarks):
    query, key, value = gaussian(spread=2.5)
    structure = plan(query, key, value, rank, landmarks).insert(key, value)
    got, _, _ = structure.query(query)
    slack = 4 * np.finfo(np.float32).eps * np.abs(value).max()
    assert np.all(got >= value.min(axis=0) - slack)
    assert np.all(got <= value.max(axis=0) + slack)


@PLANS
def test_library_and_dtype_follow_the_inputs(xp, rank, landmarks):
    for dtype in (np.float32, np.float64):
        inputs = gaussian(n=600, m=700, dtype=dtype)
        query, key, value = xp.asarrays(*inputs)
        structure = plan(query, key, value, rank, landmarks).insert(key, value)
        got, normalizer, reliable = structure.query(query)
        for x in (got, normalizer, reliable):
            assert isinstance(x, xp.array_type)
        assert xp.dtype_name(got) == xp.dtype_name(normalizer) == np.dtype(dtype).name
        want = plan(*inputs, rank, landmarks).insert(*inputs[1:]).query(inputs[0])
        slack = 1e-3 if dtype == np.float32 else 1e-9
        np.testing.assert_array_equal(np.asarray(reliable), want[2])
        np.testing.assert_allclose(np.asarray(got), want[0], atol=slack)


def test_half_precision_is_computed_in_single():
    inputs = gaussian(dtype=np.float16)
    single = [x.astype(np.float32) for x in inputs]
    halves, singles = (
        plan(*x, 30, 48).insert(*x[1:]).query(x[0]) for x in (inputs, single)
    )
    for one, two in zip(halves, singles, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power", [-20, 20, 60])
def test_scale_moves_freely_between_query_and_key(power):
    query, key, value = gaussian()
    c = np.float32(2.0**power)
    want = plan(query, key, value, 30, 48).insert(key, value).query(query)
    moved = plan(query * c, key / c, value, 30, 48).insert(key / c, value)
    got = moved.query(query * c)
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)
    np.testing.assert_allclose(got[1], want[1], atol=1e-3)


@pytest.mark.parametrize("case", ["query", "key", "zero query", "values"])
def test_degenerate_inputs_are_answered(case):
    query, key, value = gaussian(n=500, m=400, d=3)
    if case == "query":
        query[:] = query[0]
    elif case == "key":
        key[:] = key[0]
    elif case == "zero query":
        query[:] = 0
    elif case == "values":
        value[:] = 0.7
    structure = plan(query, key, value, 4, 8).insert(key, value)
    error, reliable = error_of(structure, query, key, value)
    assert error < (0.2 if case == "values" else 1e-4)
    assert reliable >= 490
    if case == "values":
        got, _, _ = structure.query(query)
        np.testing.assert_allclose(got, 0.7, rtol=1e-6)


def test_before_any_key_no_row_is_reliable():
    query, key, value = gaussian(n=300)
    got, normalizer, reliable = plan(query, key, value, 4, 8).query(query)
    assert not reliable.any()
    assert np.isnan(normalizer).all()
    assert np.isfinite(got).all()


@pytest.mark.parametrize("scale", [5.0, 100.0, 1e6])
def test_logits_in_the_hundreds_are_refused(scale):
    query, key, value = gaussian(spread=2.0)
    with pytest.raises(RefusalError, match="too much for a low rank"):
        plan(query, key, value, 1, 64, scale=scale)


def test_values_whose_sums_overflow_are_refused():
    query, key, value = gaussian()
    value = np.where(value > 0, 3e38, -3e38).astype(np.float32)
    empty = plan(query, key, value, 9, 12)
    with pytest.raises(RefusalError, match="overflow"):
        empty.insert(key, value)


@pytest.mark.parametrize("head", [0, 1])
def test_error_falls_with_the_landmarks(head):
    query, key, value = (x[head] for x in load_sample("minilm-diffuse"))
    errors = []
    for landmarks in (16, 64, 256):
        structure = plan(query, key, value, 1, landmarks).insert(key, value)
        errors.append(error_of(structure, query, key, value)[0])
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.4 * errors[1]
