"""Polynomials fitted to a sample of the logits, monomials picked by their energy."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.polynomial import chebyshev as cheb

from fastattn._ops.monomials import monomials
from fastattn._probe import Probe
from fastattn._problem import Head
from fastattn._recipes import Recipe, sample_rows
from fastattn.expansions import by_energy, taylor
from fastattn.transforms import Transform, balance
from sketching._lib.arrays import Array

# a key's weight exp(tilt) must stay in the range of float32
_LARGEST_TILT = 30.0
_LARGEST_DEGREE = 6
# beyond it no polynomial of that degree is worth a try
_LARGEST_LOGIT = 30.0
# ridge of the fit, relative to the trace of its normal equations
_RIDGE = 1e-12
# the fit looks at one in this many of the probe's keys
_THIN = 4
_FIRST_RANK = 16
# ratio of successive ranks where the wanted error is near
_STEP = 1.2


def fitted_recipes(
    head: Head,
    probe: Probe,
    rng: np.random.Generator,
    *,
    largest_rank: int,
    wanted: float,
) -> Iterator[Recipe]:
    """Yield recipes of increasing rank, each with the error predicted for it.

    Parameters
    ----------
    head : Head
        One head.
    probe : Probe
        Sampled rows and keys of it.
    rng : Generator
        Draws the rows that the transform is made from.
    largest_rank : int
        Monomials at the most.
    wanted : float
        The error that is aimed at: ranks double until it is near.
    """
    query, key = sample_rows(head, rng)
    transform = balance(query, key, head.scale, queries=True)
    if _largest_tilt(transform, key) > _LARGEST_TILT:
        transform = balance(query, key, head.scale, queries=False)
    reach = float(np.abs(_coordinates(probe, transform)[0]).max())
    if not reach <= _LARGEST_LOGIT:
        return
    products = _Products(probe, transform)
    middle = probe.value.mean(axis=0, dtype=np.float64)
    rank, factor, last = min(_FIRST_RANK, largest_rank), 2.0, 0
    before = math.inf
    while True:
        error, coefficients = products.best_fit(rank)
        if error <= wanted and factor == 2 and last:
            # a doubling went too far: go on from the last rank in smaller steps
            products.back()
            rank, factor = int(last * _STEP) + 1, _STEP
            continue
        yield Recipe(
            transform,
            products.index.prefix(rank),
            np.pad(coefficients, (0, _LARGEST_DEGREE + 1 - len(coefficients))),
            middle,
            head.dtype,
            math.inf,
            error,
        )
        if rank == largest_rank or _hopeless(
            (last, before), (rank, error), largest_rank, wanted
        ):
            return
        before = error
        last, rank = rank, min(int(rank * factor) + 1, largest_rank)


def _hopeless(
    last: tuple[int, float], now: tuple[int, float], largest: int, wanted: float
) -> bool:
    """Whether the error would miss ``wanted`` even if it fell twice as steeply."""
    if last[0] < _FIRST_RANK or now[1] <= 4 * wanted:
        return False
    slope = max(math.log(last[1] / now[1]) / math.log(now[0] / last[0]), 0.05)
    return bool(now[1] * (now[0] / largest) ** (2 * slope) > wanted)


def fit(logits: Array, weights: Array, degrees: range) -> list[Array]:
    """Least squares of ``p(x) - exp(x)`` under squared weights, lowest first.

    One set of normal equations, in the Chebyshev basis, serves all degrees.
    """
    reach = max(float(np.abs(logits).max()), 1e-12)
    basis = cheb.chebvander((logits / reach).ravel(), degrees[-1])
    weights = np.broadcast_to(weights, logits.shape)
    basis *= weights.ravel()[:, None]
    gram = basis.T @ basis
    wanted = basis.T @ (np.exp(logits).ravel() * weights.ravel())
    fits = []
    for degree in degrees:
        size = degree + 1
        ridge = _RIDGE * gram[:size, :size].trace() * np.eye(size)
        solution = np.linalg.solve(gram[:size, :size] + ridge, wanted[:size])
        powers = cheb.cheb2poly(solution)
        fits.append(np.pad(powers, (0, size - len(powers))) / reach ** np.arange(size))
    return fits


class _Products:
    """Products of monomials of the probe's queries and keys, summed by degree."""

    def __init__(self, probe: Probe, transform: Transform) -> None:
        self.probe = probe
        self.scales = transform.scales
        logits, u, v = _coordinates(probe, transform)
        self.u, self.v = u.astype(np.float32), v.astype(np.float32)
        self.decay = np.exp(-logits).astype(np.float32)
        thin = np.s_[:, ::_THIN]
        # a weight is off by w_j (p - exp), relative to the row's sum of weights
        relative = probe.weights[thin] * self.decay[thin]
        self.fits = fit(logits[thin], relative, range(1, _LARGEST_DEGREE + 1))
        self.sums = np.zeros((_LARGEST_DEGREE + 1, *logits.shape), dtype=np.float32)
        self.rank = 0
        self._last = (0, self.sums)
        self._grow(256)

    def best_fit(self, rank: int) -> tuple[float, Array]:
        """Return the least predicted error and its coefficients; ``rank`` grows."""
        if rank > len(self.index):
            self._grow(2 * rank)
        self._last = (self.rank, self.sums.copy())
        degree = self.index.degree[self.rank : rank]
        for g in np.unique(degree):
            chosen = self.rank + np.flatnonzero(degree == g)
            self.sums[g] += self.left[:, chosen] @ self.right[:, chosen].T
        self.rank = rank
        full = self.index.degree[:rank].max()
        choices = [c for c in self.fits if full - 1 <= len(c) - 1 <= full]
        errors = [self.probe.error(self._delta(c)) for c in choices]
        best = int(np.argmin(errors))
        return errors[best], choices[best]

    def back(self) -> None:
        """Undo the last step of :meth:`best_fit`."""
        self.rank, self.sums = self._last

    def _grow(self, rank: int) -> None:
        """Make monomials up to ``rank``; a longer set starts with the shorter one."""
        self.index = by_energy(self.scales, taylor(_LARGEST_DEGREE), rank)
        recipe = {"parent": self.index.parent, "coordinate": self.index.coordinate}
        multiplicity = self.index.multiplicity.astype(np.float32)
        self.left = monomials(self.u, **recipe) * multiplicity
        self.right = monomials(self.v, **recipe)

    def _delta(self, coefficients: Array) -> Array:
        """Relative error of every weight."""
        count = len(coefficients)
        weights = coefficients.astype(np.float32)
        return np.tensordot(weights, self.sums[:count], 1) * self.decay - 1


def _coordinates(probe: Probe, transform: Transform) -> tuple[Array, Array, Array]:
    """Logits of the probe under a transform, and the coordinates of both sides."""
    u = (probe.query - transform.query_center) @ transform.query_map
    v = (probe.key - transform.key_center) @ transform.key_map
    return u @ v.T, u, v


def _largest_tilt(transform: Transform, key: Array) -> float:
    """Largest logarithm of a sampled key's weight."""
    return float(np.abs((key - transform.key_center) @ transform.tilt).max())
