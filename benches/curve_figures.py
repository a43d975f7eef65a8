"""Figures of curves and maps: growth, fastest methods, sketches, attacks."""

import math
from collections.abc import Iterable
from pathlib import Path

_MARKERS = "osvD^P*X<>"
# a cell of the map has the darkest colour from so many times faster on
_FASTEST = 32.0


def _figure(columns: int, title: str, *, width: float = 6.0, height: float = 5.0):
    # a Figure of its own draws with Agg and leaves pyplot's state unchanged
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _by(rows: Iterable[dict], column: str) -> dict:
    """Rows by what a column says, in their order."""
    found: dict = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


def draw_growth(record: dict, path: str | Path) -> None:
    """Draw time and memory of every method against n, with the fitted exponents."""
    rows = [row for row in record["rows"] if row.get("n")]
    figure, panels = _figure(2, "time and memory against n, one thread", width=7.5)
    what = ("time over a product", "MB beyond inputs and output")
    labels = ("time over that of a product of 1024 x 1024 matrices", what[1])
    for number, (method, some) in enumerate(_by(rows, "method").items()):
        look = {"marker": _MARKERS[number % 10], "color": f"C{number % 10}", "ms": 5}
        label = f"{method}: n^{some[0]['fitted exponent']:.2f}"
        sizes = [row["n"] for row in some]
        times = [row[what[0]] for row in some]
        panels[0].plot(sizes, times, label=label, **look)
        ends = [[row[f"{what[0]}, {x}"] for row in some] for x in ("least", "most")]
        panels[0].fill_between(sizes, *ends, color=look["color"], alpha=0.15, lw=0)
        # less than about a page counts as one
        memory = [max(row[what[1]], 0.1) for row in some]
        panels[1].plot(sizes, memory, label=method, **look)
    for panel, label in zip(panels, labels, strict=True):
        panel.set(xlabel="n", ylabel=label, yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_map(record: dict, path: str | Path) -> None:
    """Draw the fastest method of each cell, and the choice of Auto()."""
    from benches.maps import AUTO, winners

    rows = record["rows"]
    sizes, bounds = (sorted(_by(rows, x)) for x in ("n", "entries"))
    figure, panels = _figure(
        2,
        "times faster than torch's scaled_dot_product_attention within tol 0.1, "
        "entries uniform in [-B, B]",
        width=max(4.5, 1.6 + 1.0 * len(bounds)),
        height=2.4 + 0.7 * len(sizes),
    )
    auto = {(row["n"], row["entries"]): row for row in rows if row["method"] == AUTO}
    for panel, cells, title in (
        (panels[0], winners(rows), "the fastest method"),
        (panels[1], auto, "Auto(), with what it chose"),
    ):
        speeds = [[_speed(cells.get((n, b))) for b in bounds] for n in sizes]
        logs = [[math.log2(x) if x else math.nan for x in line] for line in speeds]
        limit = math.log2(_FASTEST)
        image = panel.imshow(
            logs, cmap="RdYlGn", vmin=-limit, vmax=limit, origin="lower", aspect="auto"
        )
        for i, n in enumerate(sizes):
            for j, bound in enumerate(bounds):
                row = cells.get((n, bound))
                name = (
                    row["ran"] if cells is auto and row else (row or {}).get("method")
                )
                text = f"{speeds[i][j]:.2g}\n{_short(name)}" if speeds[i][j] else "none"
                panel.text(j, i, text, ha="center", va="center", fontsize=7)
        panel.set_xticks(range(len(bounds)), [f"{x:g}" for x in bounds])
        panel.set_yticks(range(len(sizes)), [str(n) for n in sizes])
        panel.set(xlabel="bound B on the entries", ylabel="n", title=title)
    ticks = range(-int(limit), int(limit) + 1)
    bar = figure.colorbar(image, ax=panels, ticks=list(ticks))
    bar.ax.set_yticklabels([f"{2.0**x:g}" for x in ticks])
    figure.savefig(path, dpi=110)


def _speed(row: dict | None) -> float | None:
    """Times faster, if the method met its tolerance."""
    speed = row and row["times faster than torch"]
    return speed if speed and math.isfinite(speed) else None


def _short(name: str) -> str:
    """Break a name so that it fits a cell."""
    return name.replace(", ", ",\n").replace("landmarks", "landm.")


def draw_sketch_error(record: dict, path: str | Path) -> None:
    """Draw errors of sketched distances against the rows of a sketch."""
    figure, (panel,) = _figure(1, "relative error of sketched distances")
    for number, (sketches, some) in enumerate(_by(record["rows"], "sketches").items()):
        sizes = [row["rows"] for row in some]
        name = "one sketch" if sketches == 1 else f"median of {sketches} sketches"
        for column, line in (("root mean square", "-"), ("largest", "--")):
            errors = [row[column] for row in some]
            label = f"{name}, {column}"
            panel.plot(sizes, errors, f"o{line}", color=f"C{number}", label=label)
    some = next(iter(_by(record["rows"], "sketches").values()))
    law = [row["sqrt(1 / 2m)"] for row in some]
    panel.plot([row["rows"] for row in some], law, color="0.5", label="sqrt(1 / 2m)")
    panel.set(xlabel="rows m of a sketch", ylabel="relative error", yscale="log")
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_attack(record: dict, path: str | Path) -> None:
    """Draw answered distances over true ones, against the steps of the attack."""
    figure, (panel,) = _figure(1, "hill climbing on the answers about one point")
    for number, (mode, some) in enumerate(_by(record["rows"], "mode").items()):
        steps = [max(row["steps"], 1) for row in some]
        told = [row["told over the truth"] for row in some]
        label = f"{mode}, claims {some[0]['claimed error']:.2g}"
        panel.plot(steps, told, "o-", ms=4, color=f"C{number}", label=label)
        ends = [[row[f"{x} of five"] for row in some] for x in ("least", "most")]
        panel.fill_between(steps, *ends, color=f"C{number}", alpha=0.2, lw=0)
    panel.axhline(1.0, color="0.7", lw=1, zorder=0)
    panel.set(xlabel="steps", ylabel="answered over true distance", xscale="log")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)
