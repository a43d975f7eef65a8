"""Brackets of the numerical rank hold whatever the basis, and are narrow."""

import numpy as np
import pytest

from lowerbounds import _spectra, threshold_sweep
from lowerbounds._factored import Factors
from lowerbounds._spectra import numerical_ranks
from tests.lowerbounds.matrices import factors, softmax_matrix

ERRORS = (0.3, 1e-1, 1e-2, 1e-3)


def ranks(matrix, errors):
    """Least ranks from the definition: all singular values."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return [int(np.argmax(tails <= len(matrix) * x**2)) for x in errors]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("exponent", [0.5, 8.0, 60.0])
def test_small_matrices_have_the_rank_of_their_singular_values(order, exponent):
    given = factors(order, 24, 5)
    want = ranks(softmax_matrix(given, exponent), ERRORS)
    found = numerical_ranks(given, exponent, ERRORS, 4096)
    assert found == [(rank, rank) for rank in want]


@pytest.mark.parametrize("largest", [0, 4096])
@pytest.mark.parametrize("exponent", [1.0, 12.0, 40.0, 400.0])
def test_brackets_hold_the_rank(largest, exponent, monkeypatch):
    monkeypatch.setattr(_spectra, "_SMALL", 0)
    given = factors(2, 96, 6)
    want = ranks(softmax_matrix(given, exponent), ERRORS)
    found = numerical_ranks(given, exponent, ERRORS, largest)
    for (low, high), rank in zip(found, want, strict=True):
        assert low <= rank <= high <= 96
        # a basis of all columns leaves nothing open
        assert high - low <= max(1, 0.05 * high) or largest == 0


@pytest.mark.parametrize("size", [1, 6, 48, 96])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_brackets_hold_for_the_worst_of_bases(size, decay):
    # columns that see the smallest singular values first
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.standard_normal((96, 96)))[0] for _ in range(2)]
    singular = np.arange(1, 97.0) ** -decay
    matrix = (turns[0] * singular) @ turns[1].T
    basis = turns[0][:, -size:]
    part = basis.T @ matrix
    squares, total = np.linalg.eigvalsh(part @ part.T), float((matrix**2).sum())
    found = _spectra._brackets(squares, total, 96, ERRORS)
    for (low, high), rank in zip(found, ranks(matrix, ERRORS), strict=True):
        assert low <= rank <= high


def test_a_basis_of_half_the_columns_narrows_what_a_small_one_leaves_open(monkeypatch):
    monkeypatch.setattr(_spectra, "_SMALL", 0)
    given, sizes = factors(2, 160, 6), []
    captured = _spectra._captured

    def counted(matrix, size):
        sizes.append(size)
        return captured(matrix, size)

    monkeypatch.setattr(_spectra, "_captured", counted)
    numerical_ranks(given, 0.5, (1e-1,), 0)
    assert sizes == [10]
    ((low, high),) = numerical_ranks(given, 12.0, (1e-2,), 0)
    assert sizes == [10, 10, 80]
    assert 10 < low <= high < 160
    # all singular values where the matrix is not too large
    numerical_ranks(given, 12.0, (1e-2,), 160)
    assert sizes == [10, 10, 80, 10]


def test_no_factored_answer_beats_the_lower_end(monkeypatch):
    # the best matrix of a smaller rank errs by more for values of its own
    monkeypatch.setattr(_spectra, "_SMALL", 0)
    given, exponent, error = factors(2, 96, 6), 12.0, 0.02
    ((rank, _),) = numerical_ranks(given, exponent, (error,), 0)
    left, singular, right = np.linalg.svd(softmax_matrix(given, exponent))
    assert rank > 2
    for r in (1, rank // 2, rank - 1):
        off = (left[:, r:] * singular[r:]) @ right[r:]
        assert np.abs(off).sum(axis=1).max() > error


def test_extreme_logits_have_full_rank():
    # every query has most of its weight on a key of its own
    given = Factors(np.eye(8), (np.eye(8),), (np.ones(8),), 1.0)
    assert numerical_ranks(given, 1e4, (1e-3,), 4096) == [(8, 8)]


def test_large_matrices_are_left_out():
    rows = threshold_sweep(
        2,
        sizes=[8, 16],
        families=["bounded"],
        ratios=[1.0],
        largest_spectrum=8,
        largest_bracket=8,
        rng=0,
    )
    for row in rows:
        assert (row.numerical_rank is None) == (row.n == 16)
        assert (row.numerical_rank_most is None) == (row.n == 16)
