"""The promise itself: what a certificate claims is so.

Sampled certificates hold at the rate that they claim, by exact binomial bounds over
seeds. Proven ones hold on inputs made to break them, and are not vacuous.
"""

import re

import numpy as np
import pytest

from fastattn import Polynomial, approximate, load_sample
from fastattn.certificates.certify import repaired
from fastattn.certificates.ratio_estimate import FAILURE
from fastattn.certificates.sampled import SharedSampling, certify_rows
from fastattn.methods.polynomial.expansions import relative_minimax
from fastattn.problem.batch import Batch
from tests import oracles
from tests.chance import assert_fails_rarely
from tests.laws import roundoff
from tests.pairwise import pairwise

PROVEN = {"guarantee": "proven", "rng": 0}
# small enough that one promise in a hundred may not be missed, rare enough to trust
ALARM = 1e-6


def sample_head(name, head, rows=1024):
    return tuple(x[head, :rows] for x in load_sample(name))


def gaussian(seed, n, spread, d=6):
    return tuple(np.random.default_rng(seed).standard_normal((3, n, d)) * spread)


BASES = "minimax", "taylor", "hermite"
REAL = {
    "diffuse 0": ("minilm-diffuse", 0),
    "diffuse 1": ("minilm-diffuse", 1),
    "mixed 0": ("minilm-mixed", 0),
    "mixed 1": ("minilm-mixed", 1),
    "mixed 5": ("minilm-mixed", 5),
}


def assert_certified(inputs, method, trials=400):
    """Certificates of one answer, drawn anew ``trials`` times, rarely lie."""
    truth, _ = oracles.attention(*inputs)
    (head,) = Batch.of(*inputs, None, False, None).heads()
    draws = np.random.default_rng(0)
    configured = method.configure(head, 1e9, "sampled", draws)
    answer = repaired(head, configured, 1e9, SharedSampling(), draws)
    error = oracles.frobenius_error(answer.value, truth)

    def trial(rng):
        drawn = certify_rows(
            head,
            answer.value,
            1e-9,
            rng,
            exact_rows=answer.exact_rows,
            error_profile=answer.squares,
        )
        return error <= drawn.upper

    assert_fails_rarely(trial, failure=FAILURE, trials=trials, false_alarm=ALARM)


@pairwise("head, rank, basis", REAL, [16, 128, 512], BASES)
def test_sampled_certificate_holds_at_its_rate_on_real_heads(head, rank, basis):
    # a basis that is fitted to the queries has a rank and no degree
    degree = None if basis == "hermite" else 4
    method = Polynomial(degree=degree, rank=rank, basis=basis)
    assert_certified(sample_head(*REAL[head]), method, trials=200)


@pairwise("spread, degree, basis", [0.2, 0.5], [2, 4], BASES)
def test_sampled_certificate_holds_at_its_rate_on_gaussian_heads(spread, degree, basis):
    method = Polynomial(degree=degree, basis=basis)
    assert_certified(gaussian(1, 600, spread), method)


GUESSES = {
    "right": lambda squares, rng: squares,  # noqa: ARG005
    "noisy": lambda squares, rng: squares * rng.chisquare(2, len(squares)),
    "of no use": lambda squares, rng: rng.chisquare(1, len(squares)),
    "upside down": lambda squares, rng: 1 / (squares + 1e-9),  # noqa: ARG005
    "zero": lambda squares, rng: 0 * squares,  # noqa: ARG005
    "not finite": lambda squares, rng: np.where(
        rng.random(len(squares)) < 0.1, np.inf, squares
    ),
    "one row": lambda squares, rng: squares == squares.max(),  # noqa: ARG005
}


def with_errors(tail):
    """A head, and errors of its rows whose sizes follow a log-normal law."""
    rng = np.random.default_rng(3)
    inputs = gaussian(2, 1500, 0.5)
    truth, _ = oracles.attention(*inputs)
    off = rng.standard_normal(truth.shape)
    off *= np.exp(rng.standard_normal(len(off)) * tail)[:, None]
    off *= 0.05 * root(truth) / root(off)
    (head,) = Batch.of(*inputs, None, False, None).heads()
    return head, truth + off, np.sum(off**2, axis=1), 0.05


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("tail", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_certificate_holds_whatever_the_error_profile(guess, tail):
    head, value, squares, error = with_errors(tail)
    error_profile = GUESSES[guess](squares, np.random.default_rng(4))

    def draw(rng):
        exact_rows = np.zeros(0, int)
        return certify_rows(
            head, value, 1e-9, rng, exact_rows=exact_rows, error_profile=error_profile
        )

    def bounds_the_error(rng):
        return error <= draw(rng).upper

    def bounds_most_rows(rng):
        source = draw(rng).source
        share = float(re.search(r"least ([\d.]+)%", source)[1]) / 100
        largest = float(re.search(r"at most (\S+) of", source)[1])
        # both were rounded for print
        below = np.sqrt(squares) <= 1.005 * largest * np.abs(value).max()
        return np.mean(below) >= share - 5e-4

    for trial in (bounds_the_error, bounds_most_rows):
        assert_fails_rarely(trial, failure=0.05, trials=150, false_alarm=ALARM)


def test_a_right_error_profile_makes_the_margin_small():
    head, value, squares, error = with_errors(1.0)

    def excess(error_profile):
        rows = {"exact_rows": np.zeros(0, int), "error_profile": error_profile}
        seeds = np.random.default_rng(0).spawn(20)
        drawn = [certify_rows(head, value, 1e-9, rng, **rows) for rng in seeds]
        return np.median([x.upper for x in drawn]) / error

    assert excess(squares) < 1.2
    assert excess(None) > 1.4


@pytest.mark.parametrize("method", [Polynomial(degree=2), None])
@pytest.mark.parametrize("factor", [pytest.param(5.0, marks=pytest.mark.slow), 20.0])
def test_sampled_certificate_survives_one_huge_query(factor, method):
    def trial(rng):
        query, key, value = 0.4 * rng.standard_normal((3, 1100, 8))
        query[rng.integers(1100)] *= factor
        inputs = [x.astype(np.float32) for x in (query, key, value)]
        # of a tolerance that both methods meet
        return holds(inputs, method=method, tol=0.2, rng=rng)

    assert_fails_rarely(trial, failure=0.05, trials=25, false_alarm=ALARM)


@pytest.mark.parametrize("tol", [0.3, 0.1])
@pytest.mark.parametrize("name", ["minilm-diffuse", "minilm-sharp"])
def test_sampled_certificate_of_auto_holds_at_its_rate(name, tol):
    inputs = sample_head(name, 1, rows=2048)
    truth, _ = oracles.attention(*inputs)

    def trial(rng):
        answer = approximate(*inputs, tol=tol, rng=rng)
        error = oracles.frobenius_error(answer.value, truth)
        assert answer.certificate.error <= tol
        return error <= answer.certificate.error

    assert_fails_rarely(trial, failure=0.05, trials=20, false_alarm=ALARM)


def holds(inputs, **options):
    """Whether the realised error is within the certificate.

    A sampled certificate is given the rounding of the rows that it compares with.
    """
    scale = options.get("scale")
    answer = approximate(*inputs, **options)
    many = inputs[0].shape[0] > 500
    precise = np.float64 if many else np.longdouble
    truth, _ = oracles.attention(*inputs, scale=scale, dtype=precise)
    certificate = answer.certificate
    if certificate.norm == "max":
        return bool(oracles.largest_error(answer.value, truth) <= certificate.error)
    off = np.asarray(answer.value).astype(truth.dtype) - truth
    dtype = np.float64 if inputs[0].dtype == np.float64 else np.float32
    slack = roundoff(*inputs, scale, dtype) if certificate.failure else 0.0
    allowed = certificate.error * root(truth) + slack * truth.size**0.5
    return bool(root(off) <= allowed)


def root(x):
    """Frobenius norm of any precision and any magnitude."""
    peak = np.abs(x).max()
    return peak * np.sqrt(np.sum((x / peak) ** 2)) if 0 < peak < np.inf else peak


def test_a_sample_of_all_rows_leaves_nothing_to_chance():
    inputs = gaussian(0, 100, 0.5)
    answer = approximate(*inputs, tol=1, method=Polynomial(2), rng=0)
    truth, _ = oracles.attention(*inputs)
    error = oracles.frobenius_error(answer.value, truth)
    assert error <= answer.certificate.error <= 1.1 * error / (1 - error)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sampled_certificate_counts_the_rounding_of_its_truth(dtype):
    # the polynomial of constant keys is exact: what is left is rounding on both sides
    query, key, value = (x.astype(dtype) for x in gaussian(6, 50, 0.4, d=3))
    key[:] = key[0]
    answer = approximate(query, key, value, method=Polynomial(2), rng=0)
    truth, _ = oracles.attention(query, key, value, dtype=np.longdouble)
    error = oracles.frobenius_error(answer.value, truth.astype(float))
    assert error <= answer.certificate.error


def test_sampled_certificate_is_not_vacuous():
    inputs = sample_head("minilm-diffuse", 1)
    answer = approximate(
        *inputs, tol=1e9, method=Polynomial(None, 512, 0, "hermite"), rng=0
    )
    truth, _ = oracles.attention(*inputs)
    error = oracles.frobenius_error(answer.value, truth)
    assert answer.certificate.error <= 4 * error


def worst_points(degree, bound):
    """The two largest logits where the polynomial errs by its whole error."""
    coefficients, _ = relative_minimax(degree, bound)
    x = bound * np.linspace(-1, 1, 40001)
    error = oracles.relative_error_of_exp(coefficients, x)
    runs = np.split(np.arange(len(x)), np.flatnonzero(np.diff(np.sign(error))) + 1)
    peaks = [run[np.argmax(np.abs(error[run]))] for run in runs]
    return x[peaks[-2]], x[peaks[-1]]


def adversarial(degree, bound, many=20000):
    """A head of d=1 whose logits sit at the worst points, with opposite values.

    Errors of opposite sign meet values of opposite sign and equal total weight. Keys
    at ``-bound``, of little weight, put the mean at zero, so that centring is idle.
    """
    points = np.array(worst_points(degree, bound))
    counts = np.round(many * np.exp(-points) / np.exp(-points).sum()).astype(int)
    ballast = round(counts @ points / bound)
    key = np.repeat([*points, -bound], [*counts, ballast])
    value = np.repeat([1.0, -1.0, 0.0], [*counts, ballast])
    return np.array([[1.0], [-1.0]]), key[:, None], value[:, None]


@pytest.mark.parametrize(("degree", "bound"), [(2, 1.0), (4, 2.0), (3, 1.0), (6, 4.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proven_bound_holds_at_the_worst_points(degree, bound, dtype):
    inputs = [x.astype(dtype) for x in adversarial(degree, bound)]
    method = Polynomial(degree=degree)
    answer = approximate(*inputs, scale=1.0, tol=10, method=method, **PROVEN)
    truth, _ = oracles.attention(*inputs, scale=1.0)
    error = oracles.largest_error(answer.value, truth)
    assert error <= answer.certificate.error
    assert answer.certificate.error <= 10 * error
