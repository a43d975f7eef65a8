"""Sweeps over the entry bound: where the rank that attention needs passes n."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from rich.progress import Progress

import fastattn
import lowerbounds
from benches.measure import faster
from benches.resume import fingerprint, recall, record
from lowerbounds.threshold import FAMILIES, RATIOS, ThresholdRow, factors_of
from lowerbounds.transitions import SHARES, Transition, crossing, fit_locations

ERRORS = (1e-1, 1e-2, 1e-3)
# the error of the figures, and at which times are taken
SHOWN = 1e-2
SIZES = {2: (256, 512, 1024, 2048, 4096), 3: (16, 32, 64, 128, 256), 4: (8, 16, 32)}
QUICK = {2: (128, 256, 512), 3: (16, 32, 64), 4: (8, 16, 32)}
# further sizes of bounded entries, whose coordinates are few
BOUNDED_ONLY = {2: (8192,), 3: (), 4: (64,)}
# singular values take time proportional to n cubed
_LARGEST_SPECTRUM = {"bounded": 2048}
_OTHER_SPECTRUM = 1024
# logits of the queries on which polynomials are judged, and the fewest queries
_LOGITS, _FEWEST = 1 << 21, 16
# a sweep ends once every polynomial has so many times n monomials
_FAR_BEYOND = 10
# polynomials are timed while they have at most so many times n monomials
_MOST_OVER_N = 4


def threshold(*, quick, results):
    """Where the rank that an additive error takes passes n, over B / (ln n)^(1/k).

    Theory: below entries of order (ln n)^(1/k) a polynomial of low degree makes
    attention of order k nearly linear; above, nothing beats looking at all tuples if
    satisfiability is as hard as believed. For each order, family and n the sweep finds
    the ratio B / (ln n)^(1/k) at which a rank passes n: `rank`, of the least degree
    that reaches the error on the inputs; `predicted_rank`, by the formula for the
    worst inputs; `numerical_rank`, n / 4 singular values, which every factored method
    needs; `time`, where the polynomial method takes as long as exact attention.

    What this shows: at each n there is a narrow range of entry bounds in which the
    rank of the polynomial grows from far below n to far above it, for every family, and
    that range stays where it is on the scale of (ln n)^(1/k): at an additive error of
    0.01 the `spread` of its location over all n is mostly a few hundredths, and for
    pairs the `exponent` of B over ln n is that of the `theory` within two standard
    errors. The numerical rank says that no factored method, however it is found, has a
    small rank on these inputs beyond.

    What it cannot show: ln n at most doubles over the sizes that can be computed, so
    that an exponent is hardly told from a near one. It shifts with the additive error
    (mostly below 1/k at 0.1, above at 0.001), as the degree has a part that depends on
    the error alone; coordinates are a whole number that jumps from size to size; orders
    3 and 4 reach small n only, and for order 4 the fit over n from 8 on is off by more
    than its errors for all families but bounded entries. The numerical rank crosses
    n / 4 later, at two to three times the exponent: a row of weights 1 / n has norm
    n^(-1/2), so that a fixed error forgives more as n grows. Where entries are larger
    still it falls again, as rows look at few keys: hardness there is not a matter of
    rank. And no rank says anything of methods that are not factored. The lower bound is
    a theorem under a conjecture on satisfiability, not a measurement.
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
    # from cheap to costly: what is stopped has whole sizes
    sweeps.sort(key=lambda x: x[2] ** x[0])
    ratios = RATIOS[::2] if quick else RATIOS
    rows = [ThresholdRow(**row) for row in computed(sweeps, ratios, part)]
    found = [
        summary(fit, curves_of(rows, fit)) for fit in lowerbounds.fit_transitions(rows)
    ]
    for order in (2, 3):
        curves, located = timed(rows, order)
        if located:
            fit = fit_locations(order, "bounded", SHOWN, "time", located)
            found.append(summary(fit, curves))
    part.unlink()
    return sorted(found, key=lambda x: [x["order"], x["family"], -x["error"]])


def computed(sweeps: list[tuple], ratios: tuple[float, ...], part: Path) -> list[dict]:
    """Rows of all sweeps; what an earlier run of the same code found is recalled."""
    code = code_of_cells()
    done, rows = recall(part, code), []
    with Progress() as progress, part.open("a") as file:
        task = progress.add_task("threshold", total=len(sweeps))
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
            progress.advance(task)
    return rows


def is_over(rows: list[dict]) -> bool:
    """Whether all ranks of a sweep have crossed, the polynomials' by far."""
    last = rows[-len(ERRORS) :]
    if min(row["rank"] / row["n"] for row in last) < _FAR_BEYOND:
        return False
    share = SHARES["numerical_rank"]
    crossed = {
        row["error"]
        for row in rows
        if row["numerical_rank"] is None or row["numerical_rank"] >= share * row["n"]
    }
    return crossed == set(ERRORS)


def cell(order: int, family: str, n: int, ratio: float) -> tuple[ThresholdRow, ...]:
    """One entry bound on the one instance of an order, a family and a size."""
    return lowerbounds.threshold_sweep(
        order,
        sizes=[n],
        families=[family],
        ratios=[ratio],
        errors=ERRORS,
        largest_spectrum=_LARGEST_SPECTRUM.get(family, _OTHER_SPECTRUM),
        queries=max(_FEWEST, min(256, _LOGITS // n ** (order - 1))),
        rng=0,
    )


def code_of_cells() -> str:
    """What a cell depends on: the sources, and the settings here."""
    settings = (ERRORS, _LARGEST_SPECTRUM, _OTHER_SPECTRUM, _LOGITS, _FEWEST)
    return f"{fingerprint(lowerbounds)} {settings}"


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
        # the degree is known to reach the error: nothing is asked of the certificate
        return fastattn.approximate(
            *arguments, scale=made.scale, method=method, tol=1e6, rng=0
        )

    method = fastattn.Polynomial(degree=math.ceil(row.degree))
    ratio = faster(lambda: call(method), lambda: call(fastattn.Exact()), pairs=5)
    return 1 / ratio.median


def summary(fit: Transition, curves: list) -> dict:
    """One row of the table; lists are for the figure."""
    places = zip(fit.sizes, fit.locations, strict=True)
    return {
        "order": fit.order,
        "family": fit.family,
        "error": fit.error,
        "measure": fit.measure,
        "crossed": f"{SHARES[fit.measure]:g} n" if fit.measure in SHARES else "exact",
        "B / (ln n)^(1/k)": fit.location,
        "spread": fit.spread,
        "exponent": fit.exponent,
        "standard error": fit.exponent_error,
        "theory": 1 / fit.order,
        "at n": ", ".join(f"{n}: {place:.3f}" for n, place in places),
        "sizes": list(fit.sizes),
        "locations": list(fit.locations),
        "curves": curves,
    }
