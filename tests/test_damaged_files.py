"""Damaged and crafted files of every kind are read or refused in one line."""

import pytest

from benches.damaged_files import KINDS, MOST, run_apart


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(kind):
    check(run_apart(kind, 60, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files_are_read_or_refused_in_one_line(kind):
    check(run_apart(kind, 2000))


def check(row):
    assert row["worse"] == 0, row["the first of these"]
    assert row["read"] + row["refused in one line"] == row["files"]
    assert row["refused in one line"] > row["files"] / 10
    assert row["files left behind"] == 0
    assert 1e6 * row["MB, most"] < MOST
