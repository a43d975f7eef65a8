"""Online learners: steps against their definitions, their promises, what follows."""

import numpy as np
import pytest

from sketching import (
    HingeGradient,
    Itml,
    Lego,
    MahalanobisIndex,
    MahalanobisMetric,
    Pola,
)


def psd(rng, d, rank=None):
    """A factor of condition about 10."""
    k = rank or d
    u = np.linalg.qr(rng.standard_normal((d, d)))[0][:k]
    return np.geomspace(1, 0.3, k)[:, None] * u


def lego(A, z, target, rate):
    """LEGO in A, as the paper has it."""
    # the root of the paper's formula cancels at large rates
    old = np.longdouble(z @ A @ z)
    c = rate * target * old - 1
    new = (c + np.sqrt(c**2 + 4 * rate * old**2)) / (2 * rate * old)
    image = A @ z
    # y bar - y is what the step leaves of the error
    share = float(rate * (new - target) / (1 + rate * (new - target) * old))
    return A - share * np.outer(image, image)


def itml(A, z, sign, slack, state):
    """One projection of ITML's algorithm 1; returns A, multiplier and bound."""
    multiplier, bound = state
    p = z @ A @ z
    alpha = min(multiplier, sign * slack / (slack + 1) * (1 / p - 1 / bound))
    beta = sign * alpha / (1 - sign * alpha * p)
    bound = slack * bound / (slack + sign * alpha * bound)
    image = A @ z
    return A + beta * np.outer(image, image), (multiplier - alpha, bound)


def pola(A, z, sign, threshold, floor):
    """POLA: a projection on the hinge's half space, then on the cone."""
    loss = max(0.0, sign * (z @ A @ z - threshold) + 1)
    tau = loss / ((z @ z) ** 2 + 1)
    values, vectors = np.linalg.eigh(A - sign * tau * np.outer(z, z))
    raised = (vectors * np.maximum(values, floor)) @ vectors.T
    return raised, max(1.0, threshold + sign * tau), values[0] < floor


def assert_close(metric, want, rtol):
    np.testing.assert_allclose(
        metric.matrix, want, rtol=0, atol=rtol * np.abs(want).max()
    )


@pytest.mark.parametrize("shape", [(3, 3), (4, 12), (12, 12)])
@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
def test_lego_is_its_closed_form(rng, shape, rate):
    k, d = shape
    metric = MahalanobisMetric(psd(rng, d, k))
    learner = Lego(metric, rate=rate)
    for target in (0.0, 0.1, 1.0, 30.0, 0.5):
        x, x2 = rng.standard_normal((2, d))
        want = lego(metric.matrix, x - x2, target, rate)
        learner.update(x, x2, target)
        assert_close(metric, want, 1e-12)


@pytest.mark.parametrize("slack", [0.1, 1.0, 50.0])
def test_itml_is_its_closed_form_over_rounds(rng, slack):
    d, near, far = 6, 0.5, 4.0
    metric = MahalanobisMetric(psd(rng, d))
    learner = Itml(metric, near=near, far=far, slack=slack)
    pairs = [(*rng.standard_normal((2, d)), sign) for sign in (1, -1, 1, -1, -1)]
    states = [(0.0, near if sign > 0 else far) for *_, sign in pairs]
    A, relaxed = metric.matrix, 0
    for _ in range(30):
        for i, (x, x2, sign) in enumerate(pairs):
            before = states[i][0]
            A, states[i] = itml(A, x - x2, sign, slack, states[i])
            relaxed += states[i][0] < before
            learner.update(x, x2, sign, pair=i)
            assert_close(metric, A, 1e-11)
    # steps back happened as well
    assert relaxed > 0


def test_itml_converges_to_what_the_constraints_ask(rng):
    d = 4
    metric = MahalanobisMetric(np.eye(d))
    learner = Itml(metric, near=1.0, far=9.0, slack=1e4)
    points = 2 * rng.standard_normal((3, 2, d))
    signs = (1, -1, -1)
    for _ in range(300):
        for i, ((x, x2), sign) in enumerate(zip(points, signs, strict=True)):
            learner.update(x, x2, sign, pair=i)
    squares = metric.distances(points[:, 0], points[:, 1]) ** 2
    assert squares[0] <= 1.01
    assert (squares[1:] >= 8.9).all()


@pytest.mark.parametrize("floor", [1e-6, 1e-2])
@pytest.mark.parametrize("d", [2, 5, 24])
def test_pola_is_its_closed_form(rng, d, floor):
    metric = MahalanobisMetric(np.eye(d))
    learner = Pola(metric, floor=floor)
    threshold, active = 1.0, 0
    for _ in range(150):
        x, x2 = rng.standard_normal((2, d))
        sign = int(rng.choice([1, -1]))
        want, threshold, raised = pola(metric.matrix, x - x2, sign, threshold, floor)
        active += raised
        a, b = learner.update(x, x2, sign)
        assert (a.shape, b.shape) == ((d,), (d,))
        # an eigenvalue at the floor is known to eps / floor
        assert_close(metric, want, 1e-15 / floor)
        assert learner.threshold == pytest.approx(threshold, rel=1e-9)
    # the projection on the cone was put to the test
    assert active > 20


def test_pola_solves_with_a_metric_that_others_change(rng):
    metric = MahalanobisMetric(np.eye(5))
    learner = Pola(metric)
    for _ in range(20):
        metric.update(*(0.3 * rng.standard_normal((2, 5))))
        x, x2 = rng.standard_normal((2, 5))
        want, *_ = pola(metric.matrix, x - x2, -1, learner.threshold, 1e-6)
        learner.update(x, x2, -1)
        assert_close(metric, want, 1e-9)


def test_pola_learns_to_tell_pairs_apart(rng):
    """Pairs that differ along one axis are far, those along the others near."""
    d = 6
    metric = MahalanobisMetric(np.eye(d))
    learner = Pola(metric, threshold=2.0)
    wide = np.eye(1, d)[0]
    for _ in range(400):
        sign = int(rng.choice([1, -1]))
        v = rng.standard_normal(d) * (1 - wide)
        learner.update(v + (sign < 0) * 3 * wide, np.zeros(d), sign)
    v = rng.standard_normal((500, d)) * (1 - wide)
    origin = np.zeros((1, d))
    near = metric.distances(v, origin) ** 2
    far = metric.distances(v + 3 * wide, origin) ** 2
    assert np.mean(near < learner.threshold) > 0.99
    assert np.mean(far > learner.threshold) > 0.99


@pytest.mark.parametrize("k", [2, 7])
def test_the_gradient_is_that_of_the_losses(rng, k):
    d, rate, step = 7, 0.01, 1e-6
    factor = psd(rng, d, k)
    x, y, z = rng.standard_normal((3, d))

    def pair_loss(U, sign):
        return max(0.0, sign * (np.sum((U @ (x - y)) ** 2) - 3.0) + 1)

    def triplet_loss(U):
        near, far = (np.sum((U @ (x - p)) ** 2) for p in (y, z))
        return max(0.0, near - far + 1)

    def slope(loss):
        found = np.zeros_like(factor)
        for i in np.ndindex(*factor.shape):
            ends = []
            for sign in (-1, 1):
                moved = factor.copy()
                moved[i] += sign * step
                ends.append(loss(moved))
            found[i] = (ends[1] - ends[0]) / (2 * step)
        return found

    active = 0
    for sign in (1, -1):
        metric = MahalanobisMetric(factor)
        HingeGradient(metric, rate=rate, threshold=3.0).update(x, y, sign)
        want = slope(lambda U, sign=sign: pair_loss(U, sign))
        active += bool(want.any())
        np.testing.assert_allclose(metric.factor, factor - rate * want, atol=1e-9)
    assert active > 0
    metric = MahalanobisMetric(factor)
    a, b = HingeGradient(metric, rate=rate).update_triplet(x, y, z)
    assert (a.shape, b.shape) == ((2, k), (2, d))
    np.testing.assert_allclose(
        metric.factor, factor - rate * slope(triplet_loss), atol=1e-9
    )


LEARNERS = {
    "lego": lambda m: Lego(m, rate=0.3),
    "itml": lambda m: Itml(m, near=1.0, far=6.0),
    "pola": Pola,
    "gradient": lambda m: HingeGradient(m, rate=0.01),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_an_index_follows_its_learner(rng, name):
    d = 8
    points = rng.standard_normal((60, d))
    index = MahalanobisIndex(MahalanobisMetric(np.eye(d)), rng=0)
    index.insert(points)
    metric = MahalanobisMetric(np.eye(d))
    by_index, by_metric = LEARNERS[name](index), LEARNERS[name](metric)
    told = MahalanobisIndex(MahalanobisMetric(np.eye(d)), rng=0)
    told.insert(points)
    for _ in range(40):
        i, j = rng.integers(60, size=2)
        target = int(rng.choice([1, -1])) if name != "lego" else 2.0
        by_index.update(points[i], points[j], target)
        told.update_metric(*by_metric.update(points[i], points[j], target))
    np.testing.assert_allclose(by_index.metric.factor, metric.factor, rtol=1e-12)
    fresh = MahalanobisIndex(metric, rng=0)
    fresh.insert(points)
    want = fresh.query(points[:5]).value
    for followed in (index, told):
        got = followed.query(points[:5]).value
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_points_at_the_same_place_change_nothing(name):
    metric = MahalanobisMetric(np.eye(3))
    learner = LEARNERS[name](metric)
    a, b = learner.update(np.ones(3), np.ones(3), 1)
    assert not np.outer(a, b).any()
    np.testing.assert_array_equal(learner.metric.factor, np.eye(3))


def test_constraints_that_hold_change_nothing():
    metric = MahalanobisMetric(np.eye(2))
    zero, near, far = np.zeros(2), np.array([0.5, 0.0]), np.array([5.0, 0.0])
    for learner in (
        Itml(metric, near=1, far=4),
        Pola(metric, threshold=3),
        HingeGradient(metric, threshold=3),
    ):
        learner.update(zero, near, 1)
        learner.update(zero, far, -1)
    assert not HingeGradient(metric).update_triplet(zero, near, far)[0].any()
    np.testing.assert_array_equal(metric.factor, np.eye(2))


def test_what_the_learner_hands_out_is_a_copy():
    metric = MahalanobisMetric(np.eye(2))
    learner = Lego(metric)
    learner.metric.update(np.ones(2), np.ones(2))
    np.testing.assert_array_equal(metric.factor, np.eye(2))


def eye():
    return MahalanobisMetric(np.eye(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lego(np.eye(2)), "metric: expected a MahalanobisMetric or a Mahal"),
        (lambda: Lego(eye(), rate=0), "rate: expected a number above 0"),
        (lambda: Lego(eye()).update([0, 0], [1, 1], -1), "target: expected a number"),
        (lambda: Lego(eye()).update([0, 0], [1], 1), r"x2: expected shape \(2,\)"),
        (lambda: Lego(eye()).update(["a", "b"], [1, 1], 1), "x: expected real"),
        (lambda: Lego(eye()).update([0, np.nan], [1, 1], 1), "x: expected finite"),
        (lambda: Itml(eye(), near=0, far=1), "near: expected a number above 0"),
        (lambda: Pola(eye()).update([0, 0], [1, 1], 0), "target: expected 1 .near."),
        (
            lambda: Pola(MahalanobisMetric(np.ones((1, 2)))),
            "metric: expected a square factor",
        ),
        (
            lambda: Pola(MahalanobisMetric(np.diag([1, 1e-4]))),
            "metric: expected eigenvalues of A of at least floor",
        ),
        (lambda: Pola(eye(), threshold=0.5), "threshold: expected a number >= 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_hinge_says_when_its_steps_diverge(rng):
    points = rng.standard_normal((50, 2)) * [1000.0, 1.0]
    metric = MahalanobisMetric(np.eye(2))
    learner = HingeGradient(metric, rate=0.01)
    with pytest.raises(ValueError, match=r"rate: expected at most .* diverge"):
        learner.update(points[0], points[1], 1)
    with pytest.raises(ValueError, match="rate: expected at most"):
        learner.update_triplet(points[0], -points[0], points[0] + 1)
    assert np.abs(metric.factor).max() == 1
    # the longest step that is allowed does not grow, whatever the targets
    learner = HingeGradient(metric, rate=0.99)
    for _ in range(300):
        z = rng.standard_normal((2, 2))
        z /= np.maximum(np.linalg.norm(z[0] - z[1]), 1)
        learner.update(z[0], z[1], int(rng.choice([-1, 1])))
    assert np.abs(metric.factor).max() < 100
