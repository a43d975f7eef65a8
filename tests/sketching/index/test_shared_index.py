"""Threads that share an index, and interrupts inside its verbs."""

import copy
import os
import pickle
import sys
import threading

import numpy as np
import pytest

import sketching
from sketching import (
    Adaptive,
    Exact,
    Filter,
    MahalanobisIndex,
    MahalanobisKMeans,
    MahalanobisKNeighborsClassifier,
    MahalanobisMetric,
)
from tests.sketching.mahalanobis_oracle import distances

FOLDER = os.path.dirname(sketching.__file__)
D = 6
X = np.random.default_rng(2).standard_normal((400, D))
Q = np.random.default_rng(3).standard_normal((5, D))
CERTAIN = Adaptive(rows=160, sketches=9, sampled=9)
MODES = [Exact(), Exact(half_width=True), Filter(size=3), CERTAIN]
EVERY = pytest.mark.parametrize("mode", MODES, ids=str)


def index_of(mode, n=200):
    index = MahalanobisIndex(MahalanobisMetric(np.eye(D)), mode=mode, eps=0.3, rng=0)
    index.insert(X[:n])
    for i in range(2):
        index.update_metric(0.5 * np.eye(D)[i], 0.3 * np.ones(D))
    return index


VERBS = {
    "query": lambda index: index.kneighbors(Q, 3),
    "insert": lambda index: index.insert(X[200:210]),
    "delete": lambda index: index.delete(index.numbers[:15]),
    "update_points": lambda index: index.update_points(index.numbers[:9], X[-9:]),
    "update_metric": lambda index: index.update_metric(np.ones(D), 0.2 * np.ones(D)),
    "redraw": lambda index: index.redraw(5),
    "copies": pickle.dumps,
}


def assert_whole(index):
    """Neighbours are those of the points and the factor that the index names."""
    points, numbers = index.points(), index.numbers
    assert len(index) == len(points) == len(np.unique(numbers))
    truth = distances(index.factor, Q, points)
    values, found = index.kneighbors(Q, 4)
    at = {int(number): i for i, number in enumerate(numbers)}
    places = np.array([[at[int(i)] for i in row] for row in found])
    own = np.take_along_axis(truth, places, axis=1)
    np.testing.assert_allclose(own, np.sort(truth, axis=1)[:, :4], rtol=2e-3)
    np.testing.assert_allclose(values, own, rtol=2e-3, atol=1e-6)
    answer = index.query(Q)
    off = np.abs(answer.value - truth)
    assert (off <= (float(answer.certificate.error) + 1e-6) * truth).all()
    np.testing.assert_array_equal(index.points(numbers), points)


def interrupted(call, line, events=("line",)):
    """Raise at the line of that number inside the package; False if it was not met."""
    left = [line]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event in events:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def lines_of(mode, verb):
    """How many lines a verb runs."""
    index, count = index_of(mode), [0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        count[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        verb(index)
    finally:
        sys.settrace(before)
    return count[0]


def interrupt_somewhere(mode, verb, rng, trials):
    """Interrupt a verb at random lines, each of them once."""
    most = lines_of(mode, verb)
    for line in 1 + rng.choice(most, min(trials, most), replace=False):
        index = index_of(mode)
        interrupted(lambda index=index: verb(index), int(line))
        assert_whole(index)
        # and it can be changed again
        index.delete(index.numbers[-3:])
        index.insert(X[300:305])
        assert_whole(index)


@EVERY
@pytest.mark.parametrize("name", VERBS)
def test_an_interrupt_leaves_the_old_index_or_the_new_one(mode, name, rng):
    interrupt_somewhere(mode, VERBS[name], rng, trials=12)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("name", VERBS)
def test_a_thousand_interrupts(mode, name, rng):
    interrupt_somewhere(mode, VERBS[name], rng, trials=40)


def test_an_interrupt_does_not_keep_the_lock():
    index, line = index_of(Exact()), 0
    for line in range(1, 400):
        interrupted(lambda: index.update_points([3], X[:1]), line)
    done = threading.Thread(target=lambda: index.insert(X[:1]), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()


def side_by_side(*calls):
    """Run calls in threads that begin together; raise what one of them raised."""
    barrier, errors = threading.Barrier(len(calls)), []

    def work(call):
        barrier.wait()
        try:
            call()
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    if errors:
        raise errors[0]


def read_and_write(mode, seed):
    """Readers find one of the indexes that there were, writers all happen."""
    index = index_of(mode)
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 2, D)) * 0.3
    factor = index.factor.copy()

    def read():
        for _ in range(3):
            values, numbers = index.kneighbors(Q, 3)
            assert (np.diff(values, axis=1) >= 0).all()
            assert all(len(set(row)) == 3 for row in numbers.tolist())
            assert index.query(Q).value.shape[0] == len(Q)

    def write():
        names = index.insert(X[200:220])
        index.delete(names[:5])
        index.update_points(names[5:9], X[300:304])

    def learn():
        for left, right in zip(a, b, strict=True):
            index.update_metric(left, right)

    side_by_side(read, read, write, learn)
    np.testing.assert_allclose(index.factor, factor + a.T @ b, rtol=1e-12, atol=1e-12)
    assert len(index) == 215
    assert_whole(index)


@EVERY
def test_threads_that_read_and_write(mode):
    for seed in range(8):
        read_and_write(mode, seed)


@pytest.mark.slow
@EVERY
def test_threads_that_read_and_write_for_long(mode):
    for seed in range(250):
        read_and_write(mode, seed)


@EVERY
def test_threads_that_only_read_apply_updates_once(mode):
    for _ in range(5):
        index = index_of(mode)
        side_by_side(*[lambda index=index: index.kneighbors(Q, 3)] * 4)
        assert_whole(index)


@EVERY
def test_a_reader_keeps_the_points_that_it_began_with(mode):
    index = index_of(mode)
    answers = index._engine.answers()
    before = answers.state.filled.kept(np.arange(200))
    index.delete(np.arange(50))
    index.update_points(np.arange(60, 80), X[300:320])
    index.insert(X[320:340])
    np.testing.assert_array_equal(answers.state.filled.kept(np.arange(200)), before)
    assert_whole(index)


@EVERY
def test_copies_go_their_own_way(mode):
    index = index_of(mode)
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        before = index.points()
        other.insert(X[200:230])
        other.delete(np.arange(20))
        np.testing.assert_array_equal(index.points(), before)
        index.insert(X[230:235])
        assert_whole(other)
        assert_whole(index)
        index.delete(index.numbers[-5:])


def test_a_bounded_number_of_answers_is_counted_once_each():
    mode = Adaptive(rows=160, sketches=9, sampled=9, queries=100)
    index = index_of(mode)
    side_by_side(*[lambda: [index.query(Q[:1]) for _ in range(25)]] * 4)
    with pytest.raises(sketching.RefusalError, match="100 of 100"):
        index.query(Q[:1])


def test_updates_of_a_metric_from_threads_are_all_there():
    metric = MahalanobisMetric(np.eye(D))

    def update():
        for _ in range(50):
            metric.update(np.ones(D), np.ones(D))

    side_by_side(*[update] * 4)
    np.testing.assert_array_equal(metric.factor, np.eye(D) + 200)


def test_a_factor_that_was_read_stays():
    metric = MahalanobisMetric(np.eye(D))
    metric.update(0, np.ones(D))
    before = metric.factor
    kept, other = before.copy(), copy.copy(metric)
    for _ in range(3):
        metric.update(1, np.ones(D))
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(other.factor, kept)


@pytest.mark.parametrize("line", [5, 20, 60, 110, 200])
def test_an_interrupted_fit_leaves_the_fit_before(line):
    y = (X[:, 0] > 0).astype(int)
    model = MahalanobisKNeighborsClassifier(3).fit(X[:100], y[:100])
    before = model.predict(X)
    if interrupted(lambda: model.fit(X[100:150, :3], y[100:150]), line):
        np.testing.assert_array_equal(model.predict(X), before)
    model = MahalanobisKNeighborsClassifier(3).fit(X[:100], y[:100])
    interrupted(lambda: model.partial_fit(X[100:150], y[100:150]), line)
    assert model.n_samples_fit_ in (100, 150)
    model.partial_fit(X[150:200], y[150:200])
    rows = np.r_[0 : model.n_samples_fit_ - 50, 150:200]
    _, numbers = model.index_.kneighbors(X[rows], 1)
    np.testing.assert_array_equal(numbers[:, 0], np.arange(len(rows)))
    np.testing.assert_array_equal(model._codes[: len(rows)], y[rows])
    clusters = MahalanobisKMeans(3, random_state=0).fit(X)
    before = clusters.predict(X)
    interrupted(lambda: clusters.partial_fit(X[:50] + 9), line)
    assert clusters.predict(X).shape == before.shape
