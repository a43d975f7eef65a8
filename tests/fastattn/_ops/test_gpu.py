"""Laws of the GPU kernels: each agrees with its reference, on every place it runs.

Here the place is a CUDA device; ``test_cuda_source.py`` runs the same laws on a CPU
that emulates one.
"""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn._ops.monomials import means, moments, monomials
from fastattn._ops.softmax import attend
from fastattn.methods.polynomial.expansions import by_energy, taylor, total_degree

OPS = (attend, monomials, moments, means)
DTYPES = [np.float32, np.float64]
# sizes around those of warps, tiles and blocks
SIZES = [1, 2, 31, 32, 33, 63, 65, 129, 1025]
INDEX_SETS = {
    "constant": total_degree(3, 0),
    "square": total_degree(5, 2),
    "deep": total_degree(1, 24),
    "wide": total_degree(9, 3),
    "picked": by_energy(np.linspace(1, 0.1, 7), taylor(6), 150),
}


def problem(dtype, *shapes, seed=0):
    """Random arrays small enough that no sum cancels to nothing."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, shape).astype(dtype) for shape in shapes]


def attend_roundoff(query, key, value):
    """Largest difference between two orders of summation.

    A logit rounded by ``r`` scales its weight by ``exp(r)``, and the answer, which is
    a mean of the values, follows; so does the logarithm of the sum.
    """
    d, m = key.shape[1:][::-1]
    peak = d * np.abs(query).max() * np.abs(key).max()
    return 8 * np.finfo(query.dtype).eps * (2 + d * peak + m) * np.abs(value).max()


def in_float64(arrays, transform=np.asarray):
    """Copy arrays to float64, changed by ``transform``."""
    return [transform(x).astype(np.float64) for x in arrays]


def sum_roundoff(dtype, terms, index_set, d):
    """Relative error, in absolute sums, of ``terms`` products of monomials."""
    degree = index_set.degree.max(initial=0)
    return 2 * np.finfo(dtype).eps * (terms + (degree + 2) * (d + 4) + 16)


class BodyLaws:
    """The laws; a place supplies the fixture ``gpu``: kernels, and moving arrays."""

    dtypes, sizes = DTYPES, SIZES

    def pytest_generate_tests(self, metafunc):
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)
        for size in ("n", "m"):
            if size in metafunc.fixturenames:
                metafunc.parametrize(size, self.sizes)

    @pytest.mark.parametrize("seen", ["all", "causal", "some", "nothing"])
    def test_attend_agrees_with_reference(self, gpu, dtype, m, seen):
        n, d, p = 67, 1 + m % 19, 1 + m % 35
        query, key, value = problem(dtype, (2, n, d), (2, m, d), (2, m, p))
        prefix_lengths = {
            "all": None,
            "causal": np.minimum(np.arange(1, n + 1), m),
            "some": np.arange(n)[::-1] * m // n,
            "nothing": np.zeros(n, dtype=np.int64),
        }[seen]
        want = attend.reference(
            query, key, value, scale=1.5, prefix_lengths=prefix_lengths
        )
        got = gpu.attend(
            *map(gpu.asarray, (query, key, value)),
            scale=1.5,
            prefix_lengths=None
            if prefix_lengths is None
            else gpu.asarray(prefix_lengths),
        )
        slack = 1.5 * attend_roundoff(query, key, value)
        for ours, theirs in zip(map(gpu.asnumpy, got), want, strict=True):
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=slack)

    @pytest.mark.parametrize("rows", [1, 5, 64, 1000])
    def test_blocks_of_queries_change_nothing(self, gpu, rows):
        query, key, value = problem(np.float64, (1, 65, 3), (1, 40, 3), (1, 40, 4))
        arrays = [gpu.asarray(x) for x in (query, key, value)]
        prefix_lengths = gpu.asarray(np.arange(65) % 41)
        whole = gpu.attend(*arrays, scale=1.0, prefix_lengths=prefix_lengths)
        parts = gpu.attend(*arrays, scale=1.0, prefix_lengths=prefix_lengths, rows=rows)
        slack = attend_roundoff(query, key, value)
        for x, y in zip(whole, parts, strict=True):
            np.testing.assert_allclose(
                gpu.asnumpy(x), gpu.asnumpy(y), rtol=0, atol=slack
            )

    @pytest.mark.parametrize("keys", [1, 7, 39])
    def test_blocks_of_keys_change_nothing(self, gpu, monkeypatch, keys):
        query, key, value = problem(np.float64, (2, 65, 3), (2, 40, 3), (2, 40, 4))
        prefix_lengths = np.arange(65) % 41
        want = attend.reference(
            query, key, value, scale=1.0, prefix_lengths=prefix_lengths
        )
        monkeypatch.setitem(gpu.attend.__globals__, "_KEYS", keys)
        arrays = [gpu.asarray(x) for x in (query, key, value)]
        got = gpu.attend(*arrays, scale=1.0, prefix_lengths=gpu.asarray(prefix_lengths))
        slack = attend_roundoff(query, key, value)
        for ours, theirs in zip(map(gpu.asnumpy, got), want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=slack)

    def test_attend_keeps_the_dtype_of_query(self, gpu):
        query, key, value = problem(np.float32, (1, 9, 4), (1, 12, 4), (1, 12, 3))
        half = [x.astype(np.float16) for x in (key, value)]
        want = attend.reference(query, *half, scale=0.5, prefix_lengths=None)
        got = gpu.attend(
            *map(gpu.asarray, (query, *half)), scale=0.5, prefix_lengths=None
        )
        slack = attend_roundoff(query, key, value)
        for ours, theirs in zip(map(gpu.asnumpy, got), want, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=slack)

    def test_rising_logits_rescale_what_was_summed(self, gpu):
        # the largest logit comes with the last key, 700 above the first
        key = np.linspace(0, 700, 1500)[None, :, None]
        query, value = np.ones((1, 3, 1)), problem(np.float64, (1, 1500, 2))[0]
        want = attend.reference(query, key, value, scale=1.0, prefix_lengths=None)
        got = gpu.attend(
            *map(gpu.asarray, (query, key, value)), scale=1.0, prefix_lengths=None
        )
        slack = attend_roundoff(query, key, value)
        for ours, theirs in zip(map(gpu.asnumpy, got), want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=slack)

    @pytest.mark.parametrize("name", INDEX_SETS)
    def test_monomials_are_those_of_the_reference(self, gpu, dtype, n, name):
        index_set = INDEX_SETS[name]
        (x,) = problem(dtype, (n, 1 + int(index_set.coordinate.max())))
        # away from zero, where powers would underflow
        x = np.where(np.abs(x) < 0.25, x + 0.5, x).astype(dtype)
        options = {"parent": index_set.parent, "coordinate": index_set.coordinate}
        got = gpu.asnumpy(gpu.monomials(gpu.asarray(x), **options))
        assert got.dtype == dtype
        # the same products in the same order
        np.testing.assert_array_equal(got, monomials.reference(x, **options))

    @pytest.mark.parametrize("name", INDEX_SETS)
    def test_moments_agree_with_reference(self, gpu, dtype, m, name):
        check_moments(gpu, dtype, m, INDEX_SETS[name], p=1 + m % 70)

    @pytest.mark.parametrize("limit", ["_LARGEST_PARTS", "ROWS"])
    def test_moments_add_up_over_blocks(self, gpu, monkeypatch, limit):
        products = gpu.moments.__globals__["spans"].__globals__
        monkeypatch.setitem(products, limit, 256)
        check_moments(gpu, np.float32, 1025, INDEX_SETS["square"], p=3)

    @pytest.mark.parametrize("name", INDEX_SETS)
    def test_means_agree_with_reference(self, gpu, dtype, n, name):
        check_means(gpu, dtype, n, INDEX_SETS[name], p=1 + n % 70)

    def test_means_add_up_over_blocks(self, gpu, monkeypatch):
        monkeypatch.setitem(gpu.means.__globals__, "ROWS", 100)
        check_means(gpu, np.float32, 333, INDEX_SETS["square"], p=3)

    def test_means_without_weight_are_the_value_center(self, gpu):
        options = {"parent": np.zeros(1, int), "coordinate": np.zeros(1, int)}
        query, center, projection, value_center = problem(
            np.float32, (3, 2), 2, (2, 2), 1
        )
        for weight in (0.0, -1.0, np.inf, np.nan):
            readout = np.array([[np.inf, weight]], dtype=np.float32)
            arrays = (query, center, projection, readout, value_center)
            value, total = gpu.means(*map(gpu.asarray, arrays), **options)
            np.testing.assert_array_equal(
                gpu.asnumpy(value), np.tile(value_center, (3, 1))
            )
            np.testing.assert_array_equal(gpu.asnumpy(total), np.full(3, weight))


def check_moments(gpu, dtype, m, index_set, p):
    """Compare moments with the reference in float64."""
    c = 1 + int(index_set.coordinate.max())
    d = c + 2
    options = {"parent": index_set.parent, "coordinate": index_set.coordinate}
    arrays = problem(dtype, (m, d), (m, p), d, (d, c), d, p)
    key, value, center, projection, tilt, value_center = arrays
    tilt /= d
    got = gpu.asnumpy(gpu.moments(*map(gpu.asarray, arrays), **options))
    assert got.dtype == dtype
    want = moments.reference(*in_float64(arrays), **options)
    # every term's absolute value, or more: no monomial and no weight is larger
    positive = (
        key - center,
        value - value_center,
        0 * center,
        projection,
        tilt,
        0 * value_center,
    )
    absolute = moments.reference(*in_float64(positive, np.abs), **options)
    slack = sum_roundoff(dtype, m, index_set, d) * absolute
    np.testing.assert_array_less(np.abs(got - want), slack)


def check_means(gpu, dtype, n, index_set, p):
    """Compare means with the reference in float64, where the sign is certain."""
    c, rank = 1 + int(index_set.coordinate.max()), len(index_set)
    d = c + 2
    options = {"parent": index_set.parent, "coordinate": index_set.coordinate}
    arrays = problem(dtype, (n, d), d, (d, c), (rank, p + 1), p)
    query, center, projection, readout, value_center = arrays
    projection /= d
    got = [gpu.asnumpy(x) for x in gpu.means(*map(gpu.asarray, arrays), **options)]
    assert [x.dtype for x in got] == [dtype, dtype]
    value, total = means.reference(*in_float64(arrays), **options)
    x = np.abs(query - center).astype(np.float64) @ np.abs(projection)
    sums = monomials.reference(x, **options) @ np.abs(readout)
    slack = sum_roundoff(dtype, rank, index_set, d) * sums
    np.testing.assert_array_less(np.abs(got[1] - total), slack[:, -1])
    clear = np.abs(total) > 4 * slack[:, -1]
    assert clear.any()
    safe = np.where(total > 0, total, np.inf)
    allowed = slack[:, :-1] + np.abs(value - value_center) * slack[:, -1:]
    allowed = 2 * allowed / safe[:, None] + 4 * np.finfo(dtype).eps * (
        1 + np.abs(value)
    )
    np.testing.assert_array_less(
        np.abs(got[0] - value)[clear], allowed[clear], strict=False
    )


@pytest.fixture(scope="module")
def cp():
    """CuPy, where there is a device."""
    with warnings.catch_warnings(action="ignore"):
        cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    return cupy


@pytest.fixture(scope="module")
def gpu(cp):
    kernels = {op.__name__: op.kernel("gpu") for op in OPS}
    return SimpleNamespace(asarray=cp.asarray, asnumpy=cp.asnumpy, **kernels)


@pytest.mark.gpu
# a first run on a device must not fail for a warning of another package
@pytest.mark.filterwarnings("default")
class TestDevice(BodyLaws):
    def test_arrays_of_cupy_choose_the_kernels(self, cp):
        (x,) = problem(np.float32, (4, 2))
        options = {"parent": np.zeros(1, int), "coordinate": np.zeros(1, int)}
        assert isinstance(monomials(cp.asarray(x), **options), cp.ndarray)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_exact_attention_end_to_end(self, cp, dtype, is_causal):
        query, key, value = problem(dtype, (2, 300, 8), (2, 300, 8), (2, 300, 5))
        options = {"method": fastattn.Exact(), "is_causal": is_causal, "rng": 0}
        got = fastattn.approximate(*map(cp.asarray, (query, key, value)), **options)
        want = fastattn.approximate(query, key, value, **options)
        assert isinstance(got.value, cp.ndarray)
        slack = attend_roundoff(query, key, value)
        np.testing.assert_allclose(
            cp.asnumpy(got.value), want.value, rtol=0, atol=slack
        )

    @pytest.mark.parametrize("guarantee", ["sampled", "proven"])
    def test_polynomial_end_to_end(self, cp, guarantee):
        query, key, value = problem(np.float32, (2000, 8), (2000, 8), (2000, 5))
        options = {"tol": 1e-2, "guarantee": guarantee, "rng": 0}
        got = fastattn.approximate(
            *map(cp.asarray, (query, key, value)),
            method=fastattn.Polynomial(),
            **options,
        )
        exact = fastattn.approximate(query, key, value, method=fastattn.Exact(), rng=0)
        error = cp.asnumpy(got.value) - exact.value
        assert isinstance(got.value, cp.ndarray)
        if guarantee == "proven":
            assert np.abs(error).max() <= got.certificate.error
        else:
            relative = np.linalg.norm(error) / np.linalg.norm(exact.value)
            assert relative <= got.certificate.error <= 1e-2
