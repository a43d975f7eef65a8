"""Polynomial approximations of exp, and the monomials that make them low rank.

If ``p`` approximates exp on the interval of the logits, ``exp(u . v)`` is close to
``p(u . v)``, which is a sum of products of monomials of ``u`` and of ``v``, one for
each multi-index up to the degree ``g`` of ``p``: rank C(d + g, g) (Alman and Song,
arXiv 2302.13214).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev as cheb

from sketching._lib.arrays import Array

# beyond it exp(-bound) is below the rounding error of exp(bound) in float64
LARGEST_BOUND = 8.0
LARGEST_DEGREE = 24


def taylor(degree: int) -> Array:
    """Coefficients of the Taylor polynomial of exp at 0, lowest first."""
    return np.array([1 / math.factorial(g) for g in range(degree + 1)])


@functools.lru_cache(maxsize=256)
def relative_minimax(degree: int, bound: float) -> tuple[Array, float]:
    r"""Minimise :math:`\max_{|x| \le b} |p(x) e^{-x} - 1|` over polynomials.

    Parameters
    ----------
    degree : int
        Degree of the polynomial.
    bound : float
        The half width :math:`b` of the interval, at most ``LARGEST_BOUND``.

    Returns
    -------
    coefficients : array, shape (degree + 1,)
        Monomial coefficients, lowest first.
    error : float
        A bound on the relative error over the whole interval, not only on a grid.

    Notes
    -----
    Remez exchange in the Chebyshev basis: ``p(x) exp(-x)`` spans a Haar space, so
    the best polynomial equioscillates in ``degree + 2`` points. Where float64 cannot
    resolve that, or the degree is above ``LARGEST_DEGREE``, a polynomial of a lower
    degree is padded with zeros, so that the error never grows with the degree.
    """
    if degree > LARGEST_DEGREE:
        return _padded(relative_minimax(LARGEST_DEGREE, bound), degree)
    extrema = -np.cos(np.pi * np.arange(degree + 2) / (degree + 1))
    best = np.ones(1)
    # wide intervals start from the extrema of narrower ones: from Chebyshev extrema the
    # exchange would not converge
    steps = max(0, math.ceil(math.log(bound, 1.5)))
    for width in bound * 1.5 ** np.arange(-steps, 1.0):
        best, extrema = _exchange(degree, float(width), extrema)
    powers = cheb.cheb2poly(best)
    powers = powers / bound ** np.arange(len(powers))
    # the error of the returned coefficients: the change of basis adds rounding
    scaled = powers * np.longdouble(bound) ** np.arange(len(powers))
    error = whole_interval_error(cheb.poly2cheb(scaled), bound)
    if degree > 0:
        lower = relative_minimax(degree - 1, bound)
        if not error <= lower[1]:
            return _padded(lower, degree)
    return _padded((powers, error), degree)


def _padded(found: tuple[Array, float], degree: int) -> tuple[Array, float]:
    """Pad the coefficients with zeros up to a degree."""
    coefficients, error = found
    return np.pad(coefficients, (0, degree + 1 - len(coefficients))), error


def _exchange(degree: int, bound: float, extrema: Array) -> tuple[Array, Array]:
    """Remez exchange from given extrema; return the best iterate and its extrema."""
    count = 64 * (degree + 40)
    grid = -np.cos(np.pi * (np.arange(count) + 0.5) / count)
    signs = (-1.0) ** np.arange(degree + 2)
    least, best = math.inf, (np.ones(1), extrema)
    for _ in range(30):
        basis = cheb.chebvander(extrema, degree) * np.exp(-bound * extrema)[:, None]
        solution = np.linalg.solve(np.column_stack([basis, signs]), signs * 0 + 1)
        error = cheb.chebval(grid, solution[:-1]) * np.exp(-bound * grid) - 1
        largest = float(np.abs(error).max())
        peaks = _alternating_peaks(error, degree + 2)
        # stop where rounding prevents further equioscillation
        if largest >= least or len(peaks) < degree + 2:
            break
        least, best = largest, (solution[:-1], extrema)
        extrema = grid[peaks]
        if largest <= abs(solution[-1]) * (1 + 1e-6):
            break
    return best


def _alternating_peaks(error: Array, size: int) -> Array:
    """Grid indices of the largest extrema of alternating sign, ``size`` at most."""
    sign_change = np.flatnonzero(np.diff(np.sign(error)) != 0) + 1
    runs = np.split(np.arange(len(error)), sign_change)
    peaks = [run[np.argmax(np.abs(error[run]))] for run in runs]
    while len(peaks) > size:
        drop_first = abs(error[peaks[0]]) < abs(error[peaks[-1]])
        peaks = peaks[1:] if drop_first else peaks[:-1]
    return np.array(peaks)


def whole_interval_error(coefficients: Array, bound: float) -> float:
    """Bound ``max |p(b t) exp(-b t) - 1|`` over -1 <= t <= 1, ``p`` in Chebyshev form.

    A polynomial of degree K sampled in N Chebyshev points is at most
    1/cos(pi K / (2 N)) times its largest sample (Ehlich and Zeller, 1964). The
    function here is within 1e-14 of its Chebyshev expansion of degree
    ``degree + 64`` for every bound up to ``LARGEST_BOUND``; N is 32 times that.
    Samples are computed in long double, and the bound includes their rounding.
    """
    degree = len(coefficients) + 63
    count = 32 * degree
    t = np.cos(np.pi * (np.arange(count) + 0.5) / count).astype(np.longdouble)
    coefficients = np.asarray(coefficients, dtype=np.longdouble)
    error = np.abs(cheb.chebval(t, coefficients) * np.exp(-bound * t) - 1)
    size = np.abs(coefficients).sum() * math.exp(bound) * len(coefficients)
    rounding = float(size * np.finfo(np.longdouble).eps)
    return float(error.max()) / math.cos(math.pi / 64) + rounding + 1e-14


def least_degree(bound: float, error: float) -> int | None:
    """Return the least degree whose minimax error up to ``bound`` is ``error``."""
    if bound > LARGEST_BOUND:
        return None
    for degree in range(LARGEST_DEGREE + 1):
        if relative_minimax(degree, bound)[1] <= error:
            return degree
    return None


@dataclass(frozen=True, slots=True, eq=False)
class IndexSet:
    """Multi-indices of monomials: each is its parent times one coordinate.

    Parameters
    ----------
    parent, coordinate : integer array, shape (r,)
        Monomial ``j`` is monomial ``parent[j] < j`` times coordinate
        ``coordinate[j]``; monomial 0 is the constant 1.
    degree : integer array, shape (r,)
        The total degree of each multi-index.
    multiplicity : array, shape (r,)
        The multinomial coefficient ``degree! / alpha!``.
    """

    parent: Array
    coordinate: Array
    degree: Array
    multiplicity: Array

    def __len__(self) -> int:
        return len(self.parent)

    def prefix(self, rank: int) -> "IndexSet":
        """Return the first ``rank`` multi-indices; parents precede their children."""
        return IndexSet(
            self.parent[:rank],
            self.coordinate[:rank],
            self.degree[:rank],
            self.multiplicity[:rank],
        )

    def weights(self, coefficients: Array) -> Array:
        """Return the factor of each product of monomials in ``p(u . v)``."""
        return coefficients[self.degree] * self.multiplicity

    def sizes(self, entries: Array, coefficients: Array) -> tuple[float, float]:
        """Sums of absolute terms of ``p(x)``: of all monomials, and of the set.

        ``entries``, ``(d,)``, are the largest absolute terms of ``x``.
        """
        size = np.abs(coefficients)
        everything = float(np.polynomial.polynomial.polyval(entries.sum(), size))
        term = np.ones(len(self))
        for j in range(1, len(self)):
            term[j] = term[self.parent[j]] * entries[self.coordinate[j]]
        return everything, float(np.sum(term * self.weights(size)))


def rank_of(d: int, degree: int) -> int:
    """Return the number C(d + g, g) of monomials of degree at most g in d variables."""
    return math.comb(d + degree, degree)


@functools.lru_cache(maxsize=32)
def total_degree(d: int, degree: int) -> IndexSet:
    """Return all multi-indices of ``d`` coordinates up to ``degree``, by degree."""
    levels = [_Level.root()]
    for _ in range(degree):
        levels.append(levels[-1].children(np.ones(d)))
    return _sorted(levels, np.zeros(sum(len(x.parent) for x in levels)))


def by_energy(scales: Array, coefficients: Array, rank: int) -> IndexSet:
    r"""Return the ``rank`` multi-indices with the most energy.

    For Gaussian ``u`` and ``v`` with covariance ``diag(scales)``, the term of
    :math:`\alpha` in :math:`p(u \cdot v)` has mean square
    :math:`(c_{|\alpha|} |\alpha|!/\alpha!)^2
    \prod_l ((2\alpha_l-1)!!\,s_l^{\alpha_l})^2`.

    Parameters
    ----------
    scales : array, shape (d,)
        Variances of the balanced coordinates.
    coefficients : array, shape (g + 1,)
        Coefficients of ``p``; multi-indices have degrees up to g, ``LARGEST_DEGREE`` at
        most. All degrees from the first zero coefficient on have zero energy.
    rank : int
        Size of the set, including the constant; all multi-indices if there are fewer.

    Returns
    -------
    IndexSet
        Sorted by decreasing energy, parents before children.
    """
    levels = [_Level.root()]
    for g in range(1, min(len(coefficients), LARGEST_DEGREE + 1)):
        before = coefficients[g - 1]
        ratio = coefficients[g] / before if before != 0 else 0.0
        levels.append(levels[-1].children(scales * ratio, keep=rank))
    return _sorted(levels, np.concatenate([x.energy for x in levels])).prefix(rank)


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """The multi-indices of one degree while an index set grows."""

    degree: int
    start: int  # position of the level's first member in the whole set
    parent: Array
    coordinate: Array
    run: Array  # exponent of the last coordinate
    multiplicity: Array
    energy: Array

    @staticmethod
    def root() -> "_Level":
        zero, one = np.zeros(1, dtype=np.int64), np.ones(1)
        return _Level(0, 0, zero, zero, zero, one, one)

    def children(self, scales: Array, keep: int | None = None) -> "_Level":
        """Multiply members by coordinates from their last on; keep the best ones."""
        count = len(scales) - self.coordinate
        source = np.repeat(np.arange(len(count)), count)
        step = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
        coordinate = self.coordinate[source] + step
        run = np.where(step == 0, self.run[source] + 1, 1)
        factor = (self.degree + 1) / run
        gain = np.abs(factor * (2 * run - 1) * scales[coordinate])
        # at most the energy of the parent, so that parents precede their children
        energy = self.energy[source] * np.minimum(gain, 1.0) ** 2
        order = np.arange(len(energy))
        if keep is not None and len(energy) > keep:
            order = np.sort(np.argpartition(-energy, keep)[:keep])
        return _Level(
            self.degree + 1,
            self.start + len(self.parent),
            (self.start + source)[order],
            coordinate[order],
            run[order],
            (self.multiplicity[source] * factor)[order],
            energy[order],
        )


def _sorted(levels: list[_Level], energy: Array) -> IndexSet:
    """Concatenate the levels, sorted by decreasing energy."""
    # stable sort: parents stay ahead of children of equal energy
    order = np.argsort(-energy, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    parent = np.concatenate([x.parent for x in levels])
    return IndexSet(
        position[parent[order]],
        np.concatenate([x.coordinate for x in levels])[order],
        np.concatenate([np.full(len(x.parent), x.degree) for x in levels])[order],
        np.concatenate([x.multiplicity for x in levels])[order],
    )
