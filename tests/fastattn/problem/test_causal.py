"""Causal attention in chunks: rows attend to their prefix only, at every boundary."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from benches.cases import worst_points
from fastattn import Auto, Multipole, Polynomial, approximate, explain
from fastattn.certificates.certify import repaired
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import SharedSampling, certify_rows
from fastattn.methods.lowrank.causal_cost import causal_tolerance_factor
from fastattn.methods.lowrank.prefixes import lowrank_by_prefixes
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.multipole.method import configured_multipole
from fastattn.methods.polynomial.prefixes import moments_by_prefixes
from fastattn.planning import auto
from fastattn.problem import causal_chunks
from fastattn.problem.batch import Batch
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.laws import DTYPES

CHUNK = 32
BORDERS = (1, 31, 32, 33, 64, 65, 97, 129)
METHODS = {
    "hermite": Polynomial(degree=3, basis="hermite"),
    "landmarks": Polynomial(landmarks=40),
    "taylor": Polynomial(degree=4, basis="taylor"),
    "minimax": Polynomial(degree=4),
    "multipole": Multipole(),
    "auto": Auto(),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(causal_chunks, "_CHUNK", CHUNK)


def problem(n=200, m=None, d=3, p=4, spread=0.5, seed=0, dtype=np.float64, lead=()):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((*lead, n, d)) * spread
    key, value = (rng.standard_normal((*lead, m or n, x)) for x in (d, p))
    return tuple(x.astype(dtype) for x in (query, spread * key, value))


def head_of(*inputs, key_mask=None, scale=None):
    (head,) = Batch.of(*inputs, scale, True, key_mask).heads()
    return head.trimmed()


def lowrank_of(head, rank=60, landmarks=0):
    rng = np.random.default_rng(1)
    sample = PlanningSample.of(head.unmasked(), rng)
    return LowRank.plan(sample, rank=rank, landmarks=landmarks, rng=rng)


def assert_certified(inputs, method, tol, guarantee="sampled", **more):
    answer = approximate(
        *inputs, tol=tol, method=method, is_causal=True, guarantee=guarantee, rng=0,
        **more,
    )  # fmt: skip
    truth, normalizer = oracles.attention(*inputs, is_causal=True, **more)
    certificate = answer.certificate
    errors = oracles.error_in(certificate.norm, answer.value, truth)
    # a sampled certificate may be wrong once in twenty times
    proven = certificate.norm == "max"
    assert np.all(errors <= (certificate.error if proven else tol))
    seen = np.isfinite(normalizer)
    np.testing.assert_array_equal(np.isfinite(answer.log_normalizer), seen)
    np.testing.assert_array_equal(np.asarray(answer.value)[~seen], 0)
    off = np.abs(np.asarray(answer.log_normalizer)[seen] - normalizer[seen])
    assert off.max(initial=0) <= 0.1
    return answer


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("n", "m", "masked"),
    [(300, 300, False), (300, 120, False), (120, 300, False), (300, 300, True)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_the_certificate(method, n, m, masked, dtype):
    more = {}
    if masked:
        mask = np.random.default_rng(3).random(m) < 0.6
        mask[:5] = False
        more["key_mask"] = mask
    assert_certified(problem(n, m, dtype=dtype), method, 0.1, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", BORDERS)
@pytest.mark.parametrize("extra", [-20, 0, 45])
def test_bounds_are_kept_at_the_borders_of_chunks(n, extra, dtype):
    inputs = problem(n, max(1, n + extra), d=2, dtype=dtype)
    assert_certified(inputs, Polynomial(), 1e-2, "proven")


@pytest.mark.parametrize("spread", [0.2, 0.6])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_hold_for_any_prefix(spread, offset, dtype):
    query, key, value = problem(500, d=3, spread=spread, dtype=dtype)
    # what all keys share adds to the logits of a row, and to its log-sum-exp only
    inputs = query, key + dtype(offset), value
    answer = assert_certified(inputs, Polynomial(), 3e-2, "proven")
    assert answer.certificate.failure == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degree", [3, 5])
def test_bounds_hold_where_every_error_adds_up(dtype, degree):
    inputs = worst_points(700, np.random.default_rng(0), d=4)
    inputs = tuple(x.astype(dtype) for x in inputs)
    method = Polynomial(degree=degree)
    answer = assert_certified(inputs, method, 0.1, "proven", scale=1.0)
    truth, _ = oracles.attention(*inputs, is_causal=True, scale=1.0)
    # not vacuous: the attack comes within a hundred times of the bound
    error = oracles.largest_error(answer.value, truth)
    assert answer.certificate.error <= 100 * error


@pytest.mark.parametrize("method", ["hermite", "minimax", "multipole"])
def test_grouped_heads_broadcast(method):
    query, _, _ = problem(150, lead=(2, 3))
    _, key, value = problem(150, lead=(2, 1), seed=1)
    answer = assert_certified((query, key, value), METHODS[method], 0.2)
    assert answer.value.shape == (2, 3, 150, 4)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_library_and_dtype_follow_the_inputs(method, xp):
    inputs = problem(150)
    arrays = xp.asarrays(*inputs)
    answer = approximate(*arrays, tol=0.2, method=method, is_causal=True, rng=0)
    assert isinstance(answer.value, xp.array_type)
    truth, _ = oracles.attention(*inputs, is_causal=True)
    assert oracles.frobenius_error(np.asarray(answer.value), truth) <= 0.2


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_half_precision_stays_half(method):
    answer = assert_certified(problem(150, dtype=np.float16), method, 0.2)
    assert answer.value.dtype == np.float16
    assert answer.log_normalizer.dtype == np.float32


def runs():
    """Each method with its choices fixed: from a head to an answer."""
    head = head_of(*problem())
    whole = head.unmasked()
    expansion = METHODS["taylor"].configure(
        whole, 0.1, "sampled", np.random.default_rng(0)
    )
    halves = configured_multipole(head, 0.1, np.random.default_rng(0))
    yield "polynomials", partial(lowrank_by_prefixes, empty=lowrank_of(head))
    marks = lowrank_of(head, rank=1, landmarks=30)
    yield "landmarks", partial(lowrank_by_prefixes, empty=marks)
    yield "monomials", expansion.run
    yield "halves", halves.run


@pytest.mark.parametrize("name", ["polynomials", "landmarks", "monomials", "halves"])
@pytest.mark.parametrize("changed", [1, 40, 101, 199])
def test_later_keys_change_nothing(name, changed):
    run = dict(runs())[name]
    head = head_of(*problem())
    other = problem(seed=9)
    key, value = (
        np.concatenate([mine[:changed], 3 * theirs[changed:]])
        for mine, theirs in zip((head.key, head.value), other[1:], strict=True)
    )
    before, after = run(head), run(replace(head, key=key, value=value))
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[:changed], two[:changed])
    # and what they may change, they do
    assert np.abs(before[0][changed:] - after[0][changed:]).max() > 1e-3


@pytest.mark.parametrize("landmarks", [0, 30])
def test_the_last_row_is_that_without_a_mask(landmarks):
    head = head_of(*problem())
    empty = lowrank_of(head, landmarks=landmarks)
    prefixes = lowrank_by_prefixes(head, empty)
    whole = empty.insert(head.key, head.value).query(head.query)
    for one, two in zip(prefixes, whole, strict=True):
        np.testing.assert_allclose(one[-1], two[-1], rtol=1e-9)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_sums_may_come_in_several_panels(chunks, monkeypatch):
    head = head_of(*problem(1500))
    empty = lowrank_of(head, landmarks=20)
    together = lowrank_by_prefixes(head, empty)
    largest = chunks * empty.sums.nbytes
    monkeypatch.setattr("fastattn.problem.causal_chunks._LARGEST_PANEL", largest)
    for one, two in zip(lowrank_by_prefixes(head, empty), together, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9)


def test_early_keys_may_lie_elsewhere():
    # sums over a prefix are smaller than those over keys around the common mean
    query, key, value = problem(800, spread=0.3)
    key = key + 4 * np.linspace(-1, 1, len(key))[:, None]
    value = value + 1
    head = head_of(query, key, value)
    _, logarithm, reliable = lowrank_by_prefixes(head, lowrank_of(head, rank=200))
    _, truth = oracles.attention(query, key, value, is_causal=True)
    assert reliable.mean() > 0.98
    assert np.abs(logarithm - truth)[reliable].max() < 0.1


def test_far_keys_are_seen_by_the_rows_behind_them_only():
    query, key, value = problem(400)
    key[[50, 300]] *= 12
    head = head_of(query, key, value)
    empty = lowrank_of(head, rank=120)
    assert len(empty.insert(key, value).far_key)
    answer, _, reliable = lowrank_by_prefixes(head, empty)
    truth, _ = oracles.attention(query, key, value, is_causal=True)
    assert reliable.mean() > 0.9
    assert oracles.frobenius_error(answer[reliable], truth[reliable]) < 0.02


def test_keys_that_no_row_sees_are_not_looked_at():
    query, key, value = problem(100, 300)
    key[100:], value[100:] = 1e30, 1e30
    assert_certified((query, key, value), METHODS["hermite"], 0.1)


@pytest.mark.parametrize("method", ["hermite", "minimax", "multipole"])
def test_many_rows_may_see_no_key(method):
    query, key, value = problem(300)
    mask = np.arange(300) > 120
    # zeros are then outside the range of the values
    answer = assert_certified(
        (query, key, value + 9), METHODS[method], 0.1, key_mask=mask
    )
    assert np.all(answer.value[:121] == 0)


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_certificates_hold_at_their_rate(spread):
    inputs = problem(1500, d=4, spread=spread)
    method = Polynomial(degree=1, basis="hermite")
    truth, _ = oracles.attention(*inputs, is_causal=True)
    head, draws = head_of(*inputs), np.random.default_rng(0)
    configured = method.configure(head, 1e9, "sampled", draws)
    answer = repaired(head, configured, 1e9, SharedSampling(), draws)
    error = oracles.frobenius_error(answer.value, truth)

    def trial(rng):
        found = certify_rows(
            head,
            answer.value,
            1e-9,
            rng,
            exact_rows=answer.exact_rows,
            error_profile=answer.squares,
        )
        return error <= found.upper

    assert error > 1e-3
    assert_fails_rarely(trial, failure=FAILURE, trials=400, false_alarm=1e-6)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_causal_tolerance_factor_is_how_much_less_a_causal_head_errs(shift):
    query, key, value = problem(3000, d=8, p=16, spread=0.6)
    value = value + shift
    head = head_of(query, key, value)
    empty = lowrank_of(head, rank=9)
    errors = []
    for is_causal, answer in (
        (True, lowrank_by_prefixes(head, empty)),
        (False, empty.insert(key, value).query(query)),
    ):
        truth, _ = oracles.attention(query, key, value, is_causal=is_causal)
        errors.append(oracles.frobenius_error(answer[0], truth))
    wanted = errors[1] / errors[0]
    found = causal_tolerance_factor(head, np.random.default_rng(0))
    assert found == pytest.approx(wanted, rel=0.3)


def test_large_heads_are_planned_and_explained(monkeypatch):
    monkeypatch.undo()
    # the same choices on every processor
    monkeypatch.setattr(auto, "why_not", lambda _: "not here")
    inputs = problem(6144, d=64, p=64, spread=0.5, dtype=np.float32)
    answer = assert_certified(inputs, Auto(), 0.1)
    assert isinstance(answer.plan.method, Polynomial)
    found = explain(*inputs, tol=0.1, is_causal=True, rng=0)
    assert f"Polynomial(rank={answer.plan.method.rank}" in str(found)
    chosen = next(x for x in found.heads[0] if x.accepted)
    exact = found.heads[0][-1].plan
    assert chosen.plan.predicted_seconds < exact.predicted_seconds
    # half of the logits are hidden
    full = explain(*inputs, tol=0.1, rng=0).heads[0][-1].plan
    assert exact.predicted_seconds == pytest.approx(
        full.predicted_seconds / 2, rel=0.01
    )


def test_moments_of_a_prefix_are_its_sums():
    head = head_of(*problem())
    configured = METHODS["taylor"].configure(
        head, 0.1, "sampled", np.random.default_rng(0)
    )
    expansion = configured.run.__self__
    value, logarithm, _ = moments_by_prefixes(
        head, expansion.moments, expansion.coefficients
    )
    whole = expansion.moments(head).query(head.query[-1:], expansion.coefficients)
    np.testing.assert_allclose(value[-1:], whole[0], rtol=1e-9)
    np.testing.assert_allclose(logarithm[-1:], whole[1], rtol=1e-9)
