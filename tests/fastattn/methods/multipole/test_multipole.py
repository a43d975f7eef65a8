"""The multipole method: its ops, the laws of attention, inputs made to break it."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from fastattn import Multipole, RefusalError, approximate, load_sample
from fastattn._ops.multipole import BlockStatistics, describe, multipole
from fastattn.methods.multipole.method import configured_multipole
from fastattn.problem.head import Head
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.laws import Flat, MethodLaws, OpLaws, bring, fetch, skip_without


def spans(n, parts):
    return np.linspace(0, n, 1 + min(n, parts)).astype(int)


class TestDescribe(OpLaws):
    op = describe

    def inputs(self, rng, dtype, n, m):
        cuts = spans(n, 1 + m // 60)
        return [rng.standard_normal((n, 4)).astype(dtype)], {"cuts": cuts, "rows": 7}

    def slack(self, arrays, options):  # noqa: ARG002
        return (len(arrays[0]) + 16) * np.finfo(arrays[0].dtype).eps


class TestMultipoleOp(OpLaws):
    op = Flat(multipole, BlockStatistics, 1)
    threshold = 3e-3

    def inputs(self, rng, dtype, n, m):
        query, key, value = (rng.standard_normal(s) for s in ((n, 4), (m, 4), (m, 3)))
        key = key[np.argsort(key[:, 0])]
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        cuts, start = spans(n, 1 + n // 60), spans(m, 1 + m // 9)
        described = describe.reference(query, cuts=cuts, rows=16)
        metric = np.linspace(1.5, 0.5, 4).astype(dtype)
        options = {
            "cuts": cuts,
            "start": start,
            "group": np.arange(len(start) - 1) // 4,
            "threshold": self.threshold,
        }
        return [query, *described, key, value, metric], options

    def slack(self, arrays, options):  # noqa: ARG002
        # logits are up to 30, and are rounded as products and as sums of 9 features
        return (len(arrays[4]) + 2048) * np.finfo(arrays[0].dtype).eps

    def test_blocks_may_be_answered_for_a_few_rows(self, place):
        arrays, options = self.inputs(np.random.default_rng(0), np.float64, 300, 200)
        skip_without(place)
        kernel, cuts = self.op.kernel(place), options["cuts"]
        whole, _, _, counts = fetch(
            kernel(*[bring(place, x) for x in arrays], **options)
        )
        rows = np.concatenate([np.arange(lo, lo + 5) for lo in cuts[:-1]])
        arrays[0] = arrays[0][rows]
        options["cuts"] = 5 * np.arange(len(cuts))
        some, _, _, same = fetch(kernel(*[bring(place, x) for x in arrays], **options))
        np.testing.assert_allclose(some, whole[rows], atol=1e-12)
        np.testing.assert_array_equal(same, counts)


class TestMultipoleOpWithoutFarKeys(TestMultipoleOp):
    threshold = 0.0


class TestMultipoleOpWithoutNearKeys(TestMultipoleOp):
    threshold = 1e-1


def frobenius_slack(answer):
    """A relative Frobenius error bounds every entry, if loosely."""
    assert answer.certificate.norm == "relative-frobenius"
    error = np.max(answer.certificate.error)
    norms = np.linalg.norm(answer.value.astype(float), axis=(-2, -1))
    return error * np.max(norms) / (1 - error) + 1e-15


class SampledLaws(MethodLaws):
    scale_of_inputs = 1.0

    def slack(self, answer):
        value = np.asarray(answer.value)
        return frobenius_slack(
            answer
            if isinstance(answer.value, np.ndarray)
            else type(answer)(value, answer.certificate, None, None)
        )


class TestMultipole(SampledLaws):
    options = {"method": Multipole(), "tol": 2e-2}  # noqa: RUF012


class TestMultipoleOfFewClusters(SampledLaws):
    options = {"method": Multipole(clusters=3), "tol": 1e-3}  # noqa: RUF012


class TestMultipoleGivenAThreshold(SampledLaws):
    options = {"method": Multipole(7, 1e-3), "tol": 0.5}  # noqa: RUF012


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_tiny_problems_are_served(rng, n, m):
    query, key = 3 * rng.standard_normal((n, 4)), rng.standard_normal((m, 4))
    value = rng.standard_normal((m, 2))
    answer = approximate(query, key, value, method=Multipole(), rng=0)
    truth, _ = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= 1e-2


@pytest.mark.parametrize("kind", ["equal keys", "equal queries", "duplicates", "line"])
def test_inputs_without_spread_are_served(rng, kind):
    query, key, value = rng.standard_normal((3, 600, 6))
    if kind == "equal keys":
        key[:] = key[0]
    elif kind == "equal queries":
        query[:] = query[0]
    elif kind == "duplicates":
        key[:] = key[rng.integers(0, 9, 600)]
    else:
        key[:] = rng.standard_normal((600, 1)) * key[0]
    answer = approximate(query, key, value, method=Multipole(), rng=0)
    truth, _ = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= 1e-2


def hostile(kind, rng, n=1500, d=8):
    query, key, value = rng.standard_normal((3, n, d)).astype(np.float32)
    if kind == "one far key has the weight of some rows":
        key[11] = 30 * query[3] / np.linalg.norm(query[3])
        value[11] = 50
    elif kind == "one huge key":
        key[11] *= 1e3
    elif kind == "one huge query":
        query[11] *= 1e3
    elif kind == "huge logits":
        query *= 300
    elif kind == "opposite values side by side":
        key = np.repeat(key[: n // 20], 20, axis=0)
        key += 1e-2 * rng.standard_normal(key.shape).astype(np.float32)
        value = np.tile([[100.0], [-100.0]], (len(key) // 2, 1)).astype(np.float32)
    elif kind == "keys far from the origin":
        key += 1000
    return query, key, value


# answers of thirty, at a chosen threshold and at a given one
HOSTILE = {
    "one far key has the weight of some rows": (30, 30),
    "one huge key": (20, 20),
    "one huge query": (30, 0),
    "huge logits": (0, 0),
    "opposite values side by side": (30, 0),
    "keys far from the origin": (30, 0),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("method", [Multipole(), Multipole(threshold=1e-2)])
def test_no_answer_is_wrong_in_silence(kind, method):
    def trial(rng):
        query, key, value = hostile(kind, rng)
        try:
            answer = approximate(query, key, value, tol=0.05, method=method, rng=rng)
        except RefusalError as error:
            # any other reason is a fault
            reasons = "misses tol", "fails in", "no threshold", "within", "not finite"
            return None if any(x in str(error) for x in reasons) else False
        truth, _ = oracles.attention(query, key, value)
        error = oracles.frobenius_error(answer.value, truth)
        return error <= answer.certificate.error <= 0.05

    answers = HOSTILE[kind][method.threshold is not None]
    assert_fails_rarely(trial, failure=0.05, trials=30, answers=answers)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_leave_the_key_of_their_block_are_right(rng, dtype):
    # one key outweighs all others for the mean of a block, but not for every row
    query, key, value = rng.standard_normal((3, 4000, 16)).astype(dtype)
    key[7] = 60 * query[3] / np.linalg.norm(query[3])
    value[7] = 100
    method = Multipole(threshold=1e-2)
    answer = approximate(query, key, value, tol=0.05, method=method, rng=0)
    truth, log_sum = oracles.attention(query, key, value)
    assert oracles.frobenius_error(answer.value, truth) <= 0.01
    assert np.abs(answer.log_normalizer - log_sum).max() <= 0.2


def test_a_lower_threshold_errs_less(rng):
    query, key, value = rng.standard_normal((3, 900, 6))
    truth, _ = oracles.attention(query, key, value)
    errors = []
    for threshold in (1e-2, 1e-3, 1e-4):
        method = Multipole(threshold=threshold)
        answer = approximate(query, key, value, tol=1, method=method, rng=0)
        errors.append(oracles.frobenius_error(answer.value, truth))
    assert np.all(np.diff(errors) < 0)


def test_a_real_head_is_served_within_its_tolerance():
    query, key, value = load_sample("minilm-diffuse")
    answer = approximate(query, key, value, tol=0.05, method=Multipole(), rng=0)
    truth, log_sum = oracles.attention(query, key, value)
    error = oracles.frobenius_error(answer.value, truth)
    assert np.all(error <= answer.certificate.error)
    assert np.all(answer.certificate.error <= 0.05)
    assert np.abs(answer.log_normalizer - log_sum).max() < 1


def test_the_answer_does_not_depend_on_the_number_of_threads(rng):
    query, key, value = rng.standard_normal((3, 9000, 4)).astype(np.float32)
    method = Multipole(threshold=1e-3)
    answers = []
    for threads in (1, 4):
        with threadpool_limits(threads, user_api="blas"):
            answers.append(
                approximate(query, key, value, tol=1, method=method, rng=0).value
            )
    np.testing.assert_array_equal(*answers)


def test_certificates_of_a_real_head_fail_rarely():
    query, key, value = (x[0] for x in load_sample("minilm-diffuse"))
    truth, _ = oracles.attention(query, key, value)

    def trial(rng):
        try:
            answer = approximate(
                query, key, value, tol=0.05, method=Multipole(), rng=rng
            )
        except RefusalError as error:
            return None if "misses tol" in str(error) else False
        error = oracles.frobenius_error(answer.value, truth)
        return error <= answer.certificate.error

    assert_fails_rarely(trial, failure=0.05, trials=60)


def test_a_head_whose_blocks_spread_too_far_is_refused():
    query, key, value = load_sample("minilm-sharp")
    with pytest.raises(RefusalError, match=r"have a mean square of \d\.\d, too large"):
        approximate(query[1], key[1], value[1], tol=0.05, method=Multipole(), rng=0)


def test_a_sample_tells_of_clusters_that_are_of_no_use(rng):
    # normal rows of many dimensions have no similar ones, whatever the logits' size
    for spread in (1.0, 5.0):
        query, key, value = rng.standard_normal((3, 2048, 32))
        head = Head(spread * query, key, value, 32**-0.5)
        with pytest.raises(RefusalError, match=r"have a mean square of .* too large"):
            configured_multipole(head, 0.1, rng, limit=1e12)
    query, key, value = rng.standard_normal((3, 2048, 2))
    configured = configured_multipole(
        Head(query, key, value, 1.0), 0.1, rng, limit=1e12
    )
    assert isinstance(configured.plan.method, Multipole)


def test_a_missed_tolerance_is_refused_with_its_number(rng):
    query, key, value = rng.standard_normal((3, 900, 6))
    method = Multipole(threshold=0.01)
    with pytest.raises(RefusalError, match=r"misses tol=0\.001: \d\.\d\de"):
        approximate(query, key, value, tol=1e-3, method=method, rng=0)


def test_a_proof_is_refused_with_what_would_help(rng):
    query, key, value = rng.standard_normal((3, 10, 4))
    with pytest.raises(RefusalError, match="no proven bound: use guarantee='sampled'"):
        approximate(query, key, value, method=Multipole(), guarantee="proven")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clusters": 0}, "clusters: expected an integer >= 1, got 0"),
        ({"threshold": -1e-3}, "threshold: expected a number >= 0"),
        ({"threshold": np.nan}, "threshold: expected a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Multipole(**options)


def test_candidates_say_what_would_run_and_why_not(rng):
    query, key, value = rng.standard_normal((3, 500, 4))
    head = Head(query, key, value, 0.5)
    (taken,) = Multipole().candidates(head, 0.05, "sampled", rng)
    assert taken.accepted
    assert taken.plan.method.threshold > 0
    assert 0 < taken.plan.predicted_error <= 0.05
    assert taken.plan.predicted_seconds > 0
    (refused,) = Multipole().candidates(head, 0.05, "proven", rng)
    assert not refused.accepted
    assert "no proven bound" in refused.plan.reason


def test_work_beyond_the_limit_is_refused_before_anything_is_answered(rng):
    query, key, value = rng.standard_normal((3, 4000, 16))
    head = Head(query, key, value, 0.25)
    with pytest.raises(RefusalError, match=r"blocks of queries take .* the budget"):
        configured_multipole(head, 0.05, rng, limit=1.0)
    # few dimensions, where clusters are accurate
    head = Head(query[:, :6], key[:, :6], value, 0.4)
    with pytest.raises(RefusalError, match="near keys a row takes"):
        configured_multipole(head, 1e-6, rng, limit=7e8)


def test_a_configured_method_keeps_its_clusters(rng):
    query, key, value = rng.standard_normal((3, 500, 4))
    head = Head(query, key, value, 0.5)
    configured = configured_multipole(head, 0.05, rng)
    first, second = configured.run(head), configured.run(head)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_answers_that_underflow_are_refused():
    # only keys whose weights underflow have values
    query, key, value = np.ones((64, 1)), np.full((50, 1), -1261.0), np.ones((50, 1))
    key[0] = value[0] = 0
    with pytest.raises(RefusalError, match="no threshold gives"):
        approximate(query, key, value, scale=1.0, tol=0.1, method=Multipole(), rng=0)
