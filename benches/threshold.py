"""Sweeps over the entry bound: where the rank that attention needs exceeds n."""

import dataclasses
import hashlib
import inspect
import math
from pathlib import Path
from typing import TextIO

import numpy as np

import fastattn
import lowerbounds
from benches import deciding
from benches.hardness import formulas
from benches.measure import faster
from benches.progress import steps
from benches.resume import recall, record
from lowerbounds import (
    _attention_instance,
    _factored,
    _instance,
    _levels,
    _spectra,
    _tuples,
    budgets,
    reductions,
    satisfiability,
    vectors,
)
from lowerbounds import threshold as sweeps_over_bounds
from lowerbounds.threshold import FAMILIES, RATIOS, ThresholdRow, factors_of
from lowerbounds.transitions import SHARES, Transition, crossing, fit_locations

ERRORS = (1e-1, 1e-2, 1e-3)
# the error of the figures and of the timings
SHOWN = 1e-2
SIZES = {
    2: (256, 512, 1024, 2048, 4096, 8192),
    3: (16, 32, 64, 128, 256),
    4: (8, 16, 32),
}
QUICK = {2: (64, 128, 256), 3: (8, 16, 32), 4: (4, 8, 16)}
# further sizes of bounded entries, whose coordinates are few
BOUNDED_ONLY = {4: (64,)}
# singular values take time proportional to n cubed: from here on at every other
# entry bound, and until they have crossed at the error of the figures
_SPARSE = 4096
# instances on which methods decide, for each n
_INSTANCES = 20
# right answers between those of chance and all
_MIDDLE = 0.75
# logits of the queries on which polynomials are measured, and the fewest queries
_LOGITS, _FEWEST = 1 << 21, 16
# a sweep ends once every polynomial has so many times n monomials
_FAR_BEYOND = 10
# what makes a cell of a sweep, and further an answer
_OF_SWEEPS = (
    sweeps_over_bounds,
    _factored,
    _spectra,
    _instance,
    _tuples,
    satisfiability,
    vectors,
)
_OF_DECISIONS = (
    deciding,
    formulas,
    _levels,
    _attention_instance,
    budgets,
    reductions,
)
# a bracket whose ends differ by less counts as one number
_SAME = 5e-4
_STATEMENTS = {
    "rank": "measured on some queries",
    "predicted_rank": "proven for all inputs",
    "numerical_rank": "proven lower end, bracket a..b",
    "time": "median of 5 pairs",
}
# polynomials are timed while they have at most so many times n monomials
_MOST_OVER_N = 4


def threshold(*, quick, results):
    """Where the rank that an additive error takes passes n, over B / (ln n)^(1/k).

    Theory: below entries of order (ln n)^(1/k) a polynomial of low degree makes
    attention of order k nearly linear; above, nothing is faster than enumerating all
    tuples if satisfiability is as hard as believed. For each order, family and n the
    sweep finds the ratio B / (ln n)^(1/k) at which a rank exceeds n: `rank`, of the
    least degree that meets the error on the inputs; `predicted_rank`, by the formula
    for the worst inputs; `numerical_rank`, n / 4 singular values, which every factored
    method needs; `time`, where the polynomial method takes as long as exact attention.
    `decided` is where an output answers 3 of 4 questions right, of which half have a
    solution; `entry bound of the reduction` is stated by the calibrated reduction, with
    the number of monomials that a polynomial needs to answer all of them there.

    The numerical rank is known up to a bracket [least, most]. Up to n = 1024 it is
    one number, from all eigenvalues in float64. Above, a basis Q of n / 16 columns may
    determine it to 5 %; otherwise all eigenvalues do up to n = 4096, and n = 8192 has a
    basis of n / 2. The bracket holds for every Q: singular values of Q^T A are at most
    those of A, and the remainder has the square norm |A|^2 - |Q^T A|^2. `a..b` in
    the table is where the most and the least rank cross; the fits take the least, which
    is proven. From n = 4096 on every second entry bound is computed, up to the
    crossing at the error 0.01.

    Result: at each n there is a narrow range of entry bounds in which the rank
    of the polynomial grows from far below n to far above it, for every family, and that
    range is constant on the scale of (ln n)^(1/k): at an additive error of 0.01
    the `spread` of its location over all n is mostly a few hundredths, and for pairs
    the `exponent` of B over ln n is that of the `theory` within two standard errors,
    but for gap, where it is half of that. By the numerical rank no factored
    method has a small rank on these inputs beyond. Polynomials
    with n or n^2 monomials decide nothing at any entry bound, at any n: those that do
    have more than n^5.

    Limits: ln n at most doubles over the sizes that can be computed, so that an
    exponent can hardly be distinguished from a near one. It shifts with the additive
    error (mostly below 1/k at 0.1, above at 0.001), as the degree has a part that
    depends on the error alone; coordinates are a whole number that jumps from size to
    size; orders 3 and 4 are limited to small n, and for order 4 the fit over n from 8
    on is off by more than its errors for all families but bounded entries. The
    numerical rank crosses n/4 later, at the error 0.01 with two to three times the
    exponent: a row of weights 1/n has norm n^(-1/2), so that a fixed error forgives
    more as n grows. Where entries are larger still it falls again, as rows put their
    weight on few keys: hardness there is not a matter of rank. For satisfiability,
    whose vectors repeat, it stays below n / 4 at the error 0.01 throughout. And no rank
    says anything of methods that are not factored. The reductions that can be run state
    an entry bound far above the threshold: for orthogonal vectors, whose gap is 1, of
    order ln n, and it takes the distributed proofs of the theory to bring it down.
    Decisions are of random instances, easy for other algorithms. The lower bound is a
    theorem under a conjecture on satisfiability, not a measurement.
    """
    part = Path(results) / f"threshold{'-quick' if quick else ''}.part.jsonl"
    sizes = QUICK if quick else SIZES
    sweeps = [
        (order, family, n)
        for order in sizes
        for n in sizes[order]
        for family in FAMILIES
    ]
    if not quick:
        sweeps += [(k, "bounded", n) for k, more in BOUNDED_ONLY.items() for n in more]
    # from cheap to costly: a run that is stopped has whole sizes
    sweeps.sort(key=lambda x: x[2] ** x[0])
    ratios = RATIOS[::2] if quick else RATIOS
    with part.open("a") as file:
        rows = [ThresholdRow(**row) for row in computed(sweeps, ratios, part, file)]
        found = summaries(rows)
        found += decision_rows(sizes[2], part, file, 6 if quick else _INSTANCES)
    part.unlink()
    return found


def summaries(rows: list[ThresholdRow]) -> list[dict]:
    """Rows of the table on ranks and times."""
    fits = lowerbounds.fit_transitions(rows)
    most = {
        (fit.order, fit.family, fit.error): fit
        for fit in fits
        if fit.measure == "numerical_rank_most"
    }
    found = []
    for fit in fits:
        if fit.measure == "numerical_rank":
            upper = most[fit.order, fit.family, fit.error]
            curves = curves_of(rows, fit)
            for curve, ends in zip(curves, curves_of(rows, upper), strict=True):
                curve.append(ends[2])
            found.append(summary(fit, curves, upper))
        elif fit.measure in SHARES and fit.measure != "numerical_rank_most":
            found.append(summary(fit, curves_of(rows, fit)))
    for order in (2, 3):
        curves, located = timed(rows, order)
        if located:
            fit = fit_locations(order, "bounded", SHOWN, "time", located)
            found.append(summary(fit, curves))
    return sorted(found, key=lambda x: [x["order"], x["family"], -x["error"]])


def computed(
    sweeps: list[tuple], ratios: tuple[float, ...], part: Path, file: TextIO
) -> list[dict]:
    """Rows of all sweeps; results of an earlier run of the same code are reused."""
    code = code_of_cells()
    done, rows = recall(part, code), []
    with steps("threshold", len(sweeps)) as step:
        for sweep in sweeps:
            found: list[dict] = []
            for ratio in ratios:
                key = (*sweep, ratio)
                if key not in done:
                    done[key] = [dataclasses.asdict(row) for row in cell(*key)]
                    record(file, code, key, done[key])
                found += done[key]
                if is_over(found):
                    break
            rows += found
            step()
    return rows


def is_over(rows: list[dict]) -> bool:
    """Whether all ranks of a sweep have crossed, the polynomials' by far."""
    last = rows[-len(ERRORS) :]
    if min(row["rank"] / row["n"] for row in last) < _FAR_BEYOND:
        return False
    share, known, crossed = SHARES["numerical_rank"], set(), set()
    for row in rows:
        if row["numerical_rank"] is not None:
            known.add(row["error"])
            if row["numerical_rank"] >= share * row["n"]:
                crossed.add(row["error"])
    wanted = {x for x in ERRORS if x <= SHOWN or rows[0]["n"] < _SPARSE}
    return known & wanted <= crossed


def cell(order: int, family: str, n: int, ratio: float) -> tuple[ThresholdRow, ...]:
    """One entry bound on the one instance of an order, a family and a size."""
    looked_at = n < _SPARSE or ratio in RATIOS[::2]
    return lowerbounds.threshold_sweep(
        order,
        sizes=[n],
        families=[family],
        ratios=[ratio],
        errors=ERRORS,
        largest_spectrum=_SPARSE if looked_at else 0,
        largest_bracket=8192 if looked_at else 0,
        queries=max(_FEWEST, min(256, _LOGITS // n ** (order - 1))),
        rng=0,
    )


def code_of_cells() -> str:
    """Digest of a cell: the modules that make it, and the settings here."""
    settings = (ERRORS, RATIOS, _SPARSE, _LOGITS, _FEWEST)
    return f"{_sources(_OF_SWEEPS)} {settings}"


def code_of_decisions() -> str:
    """Digest of an answer, as for cells."""
    return f"{_sources(_OF_SWEEPS + _OF_DECISIONS)} {deciding.FACTORS}"


def _sources(modules: tuple) -> str:
    """Digest of modules; one of the whole package would change with every edit."""
    text = "".join(inspect.getsource(module) for module in modules)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decision_rows(
    sizes: tuple[int, ...], part: Path, file: TextIO, count: int
) -> list[dict]:
    """Rows of the table on decisions of methods of a fixed budget."""
    code = code_of_decisions()
    done, found = recall(part, code), []
    with steps("decisions", len(deciding.FAMILIES) * len(sizes)) as step:
        for family in deciding.FAMILIES:
            decided = {}
            for n in sizes:
                key = ("decided", family, n, count)
                if key not in done:
                    done[key] = deciding.decided(family, n, count)
                    record(file, code, key, done[key])
                decided[n] = done[key]
                step()
            found += decision_summaries(family, decided, count)
    return found


def decision_summaries(family: str, decided: dict[int, dict], count: int) -> list[dict]:
    """A row for each method, and one for the stated bound and its monomials."""
    found = []
    for method in next(iter(decided.values()))["shares"]:
        curves, located, best = [], {}, []
        for n, x in decided.items():
            ratios = [factor * x["stated"] for factor in deciding.FACTORS]
            shares = x["shares"][method]
            curves.append([n, ratios, shares])
            best.append(f"{n}: {max(shares):.2f}")
            place = crossing(list(zip(ratios, np.array(shares) / _MIDDLE, strict=True)))
            if place is not None:
                located[n] = place
        fit = fit_locations(2, family, math.nan, f"decided, {method}", located)
        row = summary(fit, curves)
        row |= {"crossed": f"{_MIDDLE:g} right", "statement": f"{count} instances an n"}
        if not located:
            row |= {"crossed": "never", "at n": "most right: " + ", ".join(best)}
        found.append(row)
    stated = {n: x["stated"] for n, x in decided.items()}
    fit = fit_locations(2, family, math.nan, "entry bound of the reduction", stated)
    least = ", ".join(f"{n}: n^{x['least']:.3g}" for n, x in decided.items())
    row = summary(fit, []) | {"crossed": "as stated", "statement": "exact"}
    row["at n"] += f"; monomials that decide there: {least}"
    return [*found, row]


def curves_of(rows: list[ThresholdRow], fit: Transition) -> list:
    """Each size with its ratios and ranks over n; None where a rank is infinite."""
    curves: dict[int, list] = {}
    for row in rows:
        rank = getattr(row, fit.measure)
        same = (row.order, row.family, row.error) == (fit.order, fit.family, fit.error)
        if same and rank is not None:
            share = rank / row.n if math.isfinite(rank) else None
            curves.setdefault(row.n, []).append((row.ratio, share))
    return [[n, *map(list, zip(*curve, strict=True))] for n, curve in curves.items()]


def timed(rows: list[ThresholdRow], order: int) -> tuple[list, dict[int, float]]:
    """Time of the polynomial method over exact attention on bounded entries.

    A curve for each of the largest sizes, and where it crosses 1.
    """
    curves, located = [], {}
    sizes = sorted({row.n for row in rows if row.order == order})[-3:]
    for n in sizes:
        curve = [
            (row.ratio, time_over_exact(row))
            for row in rows
            if (row.order, row.family, row.n, row.error) == (order, "bounded", n, SHOWN)
            and 1 < row.rank <= _MOST_OVER_N * n
        ]
        if curve:
            curves.append([n, *map(list, zip(*curve, strict=True))])
        # small heads take long for other reasons: the last crossing counts
        below = [i for i, (_, time) in enumerate(curve) if time < 1]
        place = crossing(curve[below[-1] :]) if below else None
        if place is not None:
            located[n] = place
    return curves, located


def time_over_exact(row: ThresholdRow) -> float:
    """Time of the least whole degree over that of exact attention, in float32."""
    made = factors_of("bounded", row.order, row.n, 1.0, np.random.default_rng(0))
    query, *keys = (
        (row.entry_bound * x).astype(np.float32) for x in (made.query, *made.keys)
    )
    values = [x[:, None].astype(np.float32) for x in made.values]
    arguments = (query, keys[0], values[0])
    if row.order > 2:
        arguments = (query, tuple(keys), tuple(values))

    def call(method):
        # the degree is known to meet the error: no certificate is needed
        return fastattn.approximate(
            *arguments, scale=made.scale, method=method, tol=1e6, rng=0
        )

    method = fastattn.Polynomial(degree=math.ceil(row.degree))
    ratio = faster(lambda: call(method), lambda: call(fastattn.Exact()), pairs=5)
    return 1 / ratio.median


def summary(fit: Transition, curves: list, upper: Transition | None = None) -> dict:
    """One row of the table; lists are for the figure.

    ``upper`` is of the upper end of a rank that is known between two ends.
    """
    ends = dict(zip(fit.sizes, fit.locations, strict=True))
    if upper is not None:
        ends |= {n: upper.locations[upper.sizes.index(n)] for n in fit.sizes}
    places = [
        f"{n}: {place:.3f}"
        if place - ends[n] < _SAME
        else f"{n}: {ends[n]:.3f}..{place:.3f}"
        for n, place in zip(fit.sizes, fit.locations, strict=True)
    ]
    return {
        "order": fit.order,
        "family": fit.family,
        "error": "" if math.isnan(fit.error) else fit.error,
        "measure": fit.measure,
        "crossed": f"{SHARES[fit.measure]:g} n" if fit.measure in SHARES else "exact",
        "B / (ln n)^(1/k)": fit.location,
        "spread": fit.spread,
        "exponent": fit.exponent,
        "standard error": fit.exponent_error,
        "theory": 1 / fit.order,
        "statement": _STATEMENTS.get(fit.measure, ""),
        "at n": ", ".join(places),
        "sizes": list(fit.sizes),
        "locations": list(fit.locations),
        "curves": curves,
    }
