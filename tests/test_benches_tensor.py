"""The studies of tensor attention whose answers are no matter of time."""

from benches import tensor


def test_entries_that_a_rank_serves_fall_with_the_order():
    rows = tensor.tensor_order(quick=True)
    for row in rows:
        two, three, four = (row[f"entries, order {k}"] for k in (2, 3, 4))
        assert two > three > four > 1
    # more monomials serve larger entries
    ranks, entries = (
        [row[name] for row in rows] for name in ("rank", "entries, order 3")
    )
    assert ranks == sorted(ranks)
    assert entries == sorted(entries)


def test_bisection_finds_the_largest_that_is_served():
    assert abs(tensor._largest(lambda x: x <= 1.3, 4.0) - 1.3) < 2e-3
