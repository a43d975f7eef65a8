"""Reductions decide right at the entry bound and to the error that they state."""

import functools
import math

import numpy as np
import pytest

import fastattn
from fastattn import RefusalError
from lowerbounds import (
    VectorInstance,
    amplify_gap,
    decide,
    from_cnf,
    gap_inner_product,
    least_dimension,
    orthogonal_vectors,
    random_formula,
    reduce_to_attention,
)
from tests import oracles
from tests.lowerbounds.formulas import solve

EXACT = functools.partial(fastattn.attention, method=fastattn.Exact())
EXACT_TENSOR = functools.partial(fastattn.tensor_attention, method=fastattn.Exact())
# of logits of up to a thousand, and of their sums
ROUNDING = 1e-9
SIZES = {2: 24, 3: 12, 4: 6}
# the problem, the order of attention and the construction
CASES = [
    (problem, order, construction)
    for order in SIZES
    for problem, constructions in (
        ("orthogonal", ("calibrated", "direct", "padded")),
        ("gap", ("calibrated", "padded")),
    )
    for construction in constructions
]
cases = pytest.mark.parametrize(("problem", "order", "construction"), CASES)


def draw(problem, order, seed):
    """One instance; every other one has a planted solution."""
    n, planted = SIZES[order], seed % 2 == 0
    if problem == "gap":
        return gap_inner_product(
            n, 96, parts=order, planted=planted, correlation=0.9, rng=seed
        )
    d = least_dimension(n, parts=order, expected=1e-3)
    return orthogonal_vectors(n, d, parts=order, planted=planted, rng=seed)


def exact(order):
    """Exact attention of the library for instances of an order."""
    return EXACT if order == 2 else EXACT_TENSOR


def output_of(made):
    return exact(made.order)(*made.arguments, scale=made.scale)


def underflows(problem, order, construction):
    """Whether the outputs are below what floating point holds."""
    return problem == "orthogonal" and construction == "padded" and order > 2


@cases
def test_every_reduction_decides_right(problem, order, construction):
    instances = [draw(problem, order, seed) for seed in range(60 if order < 4 else 20)]
    truths = [x.has_solution for x in instances]
    assert 0.4 < np.mean(truths) < 0.6
    if underflows(problem, order, construction):
        with pytest.raises(RefusalError, match="take decide_log"):
            decide(instances[0], exact(order), construction=construction)
    else:
        options = {"attention": exact(order), "construction": construction}
        assert [decide(x, **options) for x in instances] == truths
    # and in logarithms, which never underflow
    assert [decide(x, construction=construction) for x in instances] == truths


@cases
def test_the_stated_error_never_flips_an_answer_and_four_times_does(
    problem, order, construction
):
    for seed in range(10):
        made = reduce_to_attention(
            draw(problem, order, seed), construction=construction
        )
        truth = made.instance.has_solution
        # in units of the least output of a solution: 1 and near 0
        output = np.exp(made.log_output() - made.log_yes)
        between = 1 - math.exp(made.log_no - made.log_yes)
        threshold = math.exp(made.log_threshold - made.log_yes)
        error = (0.5 - 1e-6) * between
        against = -1 if truth else 1
        assert (output.max() + against * error > threshold) is np.bool(truth)
        assert (output.max() + against * 4 * error > threshold) is not np.bool(truth)
        if underflows(problem, order, construction):
            continue
        assert made.error == pytest.approx(error * math.exp(made.log_yes), rel=1e-5)
        output = output_of(made)
        assert made.decide(output + against * made.error) is truth
        assert made.decide(output + 4 * against * made.error) is not truth


@cases
def test_outputs_keep_the_bounds_that_the_threshold_rests_on(
    problem, order, construction
):
    for seed in range(10):
        made = reduce_to_attention(
            draw(problem, order, seed), construction=construction
        )
        log_output = made.log_output()[: made.rows]
        if made.instance.has_solution:
            assert log_output.max() >= made.log_yes - ROUNDING
        else:
            assert log_output.max() <= made.log_no + ROUNDING
        assert made.log_no < made.log_threshold < made.log_yes
        if not underflows(problem, order, construction):
            want = np.log(output_of(made)[: made.rows, 0])
            np.testing.assert_allclose(log_output, want, rtol=ROUNDING, atol=ROUNDING)


def test_the_worst_vectors_reach_the_bounds():
    # no pair is orthogonal and all have inner product 1: nothing is further from 0
    n, d = 40, 5
    worst = VectorInstance.from_vectors(np.eye(d)[[0] * n], np.eye(d)[[0] * n])
    solved = VectorInstance.from_vectors(np.eye(d)[[0] * n], np.eye(d)[[0] * n + [1]])
    for construction in ("calibrated", "direct", "padded"):
        made = reduce_to_attention(worst, construction=construction)
        largest = float(made.log_output()[: made.rows].max())
        assert largest <= made.log_no + ROUNDING
        if construction != "padded":
            assert largest == pytest.approx(made.log_no, abs=ROUNDING)
        made = reduce_to_attention(solved, construction=construction)
        least = float(made.log_output()[: made.rows].max())
        assert made.log_yes - ROUNDING <= least <= made.log_yes + 0.3


@pytest.mark.parametrize("order", SIZES)
def test_the_entry_bound_is_that_of_the_theory(order):
    n, d = SIZES[order], 50
    instance = orthogonal_vectors(n, d, parts=order, rng=0)
    real, whole = n ** (order - 1), (n + 1) ** (order - 1) - 1
    marks = order - 1 if order > 2 else 0
    direct = reduce_to_attention(instance, construction="direct")
    exponent = (d + marks) * math.log(4 * whole)
    assert direct.entry_bound == pytest.approx(exponent ** (1 / order))
    calibrated = reduce_to_attention(instance)
    exponent = 2 * (d + marks + 1) * math.log(4 * whole)
    assert calibrated.entry_bound == pytest.approx(exponent ** (1 / order))
    padded = reduce_to_attention(instance, construction="padded")
    exponent = 2 * order * d * math.log(2 ** (order + 1) * real)
    assert padded.entry_bound == pytest.approx(exponent ** (1 / order))
    for made in (direct, calibrated, padded):
        assert made.scale == 1 / made.query.shape[1]
        for x in (made.query, *made.keys):
            assert np.abs(x).max() <= made.entry_bound
        assert set(np.unique(np.concatenate(made.values))) == {0.0, 1.0}


def test_the_padded_layout_has_its_largest_logit_in_half_of_each_row():
    made = reduce_to_attention(draw("gap", 2, 0), construction="padded")
    logits = made.logits()
    largest = logits.max(axis=1, keepdims=True)
    assert (logits >= 0).all()
    assert (np.isclose(logits, largest).sum(axis=1) == logits.shape[1] / 2).all()


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("construction", ["calibrated", "direct"])
def test_tuples_of_padded_and_real_keys_stay_below(order, construction):
    made = reduce_to_attention(draw("orthogonal", order, 1), construction=construction)
    shape = [len(key) for key in made.keys]
    logits = made.logits().reshape(-1, *shape)
    padded = logits[(slice(None), *[-1] * len(shape))]
    real = logits[(slice(None), *[slice(-1)] * len(shape))]
    apart = padded.max() - math.log(4 * (math.prod(shape) - 1))
    for where in np.ndindex(*[2] * len(shape)):
        if 0 < sum(where) < len(shape):
            mixed = logits[(slice(None), *(slice(-1) if x else -1 for x in where))]
            assert mixed.max() <= apart + ROUNDING
    assert real.max() <= apart + ROUNDING


def test_sets_of_different_sizes_make_one_instance():
    rng = np.random.default_rng(0)
    sets = [(rng.random((n, 24)) < 0.6).astype(int) for n in (3, 9, 5)]
    instance = VectorInstance.from_vectors(*sets)
    for construction in ("calibrated", "direct", "padded"):
        assert (
            decide(instance, EXACT_TENSOR, construction=construction)
            is instance.has_solution
        )


@pytest.mark.parametrize("parts", [2, 3])
def test_random_formulas_are_decided_as_by_a_solver(parts):
    for seed in range(60):
        clauses = random_formula(12, rng=seed)
        assert decide(from_cnf(clauses, parts), exact(parts)) is solve(clauses)


@pytest.mark.parametrize("planted", [False, True])
def test_amplified_gaps_are_decided_one_by_one(planted):
    instance = orthogonal_vectors(12, 4, planted=planted, p=0.5, rng=4)
    if not planted:
        ones = np.ones((12, 1), int)
        sets = [np.hstack([x, ones])[:, 1:] for x in instance.vectors]
        instance = VectorInstance.from_vectors(*sets)
    gaps = amplify_gap(instance)
    assert any(decide(gap, EXACT) for gap in gaps) is planted


def test_any_callable_with_the_signature_of_attention_decides():
    def another(query, key, value, *, scale):
        return oracles.attention(query, key, value, scale=scale)[0]

    for seed in (0, 1):
        instance = draw("orthogonal", 2, seed)
        assert decide(instance, another) is instance.has_solution
        assert decide(reduce_to_attention(instance), another) is instance.has_solution


def test_an_output_too_small_for_its_dtype_is_refused():
    instance = orthogonal_vectors(24, 160, rng=0)
    made = reduce_to_attention(instance, construction="padded")
    assert made.threshold < 1e-250
    with pytest.raises(RefusalError, match="decide_log"):
        made.decide(np.exp(made.log_output()))
    with pytest.raises(RefusalError, match="decide_log"):
        decide(made, EXACT)
    # nor does exact attention answer: its own weights underflow
    with pytest.raises(RefusalError, match="underflows"):
        output_of(made)
    assert decide(made) is True
    # here float64 is enough, and float32 is not
    made = reduce_to_attention(draw("orthogonal", 2, 0), construction="padded")
    output = output_of(made)
    assert made.decide(output) is True
    with pytest.raises(RefusalError, match="float32 cannot tell numbers around 10"):
        made.decide(output.astype(np.float32))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.zeros((24, 2)), r"expected shape \(24, 1\), got \(24, 2\)"),
        (np.full(24, np.nan), "got 24 NaN or infinite, the first in row 0"),
        (np.r_[np.zeros(23), -np.inf], "the first in row 23"),
    ],
)
def test_an_output_that_cannot_be_read_is_named(output, message):
    made = reduce_to_attention(draw("orthogonal", 2, 0))
    with pytest.raises(ValueError, match=message):
        made.decide(output)


def test_zero_may_be_given_as_a_logarithm():
    made = reduce_to_attention(draw("orthogonal", 2, 0))
    assert made.decide_log(np.full(24, -np.inf)) is False


def test_what_cannot_be_reduced_is_named():
    with pytest.raises(ValueError, match="'direct' is for orthogonal vectors"):
        reduce_to_attention(draw("gap", 2, 0), construction="direct")
    with pytest.raises(ValueError, match="construction: expected one of"):
        reduce_to_attention(draw("gap", 2, 0), construction="other")
    with pytest.raises(TypeError, match="instance: expected a VectorInstance, got int"):
        reduce_to_attention(3)
    with pytest.raises(ValueError, match="order: expected 2, got 3"):
        reduce_to_attention(draw("gap", 3, 0)).key  # noqa: B018
