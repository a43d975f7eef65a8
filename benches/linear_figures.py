"""Figures of the studies of linear against softmax attention."""

from itertools import groupby
from pathlib import Path

# larger errors are drawn on the edge
_LARGEST = 3.0
# panels in a row: as many as a page has room for
_COLUMNS = 3


def _figure(count: int, title: str):
    # a Figure of its own draws with Agg and leaves pyplot's state unchanged
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    size = (9.2, 4.2) if rows == 1 else (9.2, 2.8 * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def draw_two_classes(record: dict, path: str | Path) -> None:
    """Draw the share of successes of each model against the swept parameter."""
    rows = [row for row in record["rows"] if row["sweep"] != "centre"]
    sweeps = [list(some) for _, some in groupby(rows, key=lambda row: row["sweep"])]
    title = "two classes distinguished (reconstruction of arXiv 2310.11685)"
    figure, panels = _figure(len(sweeps), title)
    models = [name for name in rows[0] if name not in ("sweep", "at", "draws")]
    for panel, some in zip(panels, sweeps, strict=True):
        for model, marker in zip(models, "osvD", strict=False):
            points = [row["at"] for row in some], [row[model] for row in some]
            panel.plot(*points, marker=marker, label=model, alpha=0.8)
        panel.set(xlabel=some[0]["sweep"], ylim=(-0.05, 1.05))
        panel.grid(alpha=0.25)
        if some[0]["sweep"] in ("m", "d", "n"):
            panel.set_xscale("log", base=2)
    for panel in panels[::_COLUMNS]:
        panel.set_ylabel("share of draws")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_single_location(record: dict, path: str | Path) -> None:
    """Draw the risk of each model against the swept parameter."""
    rows = record["rows"]
    sweeps = [list(some) for _, some in groupby(rows, key=lambda row: row["sweep"])]
    figure, panels = _figure(len(sweeps), "one informative token: risk after learning")
    models = [name for name in rows[0] if name not in ("sweep", "at")]
    for panel, some in zip(panels, sweeps, strict=True):
        for model, marker in zip(models, "xosvD", strict=False):
            points = [row["at"] for row in some], [row[model] for row in some]
            panel.plot(*points, marker=marker, label=model, alpha=0.8)
        panel.set(xlabel=some[0]["sweep"], yscale="log")
        panel.grid(alpha=0.25)
        if some[0]["sweep"] == "length":
            panel.set_xscale("log", base=2)
    panels[0].set_ylabel("risk over the variance of the target")
    _legend(figure, panels[0])
    figure.savefig(path, dpi=110)


def draw_recall(record: dict, path: str | Path) -> None:
    """Draw accuracy against the number of pairs, and against that over the state."""
    rows = record["rows"]
    figure, panels = _figure(2, "values recalled for their keys")
    for method in dict.fromkeys(row["method"] for row in rows):
        some = [row for row in rows if row["method"] == method]
        accuracy = [row["accuracy"] for row in some]
        for panel, over in zip(panels, ("pairs", "pairs over state"), strict=True):
            panel.plot([row[over] for row in some], accuracy, marker="o", label=method)
            panel.set(xlabel=over, xscale="log", ylim=(-0.05, 1.05))
            panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy")
    _legend(figure, panels[0])
    figure.savefig(path, dpi=110)


def draw_heads(record: dict, path: str | Path) -> None:
    """Draw the error of each map against statistics of the head's weights."""
    rows = record["rows"]
    measures = "keys of a row", "rank at 10 %"
    figure, panels = _figure(2, "error of linear attention on real heads")
    maps = [name for name in rows[0] if name not in ("head", "n", *measures)]
    for panel, measure in zip(panels, measures, strict=True):
        some = sorted(rows, key=lambda row: row[measure])
        for name, marker in zip(maps, "os^vDPX*d", strict=False):
            errors = [min(row[name], _LARGEST) for row in some]
            panel.plot([row[measure] for row in some], errors, marker, label=name)
        panel.set(xlabel=measure, xscale="log", yscale="log")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("relative error")
    _legend(figure, panels[0])
    figure.savefig(path, dpi=110)


def _legend(figure, panel) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
