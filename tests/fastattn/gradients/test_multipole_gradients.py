"""Gradients by near keys and clusters: the op, its errors, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import Auto, Exact, Multipole, RefusalError, attention_vjp, load_sample
from fastattn._ops.cpu import multipole as cpu_multipole
from fastattn._ops.gradient import attend_vjp
from fastattn._ops.multipole import BlockStatistics, describe, multipole
from fastattn._ops.multipole_gradient import multipole_vjp
from fastattn.costs.policy import POLICY
from fastattn.gradients import multipole as multipole_gradient
from fastattn.gradients.multipole import cluster_vjp
from fastattn.problem.head import Head
from tests import oracles
from tests.derivatives import problem, slack_of, softmax_vjp
from tests.laws import DTYPES, Flat, OpLaws, bring


def spans(n, parts):
    return np.linspace(0, n, 1 + min(n, parts)).astype(int)


class TestMultipoleVjp(OpLaws):
    op = Flat(multipole_vjp, BlockStatistics, 1)
    threshold = 3e-3

    def inputs(self, rng, dtype, n, m):
        query, key, value, grad = (
            rng.standard_normal(s).astype(dtype)
            for s in ((n, 4), (m, 4), (m, 3), (n, 3))
        )
        key = key[np.argsort(key[:, 0])]
        cuts, start = spans(n, 1 + n // 60), spans(m, 1 + m // 9)
        described = describe.reference(query, cuts=cuts, rows=16)
        metric = np.linspace(1.5, 0.5, 4).astype(dtype)
        limit = np.full(n, np.inf, dtype)
        # rows that are to add nothing
        limit[3::7] = -1
        options = {
            "cuts": cuts,
            "start": start,
            "group": np.arange(len(start) - 1) // 4,
            "threshold": self.threshold,
        }
        return [query, *described, key, value, metric, grad, limit], options

    def slack(self, arrays, options):  # noqa: ARG002
        # logits are up to 30; the gradient of a key is a sum over all rows
        n, m = len(arrays[0]), len(arrays[4])
        return 4 * (n + m + 2048) * np.finfo(arrays[0].dtype).eps

    def test_rows_out_of_their_limit_add_nothing(self, place):
        arrays, options = self.inputs(np.random.default_rng(0), np.float64, 130, 90)
        found = self.op.kernel(place)(*[bring(place, x) for x in arrays], **options)
        out = arrays[-1] < 0
        np.testing.assert_array_equal(np.isposinf(found[3]), out)
        np.testing.assert_array_equal(found[0][out], 0)
        # as if they had not been there: the description of the blocks is the same
        cuts = np.concatenate(
            [[0], np.cumsum(np.add.reduceat(~out, options["cuts"][:-1]))]
        )
        for i in (0, 7, 8):
            arrays[i] = arrays[i][~out]
        rest = self.op.kernel(place)(
            *[bring(place, x) for x in arrays], **{**options, "cuts": cuts}
        )
        for one, other in zip(found[1:3], rest[1:3], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)

    def test_derivatives_are_linear_in_that_of_the_output(self, place):
        arrays, options = self.inputs(np.random.default_rng(4), np.float64, 130, 90)
        kernel, grad = self.op.kernel(place), arrays[7]

        def gradients(grad):
            arrays[7] = grad
            return kernel(*[bring(place, x) for x in arrays], **options)[:3]

        one, two, both = (
            gradients(grad),
            gradients(grad**2),
            gradients(2 * grad - 3 * grad**2),
        )
        for x, y, z in zip(one, two, both, strict=True):
            np.testing.assert_allclose(2 * x - 3 * y, z, rtol=0, atol=1e-11)


class TestMultipoleVjpWithoutFarKeys(TestMultipoleVjp):
    threshold = 0.0

    def test_near_keys_alone_are_exact(self, place):
        arrays, options = self.inputs(np.random.default_rng(1), np.float64, 130, 90)
        arrays[8][:] = np.inf
        query, key, value, grad = (arrays[i] for i in (0, 4, 5, 7))
        found = self.op.kernel(place)(*[bring(place, x) for x in arrays], **options)
        truth = attend_vjp.reference(
            query, key, value, grad, scale=1.0, prefix_lengths=None
        )
        for one, other in zip(found[:3], truth, strict=True):
            slack = slack_of(query, key, value, grad, scale=1.0)
            np.testing.assert_allclose(one, other, rtol=0, atol=slack)
        out, normalizer = oracles.attention(query, key, value, scale=1.0)
        np.testing.assert_allclose(found[3], normalizer, rtol=1e-12)
        np.testing.assert_allclose(found[4], np.sum(out * grad, axis=1), atol=1e-12)


class TestMultipoleVjpWithoutNearKeys(TestMultipoleVjp):
    threshold = 1e-1


class TestMultipoleVjpOfMiddleKeys(TestMultipoleVjp):
    def inputs(self, rng, dtype, n, m):
        arrays, options = super().inputs(rng, dtype, n, m)
        return arrays, {**options, "all_first_order": True}


@pytest.mark.parametrize("all_first_order", [False, True])
def test_queries_get_the_derivative_of_the_answer(monkeypatch, all_first_order):
    # in blocks as they are described
    if all_first_order:
        monkeypatch.setattr(cpu_multipole, "FIRST_ORDER", -1.0)
    case = TestMultipoleVjp()
    arrays, options = case.inputs(np.random.default_rng(3), np.float64, 70, 80)
    arrays[8][:] = np.inf
    options["threshold"] = 2e-2
    grad = arrays[7]
    got = TestMultipoleVjp.op(*arrays, **options, all_first_order=all_first_order)[0]

    def products(query):
        value = Flat(multipole, BlockStatistics, 1)(query, *arrays[1:7], **options)[0]
        return np.sum(value * grad, axis=1)

    for axis in range(4):
        step = np.zeros(4)
        step[axis] = 1e-5
        slope = (products(arrays[0] + step) - products(arrays[0] - step)) / 2e-5
        np.testing.assert_allclose(got[:, axis], slope, rtol=1e-5, atol=1e-7)


def errors(got, inputs, **options):
    truth = softmax_vjp(*inputs, **options)
    return [oracles.frobenius_error(x, y) for x, y in zip(got, truth, strict=True)]


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.integers(1, 5),
    p=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_a_threshold_of_zero_is_exact(n, m, d, p, seed, dtype):
    inputs = problem(n, m, d, p, seed, dtype)
    got = attention_vjp(*inputs, method=Multipole(3, 0.0), tol=1, rng=0)
    truth = softmax_vjp(*inputs)
    # coordinates of few rows may be turned by a map that is ill-conditioned
    slack = 1e3 * slack_of(*inputs)
    for one, other in zip(got, truth, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=slack)


def sharp(n=1500, m=1400, dtype=np.float32, spread=2.0):
    """A head whose rows see a few keys each."""
    return problem(n=n, m=m, d=4, p=5, spread=spread, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float16, *DTYPES])
@pytest.mark.parametrize("tol", [1e-2, 1e-1])
def test_clusters_keep_three_times_the_tolerance(tol, dtype):
    inputs = sharp(dtype=dtype)
    got = attention_vjp(*inputs, method=Multipole(), tol=tol, rng=0)
    assert max(errors(got, inputs)) <= 3 * tol


@pytest.mark.parametrize("name", ["minilm-diffuse", "minilm-sharp"])
def test_real_heads_keep_three_times_the_tolerance(name):
    query, key, value = (x[0] for x in load_sample(name))
    grad = np.random.default_rng(0).standard_normal(value.shape).astype(value.dtype)
    # what a loss sends back is no noise: it goes with the queries
    for change in (grad, np.tanh(query @ grad[: query.shape[1]])):
        inputs = query, key, value, change.astype(value.dtype)
        got = attention_vjp(*inputs, method=Multipole(), tol=5e-2, rng=0)
        assert max(errors(got, inputs)) <= 0.15


def test_lower_thresholds_err_less():
    inputs = sharp(dtype=np.float64)
    worst = []
    for threshold in (1e-2, 1e-3, 1e-4, 1e-5):
        method = Multipole(threshold=threshold)
        worst.append(
            max(errors(attention_vjp(*inputs, method=method, tol=1, rng=0), inputs))
        )
    assert np.all(np.diff(worst) < 0)
    assert worst[-1] < worst[0] / 20


def test_derivatives_are_those_of_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    *inputs, grad = sharp()
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in tensors))
    wanted = torch.autograd.grad(out, tensors, torch.tensor(grad).double()[None])
    got = attention_vjp(*inputs, grad, method=Multipole(), tol=2e-2, rng=0)
    for one, other in zip(got, wanted, strict=True):
        assert oracles.frobenius_error(one, other.numpy()) <= 6e-2


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
def test_any_scale_is_right(scale):
    inputs = sharp(600, 500, np.float64, 1.0)
    got = attention_vjp(*inputs, method=Multipole(), tol=1e-2, scale=scale, rng=0)
    truth = softmax_vjp(*inputs, scale=scale)
    for one, other in zip(got, truth, strict=True):
        slack = 3e-2 * np.linalg.norm(other) + 1e-12
        assert np.linalg.norm(one - other) <= slack


def test_clusters_run_in_every_library(xp):
    inputs = sharp(200, 190, np.float64, 1.0)
    options = {"method": Multipole(), "tol": 0.1, "rng": 0}
    wanted = attention_vjp(*inputs, **options)
    got = attention_vjp(*xp.asarrays(*inputs), **options)
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, xp.array_type)
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-6, atol=1e-9)


def test_masked_keys_have_no_derivative():
    inputs = sharp(600, 500, np.float64, 1.0)
    mask = np.random.default_rng(1).random(500) < 0.6
    options = {"method": Multipole(), "tol": 2e-2, "rng": 0}
    got = attention_vjp(*inputs, key_mask=mask, **options)
    assert max(errors(got, inputs, key_mask=mask)) <= 6e-2
    np.testing.assert_array_equal(got[1][~mask], 0)
    none = attention_vjp(*inputs, key_mask=np.zeros(500, bool), **options)
    for slope in none:
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("kind", ["huge query", "huge key", "far key", "equal keys"])
def test_hard_inputs_are_right_or_refused(kind):
    query, key, value, grad = sharp(dtype=np.float64)
    if kind == "huge query":
        query[7] *= 1e3
    elif kind == "huge key":
        key[5] *= 1e3
    elif kind == "far key":
        key[11], value[11] = 30 * query[3], 50
    else:
        key[:] = key[0]
    inputs = query, key, value, grad
    truth = softmax_vjp(*inputs)
    options = {"method": Multipole(), "tol": 2e-2, "rng": 0}
    if kind in ("huge query", "huge key"):
        with pytest.raises(RefusalError, match=r"a mean square of .*, too large"):
            attention_vjp(*inputs, **options)
        return
    got = attention_vjp(*inputs, **options)
    for one, other in zip(got, truth, strict=True):
        assert np.linalg.norm(one - other) <= 6e-2 * np.linalg.norm(other) + 1e-9


def test_a_threshold_that_misses_is_refused():
    method = Multipole(threshold=0.3)
    with pytest.raises(RefusalError, match=r"miss 3 . tol with tol=0.001"):
        attention_vjp(*sharp(), method=method, tol=1e-3, rng=0)


def test_what_clusters_do_not_serve_is_refused():
    with pytest.raises(RefusalError, match="are not proven: use Exact"):
        attention_vjp(*problem(), method=Multipole(), guarantee="proven")
    with pytest.raises(RefusalError, match=r"Multipole\(\) do not take is_causal"):
        attention_vjp(*problem(), method=Multipole(), is_causal=True)


def test_keys_that_are_alike_may_have_other_values():
    # no threshold makes them near, but the gradient of a key depends on its value
    query, key, value, grad = sharp(dtype=np.float64)
    key[::2] = key[3]
    inputs = query, key, value, grad
    got = attention_vjp(*inputs, method=Multipole(), tol=2e-2, rng=0)
    assert max(errors(got, inputs)) <= 6e-2


def test_an_int_makes_the_call_reproducible():
    options = {"method": Multipole(), "tol": 5e-2, "rng": 3}
    one, two = (attention_vjp(*sharp(), **options) for _ in range(2))
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, y)


def wide(n):
    """A head with peaked attention, and the width of real heads."""
    query, key, value, grad = problem(n=n, m=n, d=64, p=64, dtype=np.float32)
    query[:, 4:], key[:, 4:] = 0, 0
    # as if there were four columns
    return 16 * query, key, value, grad


def test_auto_takes_clusters_where_they_pay(monkeypatch):
    monkeypatch.setitem(vars(POLICY.multipole), "few_logits", 1 << 24)
    inputs = wide(6000)
    tried = []

    def noted(*args, **options):
        tried.append(cluster_vjp(*args, **options))
        return tried[-1]

    monkeypatch.setattr(multipole_gradient, "cluster_vjp", noted)
    got = attention_vjp(*inputs, tol=0.1, rng=0, method=Auto())
    ((gradients, error),) = tried
    assert 1e-4 < error <= 0.3
    for one, other in zip(got, gradients, strict=True):
        np.testing.assert_array_equal(one, other)
    exact = attention_vjp(*inputs, method=Exact())
    worst = [oracles.frobenius_error(x, y) for x, y in zip(got, exact, strict=True)]
    assert max(worst) <= 0.3


def test_auto_computes_exactly_what_fails_its_check(monkeypatch):
    monkeypatch.setitem(vars(POLICY.multipole), "few_logits", 1 << 24)
    # rounded products would come in between
    monkeypatch.setitem(vars(POLICY.gradients), "low_precision_tol", 1.0)
    inputs = wide(6000)
    tried = []

    def misses(*args, **options):
        gradients, error = cluster_vjp(*args, **options)
        tried.append(error)
        return gradients, 10 * error + 1

    monkeypatch.setattr(multipole_gradient, "cluster_vjp", misses)
    got = attention_vjp(*inputs, tol=0.1, rng=0)
    assert tried
    exact = attention_vjp(*inputs, method=Exact())
    for one, other in zip(got, exact, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threshold", [1e-2, 1e-3, 1e-4])
def test_the_check_sees_what_is_wrong(threshold):
    # it is an upper estimate: near the error, rarely below it
    query, key, value, grad = inputs = sharp(dtype=np.float64)
    head, truth = Head(query, key, value, 0.5), softmax_vjp(*inputs)
    for seed in range(3):
        gradients, seen = cluster_vjp(
            head,
            grad,
            1.0,
            np.random.default_rng(seed),
            method=Multipole(threshold=threshold),
        )
        worst = max(map(oracles.frobenius_error, gradients, truth))
        assert 0.9 * worst <= seen <= 4 * worst
