"""Law suites for every op and every method of attention.

A test class supplies the few things a suite asks for and inherits its laws.
"""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import approximate, attention
from tests import oracles

# around the blocks of the fast kernels: 256 and 1024 rows
BLOCK_EDGES = (1, 63, 256, 257, 1025)
DTYPES = (np.float32, np.float64)
# lanes differ by the dtype, blocks do not
_EDGES = [*((size, np.float32) for size in BLOCK_EDGES), (1, np.float64)]
_EDGES.append((257, np.float64))


def roundoff(query, key, value, scale=None, dtype=None):
    """Largest difference between two orders of summation of one softmax.

    A logit rounded by ``r`` scales its weight by ``exp(r)``, and the answer, a mean
    of the values, follows by ``r`` ranges; the sum over keys rounds the values.
    """
    eps = float(np.finfo(query.dtype if dtype is None else dtype).eps)
    d, m = query.shape[-1], key.shape[-2]
    scale = d**-0.5 if scale is None else scale
    norms = [np.linalg.norm(x.astype(float), axis=-1).max() for x in (query, key)]
    logit = abs(scale) * norms[0] * norms[1]
    spread = float(value.max()) - float(value.min())
    peak = float(np.abs(value).max())
    return 2 * eps * ((logit * (d + 4) + 32) * spread + (min(m, 1024) + 8) * peak)


def places_of(op):
    """The places of an op as parameters; the GPU has a mark."""
    return [
        pytest.param(place, marks=[pytest.mark.gpu] if place == "gpu" else [])
        for place in op.places
    ]


def bring(place, x):
    """Copy an array to a place."""
    if place != "gpu" or not isinstance(x, np.ndarray):
        return x
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    if not cupy.is_available():
        pytest.skip("no CUDA device")
    return cupy.asarray(x)


def skip_without(place):
    """Skip a test of the GPU's kernel where there is no GPU."""
    if place == "gpu" and importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed: the GPU kernel cannot run")


def fetch(x):
    """Copy an answer, or each of several, back to NumPy."""
    if isinstance(x, tuple):
        return tuple(fetch(part) for part in x)
    return x.get() if hasattr(x, "get") else np.asarray(x)


def poison(*shapes, dtype=np.float64):
    """Leave freed memory full of NaN, so that an entry never written shows."""
    for shape in shapes:
        blocks = [np.full(shape, np.nan, dtype) for _ in range(4)]
        del blocks


class Flat:
    """An op whose argument of a NamedTuple class is given as separate arrays.

    ``first`` is the number of arrays before it.
    """

    def __init__(self, op, kind, first):
        self.op, self.kind, self.first = op, kind, first
        self.places, self.reference = op.places, _Flattened(op.reference, kind, first)

    def kernel(self, place):
        return _Flattened(self.op.kernel(place), self.kind, self.first)

    def __call__(self, *arrays, **options):
        return _Flattened(self.op, self.kind, self.first)(*arrays, **options)


class _Flattened:
    def __init__(self, kernel, kind, first):
        self.kernel, self.kind, self.first = kernel, kind, first

    @property
    def __globals__(self):
        return self.kernel.__globals__

    def __call__(self, *arrays, **options):
        last = self.first + len(self.kind._fields)
        one = self.kind(*arrays[self.first : last])
        return self.kernel(*arrays[: self.first], one, *arrays[last:], **options)


class OpLaws:
    """Every kernel of an op computes what its reference computes.

    A subclass has ``op``, ``inputs(rng, dtype, n, m)``, the arguments and options of a
    problem of that size, and ``slack(arrays, options)``, an absolute tolerance.
    ``sizes_used`` names the sizes that its arrays depend on.
    """

    op = None
    sizes_used = ("n", "m")

    def places(self):
        return places_of(self.op)

    def pytest_generate_tests(self, metafunc):
        if "place" in metafunc.fixturenames:
            metafunc.parametrize("place", self.places())
        for size in ("n", "m"):
            if size in metafunc.fixturenames:
                edges = _EDGES if size in self.sizes_used else _EDGES[-1:]
                metafunc.parametrize((size, "dtype"), edges)

    def agree(self, place, arrays, options):
        skip_without(place)
        want = fetch(self.op.reference(*arrays, **options))
        poison(*(part.shape for part in _parts(want)), dtype=arrays[0].dtype)
        moved = [bring(place, x) for x in arrays]
        got = fetch(self.op.kernel(place)(*moved, **options))
        for one, other in zip(_parts(got), _parts(want), strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            slack = self.slack(arrays, options)
            np.testing.assert_allclose(one, other, rtol=slack, atol=slack)

    def test_fast_kernel_agrees_with_reference_around_blocks(self, place, dtype, n):
        arrays, options = self.inputs(np.random.default_rng(n), dtype, n, 300)
        self.agree(place, arrays, options)

    def test_fast_kernel_agrees_with_reference_for_any_keys(self, place, dtype, m):
        arrays, options = self.inputs(np.random.default_rng(m), dtype, 70, m)
        self.agree(place, arrays, options)

    @given(
        n=st.integers(1, 9),
        m=st.integers(1, 9),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(DTYPES),
    )
    def test_fast_kernel_agrees_with_reference_on_small_problems(
        self, place, n, m, seed, dtype
    ):
        arrays, options = self.inputs(np.random.default_rng(seed), dtype, n, m)
        self.agree(place, arrays, options)

    @pytest.mark.parametrize("layout", [np.asfortranarray, lambda x: x[::-1][::-1]])
    def test_memory_order_does_not_matter(self, place, layout):
        arrays, options = self.inputs(np.random.default_rng(1), np.float64, 65, 40)
        self.agree(place, [layout(x) for x in arrays], options)

    def test_inputs_are_left_as_they_were(self, place):
        skip_without(place)
        arrays, options = self.inputs(np.random.default_rng(2), np.float32, 300, 300)
        arrays = [x.copy() for x in arrays]
        before = [x.copy() for x in arrays]
        for x in arrays:
            x.flags.writeable = False
        self.op.kernel(place)(*[bring(place, x) for x in arrays], **options)
        for x, old in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(x, old)


def _parts(answer):
    return answer if isinstance(answer, tuple) else (answer,)


class MethodLaws:
    """Softmax attention's own symmetries, which every method keeps to its error.

    A subclass has ``options``, the keywords that choose the method, and ``slack(truth,
    certificate, *inputs)``: how far an answer may be from the truth in any entry. By
    default the method is one with a proven bound and the bound is the slack.
    """

    options = {}  # noqa: RUF012
    scale_of_inputs = 0.5

    def problem(self, n=40, m=50, d=4, p=3, seed=0, dtype=np.float64, lead=()):
        rng = np.random.default_rng(seed)
        query = self.scale_of_inputs * rng.standard_normal((*lead, n, d))
        key = self.scale_of_inputs * rng.standard_normal((*lead, m, d))
        value = rng.standard_normal((*lead, m, p))
        return query.astype(dtype), key.astype(dtype), value.astype(dtype)

    def answer(self, *inputs, **more):
        return approximate(*inputs, rng=0, **{**self.options, **more})

    def slack(self, answer):
        """An absolute bound on every entry's error."""
        assert answer.certificate.norm == "max"
        return np.max(answer.certificate.error)

    def assert_same(self, one, other, factor=1.0):
        """Two answers to one question differ by their two bounds at most."""
        slack = factor * (self.slack(one) + self.slack(other))
        np.testing.assert_allclose(one.value, other.value, rtol=0, atol=slack)

    def assert_true(self, inputs, **more):
        answer = self.answer(*inputs, **more)
        more = {k: more[k] for k in ("scale", "is_causal", "key_mask") if k in more}
        truth, _ = oracles.attention(*inputs, **more)
        assert answer.value.shape == truth.shape
        assert oracles.largest_error(answer.value, truth).max() <= self.slack(answer)
        return answer

    @given(
        n=st.integers(1, 20),
        m=st.integers(1, 20),
        d=st.integers(1, 5),
        p=st.integers(1, 4),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(DTYPES),
    )
    def test_error_is_within_the_certificate(self, n, m, d, p, seed, dtype):
        self.assert_true(self.problem(n, m, d, p, seed, dtype))

    @pytest.mark.parametrize("size", BLOCK_EDGES)
    def test_error_is_within_the_certificate_around_blocks(self, size):
        self.assert_true(self.problem(n=size, m=33, dtype=np.float32))
        self.assert_true(self.problem(n=33, m=size, dtype=np.float32))

    @pytest.mark.parametrize("ones", ["n", "m", "d", "p"])
    def test_sizes_of_one_are_served(self, ones):
        self.assert_true(self.problem(**{ones: 1}))

    def test_permuting_the_keys_changes_nothing(self):
        query, key, value = self.problem()
        order = np.random.default_rng(3).permutation(len(key))
        self.assert_same(
            self.answer(query, key, value), self.answer(query, key[order], value[order])
        )

    def test_shifting_the_keys_changes_nothing(self):
        query, key, value = self.problem()
        self.assert_same(
            self.answer(query, key, value), self.answer(query, key + 2.5, value)
        )

    @pytest.mark.parametrize("power", [-20, 3, 20])
    def test_scale_moves_freely_between_query_and_key(self, power):
        query, key, value = self.problem()
        c = 2.0**power
        self.assert_same(
            self.answer(query, key, value), self.answer(query * c, key / c, value)
        )

    def test_scale_moves_freely_into_the_query(self):
        query, key, value = self.problem()
        self.assert_same(
            self.answer(query, key, value, scale=0.25),
            self.answer(query * -0.5, key, value, scale=-0.5),
        )

    def test_two_equal_halves_of_keys_are_one(self):
        query, key, value = self.problem()
        twice = self.answer(query, np.tile(key, (2, 1)), np.tile(value, (2, 1)))
        self.assert_same(self.answer(query, key, value), twice)

    def test_rows_do_not_see_each_other(self):
        query, key, value = self.problem()
        some = self.answer(query[7:20], key, value)
        whole = self.answer(query, key, value)
        slack = self.slack(some) + self.slack(whole)
        np.testing.assert_allclose(some.value, whole.value[7:20], rtol=0, atol=slack)

    def test_values_map_affinely(self):
        query, key, value = self.problem()
        plain = self.answer(query, key, value)
        mapped = self.answer(query, key, 4 - 2 * value)
        slack = 2 * self.slack(plain) + self.slack(mapped)
        np.testing.assert_allclose(
            mapped.value, 4 - 2 * plain.value, rtol=0, atol=slack
        )

    def test_constant_values_come_back(self):
        query, key, value = self.problem()
        answer = self.answer(query, key, np.full_like(value, 0.7))
        np.testing.assert_allclose(answer.value, 0.7, rtol=1e-12)
        assert np.all(np.isfinite(answer.certificate.error))

    def test_a_batch_is_a_loop_over_its_heads(self):
        query, key, value = self.problem(lead=(2, 3))
        whole = self.answer(query, key, value)
        assert np.shape(whole.certificate.error) == (2, 3)
        assert whole.log_normalizer.shape == (2, 3, 40)
        for place in np.ndindex(2, 3):
            one = self.answer(query[place], key[place], value[place])
            slack = 2 * self.slack(one)
            np.testing.assert_allclose(whole.value[place], one.value, atol=slack)

    def test_grouped_heads_broadcast(self):
        query, _, _ = self.problem(lead=(2, 3), n=11)
        _, key, value = self.problem(lead=(2, 1))
        self.assert_true((query, key, value))
        self.assert_true((query[0, 0], key, value))

    def test_masked_keys_do_not_count(self):
        query, key, value = self.problem()
        mask = np.random.default_rng(5).random(len(key)) < 0.5
        loud = np.where(mask[:, None], value, 1e6)
        masked = self.answer(query, key, loud, key_mask=mask)
        self.assert_same(masked, self.answer(query, key[mask], value[mask]))

    def test_no_key_gives_zeros_and_minus_infinity(self):
        query, key, value = self.problem()
        answer = self.answer(query, key, value, key_mask=np.zeros(len(key), bool))
        np.testing.assert_array_equal(answer.value, 0)
        np.testing.assert_array_equal(answer.log_normalizer, -np.inf)

    def test_log_normalizer_is_the_log_sum_exp(self):
        query, key, value = self.problem(m=70)
        answer = self.answer(query, key + 1.5, value)
        _, truth = oracles.attention(query, key + 1.5, value)
        # weights are off by a relative delta; values in half ranges by delta/(1-delta)
        half = (value.max(axis=0) - value.min(axis=0)).max() / 2
        delta = self.slack(answer) / half
        np.testing.assert_allclose(
            answer.log_normalizer, truth, atol=2 * delta + 1e-12, rtol=0
        )

    def test_answers_over_disjoint_keys_merge(self):
        query, key, value = self.problem(m=64)
        parts = [
            self.answer(query, key[rows], value[rows])
            for rows in np.split(np.arange(64), 2)
        ]
        logs = np.stack([part.log_normalizer for part in parts])
        weights = np.exp(logs - logs.max(axis=0))
        weights /= weights.sum(axis=0)
        merged = sum(
            w[:, None] * part.value for w, part in zip(weights, parts, strict=True)
        )
        truth, _ = oracles.attention(query, key, value)
        # the parts' weights are off by the same relative delta as their values
        slack = 3 * sum(self.slack(part) for part in parts)
        np.testing.assert_allclose(merged, truth, rtol=0, atol=slack)

    def test_library_and_dtype_follow_the_inputs(self, xp):
        for dtype in DTYPES:
            inputs = xp.asarrays(*self.problem(dtype=dtype))
            answer = self.answer(*inputs)
            for x in (answer.value, answer.log_normalizer):
                assert isinstance(x, xp.array_type)
                assert xp.dtype_name(x) == np.dtype(dtype).name
            truth, _ = oracles.attention(*self.problem(dtype=dtype))
            got = np.asarray(answer.value)
            assert oracles.largest_error(got, truth) <= self.slack(answer)

    def test_half_precision_stays_half(self):
        inputs = self.problem(dtype=np.float16)
        answer = self.answer(*inputs)
        assert answer.value.dtype == np.float16
        assert answer.log_normalizer.dtype == np.float32
        truth, _ = oracles.attention(*inputs)
        assert oracles.largest_error(answer.value, truth) <= self.slack(answer)

    def test_an_int_makes_it_reproducible(self):
        inputs = self.problem()
        options = {**self.options, "rng": 7}
        np.testing.assert_array_equal(
            attention(*inputs, **options), attention(*inputs, **options)
        )

    def test_inputs_are_left_as_they_were(self):
        inputs = self.problem()
        before = [x.copy() for x in inputs]
        self.answer(*inputs)
        for x, old in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(x, old)
