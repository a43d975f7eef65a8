"""The example of a learned metric: it runs, improves, and is never out of date."""

EXAMPLE = "learned_metric"


def test_the_index_follows_the_learner(example, capsys):
    assert example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == example.ROUNDS + 1
    assert all("as from an index built anew" in line for line in lines)


def test_answers_improve_whatever_the_stream(example):
    first, *_, last = (share for share, _ in example.stream(1))
    assert last > 2 * first


def test_recall_counts_what_was_wanted(example):
    assert example.recall([{1, 2}, {3, 4}], [{1, 2}, {3, 5}]) == 0.75
