"""Feature maps as scikit-learn transformers."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastattn.estimators import RandomFeatureSampler, TensorSketchSampler
from fastattn.linear.random_features import KINDS

SAMPLERS = [
    *(RandomFeatureSampler(kind=kind, random_state=0) for kind in KINDS),
    TensorSketchSampler(random_state=0),
]


@parametrize_with_checks(SAMPLERS)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orthogonal", [False, True])
def test_products_approach_the_gaussian_kernel(rng, kind, orthogonal):
    X = 0.4 * rng.standard_normal((20, 3))
    sampler = RandomFeatureSampler(0.5, 20001, kind, orthogonal, random_state=0)
    Z = sampler.fit_transform(X)
    assert Z.shape == (20, 20001)
    truth = rbf_kernel(X, gamma=0.5)
    # one direction varies by no more than 1, or by what positive features do
    spread = np.expm1(np.sum((X[:, None] + X) ** 2, axis=2))
    slack = 8 * np.sqrt(1 + truth**2 * spread) / np.sqrt(20000 / 2)
    assert np.all(np.abs(Z @ Z.T - truth) <= slack)


@pytest.mark.parametrize(("degree", "coef0"), [(1, 0.0), (2, 1.0), (3, 0.5)])
def test_products_approach_the_polynomial_kernel(rng, degree, coef0):
    X = 0.5 * rng.standard_normal((20, 3))
    Z = TensorSketchSampler(0.7, degree, coef0, 20000, random_state=0).fit_transform(X)
    want = polynomial_kernel(X, degree=degree, gamma=0.7, coef0=coef0)
    np.testing.assert_allclose(Z @ Z.T, want, atol=0.05 * want.max())


def test_error_is_below_that_of_features_with_offsets(rng):
    X = rng.standard_normal((60, 8)) / 2
    truth = rbf_kernel(X, gamma=0.5)

    def error(make):
        found = [make(seed).fit_transform(X) for seed in range(20)]
        return np.mean([np.linalg.norm(Z @ Z.T - truth) for Z in found])

    ours = error(lambda seed: RandomFeatureSampler(0.5, 64, random_state=seed))
    theirs = error(
        lambda seed: RBFSampler(gamma=0.5, n_components=64, random_state=seed)
    )
    assert ours < 0.9 * theirs


@pytest.mark.parametrize(
    "sampler",
    [
        RandomFeatureSampler(gamma=2e-3 * 16, n_components=400, random_state=0),
        TensorSketchSampler(gamma=1 / 20, degree=3, n_components=400, random_state=0),
    ],
    ids=str,
)
def test_a_linear_model_on_features_beats_one_on_pixels(sampler):
    X, y = load_digits(return_X_y=True)
    train, test, target, truth = train_test_split(X / 16, y, random_state=0)
    pixels = RidgeClassifier().fit(train, target).score(test, truth)
    model = make_pipeline(clone(sampler), RidgeClassifier(alpha=1e-3))
    assert model.fit(train, target).score(test, truth) > pixels + 0.02


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (RandomFeatureSampler(kind="cosine"), "kind: expected one of"),
        (RandomFeatureSampler(gamma=-1.0), "gamma: expected a number above 0"),
        (TensorSketchSampler(n_components=0), "n_components: expected an integer"),
        (TensorSketchSampler(coef0=-1.0), "constant: expected a number >= 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(sampler, message):
    with pytest.raises(ValueError, match=message):
        sampler.fit(np.ones((4, 2)))
