"""Feature maps before a linear model, against scikit-learn's, on its digits."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem, PolynomialCountSketch, RBFSampler
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from benches.measure import Ratio, faster, spread
from fastattn.estimators import RandomFeatureSampler, TensorSketchSampler

_GAMMA = 0.05
_POLYNOMIAL = {"gamma": 0.05, "degree": 3, "coef0": 1.0}


def kernel_features(*, quick):
    """Accuracy of a ridge classifier on features, five-fold, by number of features."""
    pixels, target = load_digits(return_X_y=True)
    pixels = pixels / 16
    rows = [_row("pixels", "", None, None, pixels, target)]
    for size in (64,) if quick else (64, 256, 1024):
        for name, kernel, make, other in _samplers(size):
            rows.append(_row(name, kernel, make, other, pixels, target, size))
    return rows


def _samplers(size):
    """Yield names, kernels and makers of samplers, with scikit-learn's for the time."""
    options = {"gamma": _GAMMA, "n_components": size}

    def gaussian(seed):
        return RBFSampler(**options, random_state=seed)

    def sketch(seed):
        return PolynomialCountSketch(
            **_POLYNOMIAL, n_components=size, random_state=seed
        )

    def nystroem(seed):
        return Nystroem(**options, random_state=seed)

    yield "RBFSampler", "Gaussian", gaussian, gaussian
    for kind in ("trigonometric", "positive", "hyperbolic"):

        def features(seed, kind=kind):
            return RandomFeatureSampler(**options, kind=kind, random_state=seed)

        yield f"RandomFeatureSampler, {kind}", "Gaussian", features, gaussian
    yield "Nystroem", "Gaussian", nystroem, gaussian
    yield "PolynomialCountSketch", "polynomial", sketch, sketch

    def ours(seed):
        return TensorSketchSampler(**_POLYNOMIAL, n_components=size, random_state=seed)

    yield "TensorSketchSampler", "polynomial", ours, sketch


def _row(name, kernel, make, other, pixels, target, size=None):
    seeds, times = (range(5) if make else (0,)), Ratio(*3 * [float("nan")])
    scores = []
    for seed in seeds:
        steps = [make(seed)] if make else []
        model = make_pipeline(*steps, RidgeClassifier(alpha=1e-2))
        scores += list(cross_val_score(model, pixels, target))
    if make:
        mine, theirs = (f(0).fit(pixels) for f in (make, other))
        times = faster(
            lambda: mine.transform(pixels), lambda: theirs.transform(pixels), pairs=9
        )
    return {
        "features": name,
        "kernel": kernel,
        "number": size or pixels.shape[1],
        "accuracy": float(np.mean(scores)),
        "standard error": float(np.std(scores) / len(scores) ** 0.5),
        **spread("times faster than scikit-learn's transform", times),
    }
