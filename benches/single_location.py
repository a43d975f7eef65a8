r"""One informative token: the risk of learned attention against the Bayes risk.

Single-location regression: one token of a sequence, at an unknown position, is shifted
along a direction :math:`k`; the target is its product with an orthogonal one,
:math:`v`. All other entries are normal noise. The shifted token is the :math:`j`-th
with a probability of softmax in :math:`j`, of logits ``strength`` times :math:`k \cdot
x_j`, so that the best prediction is softmax attention of the query ``strength`` times
:math:`k`, read out by :math:`v`. Duranthon et al., Statistical Advantage of Softmax
Attention, arXiv 2509.21936, of which the abstract was read: the sizes are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

import fastattn

# sequences of the test set
_JUDGED = 4000
# of learning
_STEPS = 12


@dataclass(frozen=True)
class Task:
    """Sequences of ``length`` tokens of ``d`` entries, one shifted by ``strength``."""

    length: int = 16
    strength: float = 3.0
    d: int = 8

    def directions(self):
        """Return the direction of the shift, and the direction of the target."""
        rng = np.random.default_rng(7)
        return np.linalg.qr(rng.standard_normal((self.d, 2)))[0].T

    def draw(self, count, rng):
        """Return sequences, ``(count, length, d)``, and their targets."""
        tokens = rng.standard_normal((count, self.length, self.d))
        moved, asked = self.directions()
        place = np.arange(count), rng.integers(self.length, size=count)
        tokens[place] += self.strength * moved
        return tokens, tokens[place] @ asked


@dataclass(frozen=True)
class Model:
    """Attention of one query, its derivative, and the options of both."""

    forward: Callable
    backward: Callable
    options: dict

    def attend(self, query, tokens):
        """Answer the query for every sequence, ``(count, d)``."""
        return self.forward(query[None, None], tokens, tokens, **self.options)[:, 0]

    def vjp(self, query, tokens, slope):
        """Derivative by the query of ``sum(slope * answer)``."""
        inputs = query[None, None], tokens, tokens, slope[:, None]
        return self.backward(*inputs, **self.options)[0][0, 0]


def _linear(feature_map, *, normalize=True):
    options = {"feature_map": feature_map, "normalize": normalize, "scale": 1.0}
    return Model(fastattn.linear_attention, fastattn.linear_attention_vjp, options)


_EXACT = {"method": fastattn.Exact(), "scale": 1.0, "tol": 1e-9}
MODELS = {
    "softmax": Model(fastattn.attention, fastattn.attention_vjp, _EXACT),
    # weights of either sign nearly cancel: plain linear attention does better undivided
    "linear": _linear(fastattn.Identity(), normalize=False),
    "elu+1": _linear(fastattn.EluPlusOne()),
    "Taylor": _linear(fastattn.Taylor()),
}
SWEEPS = {
    "strength": [{"strength": x} for x in (1.0, 2.0, 3.0, 4.0, 5.0)],
    "length": [{"length": x} for x in (4, 16, 64)],
}


def single_location(*, quick):
    """Risk of learned attention over the target's variance, with the Bayes risk."""
    rows = []
    for sweep, changes in SWEEPS.items():
        for change in changes[1:2] if quick else changes:
            task, rng = (
                replace(Task(), **change),
                np.random.default_rng([11, len(rows)]),
            )
            seen = task.draw(100 if quick else 1000, rng)
            judged = task.draw(_JUDGED // 10 if quick else _JUDGED, rng)
            best = float(np.mean((bayes(task, judged[0]) - judged[1]) ** 2))
            # softmax attention with the true directions has the Bayes risk
            assert abs(known(task, *judged) / best - 1) < 1e-9
            found = {"Bayes": best}
            for name, model in MODELS.items():
                found[name] = risk(model, learn(task, model, *seen), *judged)
            at = float(getattr(task, sweep))
            variance = float(np.mean(judged[1] ** 2))
            shares = {name: x / variance for name, x in found.items()}
            rows.append({"sweep": sweep, "at": at, **shares})
    return rows


def bayes(task, tokens):
    """Mean of the target under the posterior of the position, from the densities."""
    moved, asked = task.directions()
    gap = tokens - task.strength * moved
    log = (np.sum(tokens**2, axis=2) - np.sum(gap**2, axis=2)) / 2
    density = np.exp(log - log.max(axis=1, keepdims=True))
    means = np.sum(density * (tokens @ asked), axis=1)
    return means / density.sum(axis=1)


def known(task, tokens, target):
    """Risk of softmax attention with the directions of the task."""
    moved, asked = task.directions()
    return risk(MODELS["softmax"], (task.strength * moved, asked), tokens, target)


def risk(model, weights, tokens, target):
    """Mean squared error of a query and a readout direction."""
    query, readout = weights
    return float(np.mean((model.attend(query, tokens) @ readout - target) ** 2))


def learn(task, model, tokens, target):
    """Return the query, from the true direction on, and the best readout for it."""
    readout = None

    def loss(query):
        nonlocal readout
        seen = model.attend(query, tokens)
        readout = np.linalg.lstsq(seen, target, rcond=None)[0]
        off = seen @ readout - target
        # the best readout is updated at no cost
        slope = 2 / len(off) * off[:, None] * readout
        return float(np.mean(off**2)), model.vjp(query, tokens, slope)

    start = task.strength * task.directions()[0]
    found = minimize(loss, start, jac=True, options={"maxiter": _STEPS})
    loss(found.x)
    return found.x, readout
