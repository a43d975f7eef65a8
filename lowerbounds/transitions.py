r"""Where sweeps over the entry bound cross rank = n, fitted over n."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lowerbounds.threshold import ThresholdRow

# the share of n that a rank crosses: no matrix has a numerical rank of more than n
SHARES = {
    "rank": 1.0,
    "predicted_rank": 1.0,
    "numerical_rank": 0.25,
    "numerical_rank_most": 0.25,
}


@dataclass(frozen=True, slots=True)
class Transition:
    r"""Where one rank crosses n, over the sizes of a sweep.

    Parameters
    ----------
    order, family, error
        As in `ThresholdRow`.
    measure : str
        The rank, a field of `ThresholdRow`: of the numerical ones it is n / 4 that is
        crossed. The two ends of the numerical rank cross at the ends of a bracket.
    sizes : tuple of int
        The n at which the sweep crosses.
    locations : tuple of float
        Where, as :math:`B / (\ln n)^{1/k}`, for each n.
    location, spread : float
        Their mean and standard deviation.
    exponent, exponent_error : float
        The slope of ln B over ln ln n, which the theory puts at 1 / k, and its standard
        error; NaN with fewer than two and three sizes.

    Examples
    --------
    >>> from lowerbounds import fit_transitions, threshold_sweep
    >>> rows = threshold_sweep(
    ...     2, sizes=[64, 128, 256], families=["bounded"], errors=[0.01], rng=0
    ... )
    >>> found = {x.measure: x for x in fit_transitions(rows)}
    >>> 0.3 < found["predicted_rank"].location < found["rank"].location < 1.5
    True
    """

    order: int
    family: str
    error: float
    measure: str
    sizes: tuple[int, ...]
    locations: tuple[float, ...]
    location: float
    spread: float
    exponent: float
    exponent_error: float


def fit_transitions(rows: Iterable[ThresholdRow]) -> tuple[Transition, ...]:
    """Fit where the ranks of sweeps cross n.

    Parameters
    ----------
    rows : iterable of ThresholdRow
        Of sweeps over several n; a rank that never crosses n on the grid of a size
        leaves that size out.

    Returns
    -------
    tuple of Transition
        For each order, family, error and measure with at least one crossing.

    Examples
    --------
    >>> from lowerbounds import fit_transitions, threshold_sweep
    >>> rows = threshold_sweep(2, sizes=[64], families=["bounded"], rng=0)
    >>> sorted({x.error for x in fit_transitions(rows)})
    [0.001, 0.01, 0.1]
    """
    curves: dict[tuple[int, str, float], dict[int, list[ThresholdRow]]] = {}
    for row in rows:
        sizes = curves.setdefault((row.order, row.family, row.error), {})
        sizes.setdefault(row.n, []).append(row)
    found = []
    for (order, family, error), sizes in curves.items():
        for measure, share in SHARES.items():
            curves_of = {n: _curve(sizes[n], measure, share) for n in sorted(sizes)}
            located = {
                n: place
                for n, curve in curves_of.items()
                if (place := crossing(curve)) is not None
            }
            if located:
                found.append(fit_locations(order, family, error, measure, located))
    return tuple(found)


def crossing(curve: list[tuple[float, float]]) -> float | None:
    """Where a curve of positive numbers first is 1, interpolated in logarithms."""
    for (x, low), (y, high) in itertools.pairwise(sorted(curve)):
        if low < 1 <= high:
            # 0 has no logarithm, an infinite end no slope
            part = 0.5
            if low > 0 and math.isfinite(high):
                part = math.log(low) / math.log(low / high)
            return math.exp((1 - part) * math.log(x) + part * math.log(y))
    return None


def _curve(
    rows: list[ThresholdRow], measure: str, share: float
) -> list[tuple[float, float]]:
    """A rank over a share of n by ratio, where it was computed."""
    ranks = [(row.ratio, getattr(row, measure), share * row.n) for row in rows]
    return [(ratio, rank / n) for ratio, rank, n in ranks if rank is not None]


def fit_locations(
    order: int, family: str, error: float, measure: str, located: dict[int, float]
) -> Transition:
    """Fit the ratios at which a rank crosses n, for each n."""
    sizes, places = np.array(list(located)), np.array(list(located.values()))
    slope = slope_error = math.nan
    if len(sizes) > 1:
        x = np.log(np.log(sizes))
        y = np.log(places) + x / order
        centred = x - x.mean()
        slope = float(centred @ y / (centred @ centred))
    if len(sizes) > 2:
        left = y - y.mean() - slope * centred
        variance = left @ left / (len(sizes) - 2)
        slope_error = math.sqrt(variance / (centred @ centred))
    return Transition(
        order=order,
        family=family,
        error=error,
        measure=measure,
        sizes=tuple(int(n) for n in sizes),
        locations=tuple(float(x) for x in places),
        location=float(places.mean()) if len(places) else math.nan,
        spread=float(places.std(ddof=1)) if len(places) > 1 else math.nan,
        exponent=slope,
        exponent_error=slope_error,
    )
