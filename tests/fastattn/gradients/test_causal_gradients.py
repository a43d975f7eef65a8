"""Derivatives of causal heads by a low rank: sums before rows, and behind keys."""

from dataclasses import replace

import numpy as np
import pytest

from fastattn import Exact, Polynomial, attention_vjp
from fastattn.costs.policy import POLICY
from fastattn.gradients import lowrank as lowrank_gradient
from fastattn.gradients.first_chunk import first_chunk
from fastattn.gradients.lowrank import lowrank_vjp, worth_a_try
from fastattn.gradients.lowrank_causal import causal_vjp
from fastattn.methods.lowrank.prefixes import lowrank_by_prefixes
from fastattn.methods.lowrank.rank_search import RankEstimate
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.problem import causal_chunks
from fastattn.problem.causal_chunks import cuts_of
from fastattn.problem.head import Head
from tests import oracles
from tests.derivatives import problem, softmax_vjp
from tests.laws import DTYPES


def causal(n=600, m=600, dtype=np.float32, seed=0):
    """A head of several chunks, once those are short, that a low rank serves."""
    return problem(n=n, m=m, d=4, p=5, spread=0.5, dtype=dtype, seed=seed)


@pytest.fixture
def short_chunks(monkeypatch):
    """Cut causal heads into chunks of a few keys."""
    monkeypatch.setattr(causal_chunks, "_CHUNK", 50)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("rank", "landmarks"), [(20, 0), (10, 8)])
@pytest.mark.parametrize("far", [False, True])
def test_causal_gradients_are_the_derivatives_of_the_answer(rank, landmarks, far):
    arrays = causal(190, 180, np.float64)
    *inputs, grad = arrays
    if far:
        inputs[1][[7, 60, 170]] *= 12
    head = Head(*inputs, 0.5, np.minimum(np.arange(190) + 1, 180))
    rng = np.random.default_rng(0)
    sample = PlanningSample.of(head.unmasked(), rng)
    empty = LowRank.plan(sample, rank=rank, landmarks=landmarks, rng=rng)
    gradients, state, _ = causal_vjp(head, grad, empty, np.zeros(190, bool))

    def answer(inputs):
        return lowrank_by_prefixes(replace(head, **inputs), empty)

    names = dict(zip(("query", "key", "value"), inputs, strict=True))
    value, normalizer, reliable = answer(names)
    assert reliable.all()
    np.testing.assert_allclose(state.normalizer, normalizer, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state.delta, np.sum(grad * value, axis=1), atol=1e-12)
    for (name, x), slope in zip(names.items(), gradients, strict=True):
        # some direction: all rows, keys and values are in it
        step = rng.standard_normal(x.shape) * np.abs(slope)
        more, less = (
            np.sum(grad * answer({**names, name: x + h * step})[0])
            for h in (1e-5, -1e-5)
        )
        np.testing.assert_allclose(
            np.sum(step * slope), (more - less) / 2e-5, rtol=1e-6, atol=1e-6
        )


@pytest.mark.usefixtures("short_chunks")
def test_outlier_rows_add_nothing_to_causal_gradients():
    *inputs, grad = causal(190, 190, np.float64)
    head = Head(*inputs, 0.5, np.arange(190) + 1)
    rng = np.random.default_rng(0)
    empty = LowRank.plan(PlanningSample.of(head, rng), rank=15, landmarks=0, rng=rng)
    outlier_mask = rng.random(190) < 0.4
    gradients, state, _ = causal_vjp(head, grad, empty, outlier_mask)
    np.testing.assert_array_equal(state.normalizer == np.inf, outlier_mask)
    np.testing.assert_allclose(gradients[0][outlier_mask], 0, rtol=0, atol=1e-300)
    rest = causal_vjp(head, grad * ~outlier_mask[:, None], empty, np.zeros(190, bool))[
        0
    ]
    for one, other in zip(gradients, rest, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", [np.float16, *DTYPES])
@pytest.mark.parametrize("sizes", [(600, 600), (700, 500), (500, 700), (60, 1)])
def test_causal_low_rank_keeps_three_times_the_tolerance(dtype, sizes):
    inputs = causal(*sizes, dtype)
    method = Polynomial(rank=70, basis="hermite")
    got = attention_vjp(*inputs, is_causal=True, method=method, tol=2e-2, rng=0)
    truth = softmax_vjp(*inputs, is_causal=True)
    for one, other in zip(got, truth, strict=True):
        assert one.dtype == dtype
        slack = 6e-2 * np.linalg.norm(other) + 1e-6
        assert np.linalg.norm(one.astype(float) - other) <= slack


@pytest.mark.usefixtures("short_chunks")
def test_causal_low_rank_takes_a_mask_of_keys():
    inputs = causal(dtype=np.float64)
    mask = np.random.default_rng(1).random(600) < 0.6
    # the first rows see no key
    mask[:5] = False
    options = {"is_causal": True, "key_mask": mask}
    method = Polynomial(rank=70, basis="hermite")
    got = attention_vjp(*inputs, method=method, tol=2e-2, rng=0, **options)
    truth = softmax_vjp(*inputs, **options)
    for one, other in zip(got, truth, strict=True):
        assert oracles.frobenius_error(one, other) <= 6e-2
    np.testing.assert_array_equal(got[0][:5], 0)
    np.testing.assert_array_equal(got[1][~mask], 0)


@pytest.mark.usefixtures("short_chunks")
def test_causal_low_rank_runs_in_every_library(xp):
    inputs = causal(400, 390, np.float64)
    method = Polynomial(rank=20, landmarks=8, basis="hermite")
    options = {"method": method, "tol": 0.3, "is_causal": True, "rng": 0}
    wanted = attention_vjp(*inputs, **options)
    got = attention_vjp(*xp.asarrays(*inputs), **options)
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, xp.array_type)
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-6, atol=1e-9)


def test_auto_takes_a_low_rank_for_causal_heads():
    query, key, value, grad = problem(n=8000, m=8000, d=32, p=32, dtype=np.float32)
    # as if there were four columns
    query[:, 4:], key[:, 4:] = 0, 0
    inputs = query, key, value, grad
    options = {"is_causal": True, "tol": 3e-2, "rng": 0}
    got = attention_vjp(*inputs, **options)
    truth = attention_vjp(*inputs, method=Exact(), **options)
    worst = max(oracles.frobenius_error(x, y) for x, y in zip(got, truth, strict=True))
    # not exact, and within the tolerance
    assert 1e-5 < worst <= 9e-2


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("first", [50, 130, 179])
def test_a_long_first_chunk_is_exact(first):
    *inputs, grad = causal(190, 180, np.float64)
    head = Head(*inputs, 0.5, np.minimum(np.arange(190) + 1, 180))
    rng = np.random.default_rng(0)
    # a constant serves no row
    empty = LowRank.plan(
        PlanningSample.of(head.unmasked(), rng), rank=1, landmarks=0, rng=rng
    )
    gradients, _, far = causal_vjp(head, grad, empty, np.zeros(190, bool), first)
    truth = softmax_vjp(*inputs, grad, is_causal=True)
    # rows see one key more than their number
    np.testing.assert_allclose(
        gradients[0][: first - 1], truth[0][: first - 1], rtol=1e-9
    )
    assert not np.allclose(gradients[0][first:], truth[0][first:], rtol=1e-3)
    # low-rank: only rows after the first chunk, over the keys of earlier chunks
    assert np.all(far[0][: first - 1] == 0)
    assert np.all(far[0][first:] != 0)
    assert np.all(far[1][:first] != 0)


class TestFirstChunks:
    """The length of the first chunk is chosen by a pilot run on few rows and keys."""

    @pytest.fixture(autouse=True)
    def _short_chunks(self, monkeypatch):
        monkeypatch.setattr(causal_chunks, "_CHUNK", 50)

    def problem(self, landmarks, seed=0):
        rng = np.random.default_rng(seed)
        query, key, value, grad = rng.standard_normal((4, 2000, 8))
        head = Head(query, key, value, 8**-0.5, np.arange(2000) + 1)
        sample = PlanningSample.of(head.unmasked(), rng)
        empty = LowRank.plan(sample, rank=1, landmarks=landmarks, rng=rng)
        return head, grad, empty, rng

    @pytest.mark.parametrize("seed", range(4))
    def test_the_error_is_near_what_was_predicted(self, seed):
        head, grad, empty, rng = self.problem(60, seed)
        arrays = head.query, head.key, head.value, grad
        truth = softmax_vjp(*arrays, is_causal=True, scale=head.scale)
        lengths = []
        for wanted in (0.5, 0.35, 0.25):
            first = first_chunk(head, grad, empty, wanted, rng)
            gradients = causal_vjp(head, grad, empty, np.zeros(2000, bool), first)[0]
            found = zip(gradients, truth, strict=True)
            error = max(oracles.frobenius_error(x, y) for x, y in found)
            assert error <= 1.3 * wanted
            lengths.append(first)
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[-1]

    def test_landmarks_are_tried_behind_one(self, monkeypatch):
        # as if all logits took as long as they do in long heads, and polynomials failed
        head, grad, _, rng = self.problem(60)
        nothing = RankEstimate(1, 0, np.inf, 0.0, "refused", None)
        for name, number in {
            "few_logits": 0,
            "many_logits": 0,
            "landmarks": 60,
        }.items():
            monkeypatch.setitem(vars(POLICY.gradients), name, number)
        for name, fake in {
            "search_ranks": lambda *_, **__: [nothing],
            "vjp_work": lambda *_: 1e12,
        }.items():
            monkeypatch.setattr(lowrank_gradient, name, fake)
        (candidate,) = worth_a_try(head, grad, 0.17, rng)
        assert (candidate.empty.rank, candidate.empty.landmarks) == (1, 60)
        assert candidate.first > cuts_of(2000)[1]
        error = lowrank_vjp(head, grad, candidate.empty, rng, 0.0, candidate.first)[1]
        assert error <= 3 * 0.17
        # a head whose rows all see all keys has no early rows
        assert worth_a_try(head.unmasked(), grad, 0.17, rng) == []

    def test_none_serves_what_is_out_of_reach(self):
        head, grad, empty, rng = self.problem(2)
        assert first_chunk(head, grad, empty, 1e-3, rng) is None
        huge = replace(head, query=1e200 * head.query)
        assert first_chunk(huge, grad, empty, 0.3, rng) is None


@pytest.mark.usefixtures("short_chunks")
def test_the_check_sees_what_is_wrong_in_causal_heads():
    *inputs, grad = causal(1500, 1500, np.float64)
    head = Head(*inputs, 0.5, np.arange(1500) + 1)
    truth = softmax_vjp(*inputs, grad, is_causal=True)
    for rank in (5, 15, 70):
        rng = np.random.default_rng(rank)
        empty = LowRank.plan(
            PlanningSample.of(head, rng), rank=rank, landmarks=0, rng=rng
        )
        gradients, seen = lowrank_vjp(head, grad, empty, rng)
        found = zip(gradients, truth, strict=True)
        worst = max(oracles.frobenius_error(x, y) for x, y in found)
        assert 0.8 * worst <= seen <= 4 * worst
