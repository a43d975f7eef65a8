"""Generators of vectors keep their laws, and their answers are the truth."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, chisquare

from fastattn import RefusalError
from lowerbounds import (
    VectorInstance,
    amplify_gap,
    expected_solutions,
    gap_inner_product,
    least_dimension,
    orthogonal_vectors,
)
from tests.chance import assert_fails_rarely


def products(instance):
    """Every generalised inner product, from the definition."""
    letters = "abcdef"[: instance.parts]
    formula = ",".join(f"{x}l" for x in letters) + "->" + letters
    return np.einsum(formula, *(x.astype(int) for x in instance.vectors))


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("planted", [False, True])
def test_the_answer_is_that_of_looking_at_every_tuple(parts, planted):
    answers = set()
    for seed in range(20):
        d = 4 if seed % 2 else 12
        instance = orthogonal_vectors(6, d, parts=parts, planted=planted, rng=seed)
        truth = bool((products(instance) == 0).any())
        assert instance.has_solution is truth
        answers.add(truth)
        if planted:
            assert products(instance)[instance.planted] == 0
        else:
            assert instance.planted is None
    assert answers == ({True} if planted else {False, True}) or parts > 2


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_bits_of_a_planted_tuple_follow_the_law(parts, p):
    d = 40000
    instance = orthogonal_vectors(2, d, parts=parts, p=p, rng=parts)
    chosen = [x[i] for x, i in zip(instance.vectors, instance.planted, strict=True)]
    counts, law = [], []
    for bits in itertools.product((0, 1), repeat=parts):
        ones = sum(bits)
        share = p**ones * (1 - p) ** (parts - ones) - (-1) ** (parts - ones) * p**parts
        met = np.all([x == bit for x, bit in zip(chosen, bits, strict=True)], axis=0)
        if share < 1e-12:
            assert met.sum() == 0
        else:
            counts.append(met.sum())
            law.append(share * d)
    assert chisquare(counts, law).pvalue > 1e-4


@pytest.mark.parametrize("parts", [2, 3])
def test_a_planted_vector_is_not_seen_from_its_density(parts):
    p, d = 0.4, 400

    def is_usual(rng):
        instance = orthogonal_vectors(3, d, parts=parts, p=p, rng=rng)
        ones = [
            int(x[i].sum())
            for x, i in zip(instance.vectors, instance.planted, strict=True)
        ]
        return binom.cdf(ones[-1], d, p) > 0.01 and binom.sf(ones[-1], d, p) > 0.01

    assert_fails_rarely(is_usual, failure=0.03)


def test_expected_solutions_is_the_mean_number():
    n, d, draws = 32, 16, 80
    found = [
        (products(orthogonal_vectors(n, d, planted=False, rng=seed)) == 0).sum()
        for seed in range(draws)
    ]
    spread = np.std(found) / math.sqrt(draws)
    assert abs(np.mean(found) - expected_solutions(n, d)) < 5 * spread


@pytest.mark.parametrize("parts", [2, 3])
def test_least_dimension_is_where_accidents_become_rare(parts):
    d = least_dimension(100, parts=parts, p=0.4, expected=1e-3)
    at = expected_solutions(100, d, parts=parts, p=0.4)
    below = expected_solutions(100, d - 1, parts=parts, p=0.4)
    assert at <= 1e-3 < below


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("d", [128, 129])
def test_gap_instances_are_balanced_and_keep_their_gap(parts, planted, d):
    for seed in range(5):
        instance = gap_inner_product(
            12, d, parts=parts, planted=planted, correlation=0.9, rng=seed
        )
        assert all((x.sum(axis=1) == d // 2).all() for x in instance.vectors)
        found = products(instance)
        assert instance.has_solution is planted
        if planted:
            assert found[instance.planted] == instance.yes
            found[instance.planted] = 0
        assert found.max() == instance.no < instance.yes


def test_a_single_tuple_has_a_gap_to_nothing():
    instance = gap_inner_product(1, 32, rng=0)
    assert (instance.no, instance.planted) == (0, (0, 0))


def test_gap_instances_need_room():
    with pytest.raises(ValueError, match="d: 8 coordinates are too few"):
        gap_inner_product(200, 8, rng=0)


@pytest.mark.parametrize(("field", "block", "d"), [(7, 2, 4), (5, 1, 2), (7, 3, 5)])
def test_an_amplified_gap_answers_the_same_question(field, block, d):
    for seed in range(10):
        instance = orthogonal_vectors(
            5, d, planted=bool(seed % 2), p=0.5 if seed % 2 else 0.8, rng=seed
        )
        gaps = amplify_gap(instance, field=field, block=block)
        assert len(gaps) == field ** (block - 1)
        tables = np.array([products(gap) for gap in gaps])
        orthogonal = products(instance) == 0
        # a pair passes all checks of exactly one advice, or few of every one
        np.testing.assert_array_equal((tables == field).sum(axis=0), orthogonal)
        assert tables[tables != field].max(initial=0) <= 2 * (block - 1) == gaps[0].no
        assert any(gap.has_solution for gap in gaps) is instance.has_solution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field": 9}, "prime, got 9"),
        ({"field": 2}, "prime above 2"),
        ({"field": 5, "block": 4}, "prime above 6"),
        ({"block": 0}, "block"),
    ],
)
def test_an_amplifier_that_would_not_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        amplify_gap(orthogonal_vectors(3, 4, rng=0), **options)


def test_an_amplifier_that_would_not_fit_is_refused():
    with pytest.raises(RefusalError, match=r"20 blocks make 23\^21 coordinates"):
        amplify_gap(orthogonal_vectors(3, 40, rng=0), field=23)


def test_only_orthogonal_pairs_are_amplified():
    with pytest.raises(ValueError, match="3 sets"):
        amplify_gap(orthogonal_vectors(3, 4, parts=3, rng=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: expected an integer >= 1"),
        ({"d": 0}, "d: expected an integer >= 1"),
        ({"parts": 1}, "parts: expected an integer >= 2"),
        ({"p": 0.6}, "p: expected at most 0.5"),
        ({"p": 1.0, "planted": False}, "p: expected a number below 1"),
        ({"p": 0}, "p: expected a number above 0"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonal_vectors(**{"n": 4, "d": 4, "rng": 0} | arguments)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((np.eye(2),), "at least 2 sets"),
        ((np.eye(2), np.eye(3)), "expected 2 columns"),
        ((np.eye(2), 2 * np.eye(2)), "0 and 1 only"),
        ((np.eye(2), np.zeros((0, 2))), "non-empty"),
    ],
)
def test_bad_sets_are_named(sets, message):
    with pytest.raises(ValueError, match=message):
        VectorInstance.from_vectors(*sets)


def test_a_planted_tuple_must_be_orthogonal():
    with pytest.raises(ValueError, match="not orthogonal"):
        VectorInstance.from_vectors(np.eye(2), np.eye(2), planted=(0, 0))
    assert VectorInstance.from_vectors(np.eye(2), np.eye(2), planted=(0, 1)).planted
