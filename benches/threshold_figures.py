"""Figures of sweeps over the entry bound, and of deciders of a fixed rank."""

import math
from pathlib import Path

_LINES = {"rank": "-", "numerical_rank": "--", "predicted_rank": ":", "time": "-."}
_NAMES = {
    "rank": "polynomial of the least degree",
    "numerical_rank": "singular values needed",
    "predicted_rank": "formula, worst case",
    "time": "time of the polynomial over exact",
}
_EXACT, _STATED = "decided, exact", "entry bound of the reduction"
# ranks over n that are shown
_RANGE = (3e-3, 1e3)
_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20)


def draw_threshold(record: dict, path: str | Path, error: float = 1e-2) -> None:
    """Draw rank over n against the entry bound, a panel for each order and family.

    The last panel of an order has the entry bounds at which the ranks cross, over
    ln n, with the slope of the theory. The last line of panels is on decisions.
    """
    from matplotlib.figure import Figure

    decisions = [row for row in record["rows"] if row["error"] == ""]
    rows = [row for row in record["rows"] if row["error"] == error]
    orders = sorted({row["order"] for row in rows})
    families = sorted({row["family"] for row in rows})
    figure = Figure(
        figsize=(3.6 * (len(families) + 1), 3.4 * len(orders) + 4.4),
        layout="constrained",
    )
    panels = figure.subplots(len(orders) + 1, len(families) + 1, squeeze=False)
    _draw_decided(panels[-1], decisions, families)
    panels = panels[:-1]
    for order, line in zip(orders, panels, strict=True):
        mine = [row for row in rows if row["order"] == order]
        for family, panel in zip(families, line, strict=False):
            _draw_curves(panel, [row for row in mine if row["family"] == family])
            panel.set_title(f"order {order}, {family}")
        _draw_sizes(line[0], mine)
        _draw_locations(line[-1], mine, order)
    handles = {}
    for panel in panels[:, -1]:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=6,
        fontsize=9,
    )
    figure.suptitle(
        f"rank over n that additive error {error:g} takes, against the entry bound B: "
        "finite n illustrate the threshold of the theory, they do not prove it"
    )
    figure.savefig(path, dpi=100)


def _draw_curves(panel, rows: list[dict]) -> None:
    for row in rows:
        for n, ratios, shares, *upper in row["curves"]:
            known = [
                (x, min(max(y, _RANGE[0]), _RANGE[1]))
                for x, y in zip(ratios, shares, strict=True)
                if y is not None
            ]
            panel.plot(
                *zip(*known, strict=True),
                color=_colour(n),
                ls=_LINES[row["measure"]],
                lw=1.3,
            )
            for most in upper:
                panel.fill_between(ratios, shares, most, color=_colour(n), alpha=0.2)
    panel.axhline(1, color="tab:red", lw=1)
    panel.set(
        xscale="log",
        yscale="log",
        ylim=_RANGE,
        xlabel=r"$B / (\ln n)^{1/k}$",
        ylabel="rank / n",
    )
    panel.grid(alpha=0.25)
    _label(panel.xaxis)


def _draw_decided(line, rows: list[dict], families: list[str]) -> None:
    """Right answers against the entry bound, and where exact attention decides."""
    for family, panel in zip(families, line, strict=False):
        mine = [row for row in rows if row["family"] == family and row["curves"]]
        if not mine:
            panel.axis("off")
            continue
        for row in mine:
            # the polynomials' lines coincide
            look = {"ls": "-"} if row["measure"] == _EXACT else {"ls": ":", "lw": 3}
            for n, ratios, shares in row["curves"]:
                panel.plot(ratios, shares, color=_colour(n), **look)
        panel.plot([], [], color="0.3", label="exact attention")
        panel.plot([], [], color="0.3", ls=":", lw=3, label="n or n^2 monomials")
        panel.legend(fontsize=7, loc="lower right")
        panel.set(
            xscale="log",
            ylim=(0.3, 1.05),
            title=f"order 2, {family}: decisions",
            xlabel=r"$B / (\ln n)^{1/2}$",
            ylabel="right answers",
        )
        panel.grid(alpha=0.25)
        _label(panel.xaxis)
    looks = {_EXACT: ("-", "exact decides"), _STATED: (":", "stated by the reduction")}
    _draw_bounds(line[-1], rows, 2, families, {x: y for x, (y, _) in looks.items()})
    for style, name in looks.values():
        line[-1].plot([], [], color="0.3", ls=style, label=name)
    line[-1].legend(fontsize=7)
    line[-1].set(ylabel="B that decides", title="order 2: decisions")


def _colour(n: int) -> tuple:
    """One colour for each n, whatever the order."""
    from matplotlib import colormaps

    return colormaps["viridis"](1 - math.log2(n) / 14)


def _draw_sizes(panel, rows: list[dict]) -> None:
    """Add a legend of the colours of n."""
    for n in sorted({n for row in rows for n, *_ in row["curves"]}):
        panel.plot([], [], color=_colour(n), label=f"n = {n}")
    panel.legend(fontsize=6, loc="upper left")


def _label(axis, ticks=_TICKS) -> None:
    """Plain numbers where the ticks of a logarithmic axis would overlap."""
    low, high = axis.get_view_interval()
    axis.set_ticks([x for x in ticks if low <= x <= high])
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _draw_locations(panel, rows: list[dict], order: int) -> None:
    families = sorted({row["family"] for row in rows})
    _draw_bounds(panel, rows, order, families, _LINES)
    for number, family in enumerate(families):
        panel.plot([], [], color=f"C{number}", marker=".", label=family)
    for measure in dict.fromkeys(row["measure"] for row in rows):
        panel.plot([], [], color="0.3", ls=_LINES[measure], label=_NAMES[measure])
    panel.plot([], [], color="0.75", label=r"slope of the theory, $(\ln n)^{1/k}$")
    panel.set(ylabel="B where it crosses", title=f"order {order}: location")


def _draw_bounds(
    panel, rows: list[dict], order: int, families: list[str], lines: dict[str, str]
) -> None:
    """Draw entry bounds over ln n, with lines of the slope of the theory."""
    known = []
    for row in rows:
        log_n = [math.log(n) for n in row["sizes"]]
        bounds = [
            place * x ** (1 / order)
            for place, x in zip(row["locations"], log_n, strict=True)
        ]
        known += zip(log_n, bounds, strict=True)
        if row["measure"] in lines:
            colour = f"C{families.index(row['family'])}"
            panel.plot(
                log_n, bounds, color=colour, ls=lines[row["measure"]], marker="."
            )
    if known:
        ends = [min(x for x, _ in known), max(x for x, _ in known)]
        middle = math.prod(y / x ** (1 / order) for x, y in known) ** (1 / len(known))
        for constant in (0.5 * middle, middle, 2 * middle):
            theory = [constant * x ** (1 / order) for x in ends]
            panel.plot(ends, theory, color="0.75", lw=0.8, zorder=0)
    panel.set(xscale="log", yscale="log", xlabel=r"$\ln n$")
    panel.grid(alpha=0.25, which="both")
    _label(panel.xaxis, range(1, 20))
    _label(panel.yaxis, (*_TICKS, 50))


def draw_decisions(record: dict, path: str | Path) -> None:
    """Draw right answers against the entry bound, a panel an order and family."""
    from matplotlib.figure import Figure

    rows = record["rows"]
    orders, families = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("order", "family")
    )
    size = 3.6 * len(families), 3.6 * len(orders) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(orders), len(families), squeeze=False)
    for order, line in zip(orders, panels, strict=True):
        for family, panel in zip(families, line, strict=True):
            mine = [x for x in rows if (x["order"], x["family"]) == (order, family)]
            _draw_shares(panel, mine)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    figure.suptitle("decisions of a fixed rank as the entries grow")
    figure.savefig(path, dpi=100)


def _draw_shares(panel, rows: list[dict]) -> None:
    """Right answers of every method to one family of one order."""
    if not rows:
        panel.axis("off")
        return
    for number, row in enumerate(rows):
        # coinciding lines show as nested widths
        panel.plot(
            row["ratios"],
            row["shares"],
            label=row["method"],
            color=f"C{number}",
            lw=2 * (len(rows) - number),
            alpha=0.7,
        )
    first = rows[0]
    panel.axvline(first["stated"], color="0.6", lw=1, label="stated entry bound")
    panel.axhline(0.5, color="0.85", lw=1)
    panel.set(
        xscale="log",
        ylim=(-0.02, 1.05),
        title=f"order {first['order']}, {first['family']}, n = {first['n']}",
        xlabel=r"$B / (\ln n)^{1/k}$",
        ylabel="right answers",
    )
    panel.grid(alpha=0.25)
    _label(panel.xaxis)
