"""Figures of stored results: ``python -m benches.figures RESULT.json PICTURE``.

The part file of an unfinished study of peers, ``peers.part.jsonl``, can be drawn too.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from benches.curve_figures import draw_attack, draw_growth, draw_map, draw_sketch_error
from benches.linear_figures import (
    draw_heads,
    draw_recall,
    draw_single_location,
    draw_two_classes,
)
from benches.resume import part_lines
from benches.threshold_figures import draw_decisions, draw_threshold

_COLUMNS = 4
# errors outside are drawn on the edge
_ERRORS = (5e-4, 3.0)
_MARKERS = "osv^DPX<>*ph8d"


def draw_peers(record: dict, path: str | Path) -> None:
    """Draw error against time over torch's, a panel for each head."""
    # a Figure of its own draws with Agg and leaves pyplot's state unchanged
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if "family" in row]
    heads = list(dict.fromkeys(row["head"] for row in rows))
    tall = math.ceil(len(heads) / _COLUMNS)
    figure = Figure(figsize=(16, 3.8 * tall + 1.4), layout="constrained")
    panels = list(figure.subplots(tall, _COLUMNS, squeeze=False).flat)
    looks = dict(styles(rows))
    for head, panel in zip(heads, panels, strict=False):
        _panel(panel, [row for row in rows if row["head"] == head], looks)
    for panel in panels[len(heads) :]:
        panel.set_axis_off()
    handles = {}
    for panel in panels:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=5,
        fontsize=9,
    )
    figure.suptitle(
        "relative error against time over torch's scaled_dot_product_attention "
        f"({record['threads']} thread, float32); lines: the best of ours, of the others"
    )
    figure.savefig(path, dpi=110)


def styles(rows: list[dict]) -> Iterator[tuple[str, dict]]:
    """Yield a marker and a colour for each family: ours in reds and filled."""
    from matplotlib import colormaps

    families = dict.fromkeys((row["family"], row["ours"]) for row in rows)
    ours = [family for family, mine in families if mine]
    others = [family for family, mine in families if not mine]
    for number, family in enumerate(ours):
        colour = colormaps["autumn"](number / max(2, len(ours)))
        look = {"color": colour, "marker": "oDsP"[number % 4], "s": 42, "zorder": 3}
        yield family, look
    for number, family in enumerate(others):
        # the ten dark colours first
        colour = colormaps["tab20"]((2 * number + number // 10) % 20)
        marker = _MARKERS[number % len(_MARKERS)]
        yield family, {"edgecolor": colour, "facecolor": "none", "marker": marker}


def _panel(panel, rows: list[dict], looks: dict) -> None:
    for family in dict.fromkeys(row["family"] for row in rows):
        points = [point(row) for row in rows if row["family"] == family]
        panel.scatter(*zip(*points, strict=True), label=family, **looks[family])
    for ours, colour in ((True, "tab:red"), (False, "0.45")):
        best = front([point(row) for row in rows if row["ours"] is ours])
        if best:
            line = {"where": "post", "color": colour, "lw": 1, "zorder": 1}
            panel.step(*zip(*best, strict=True), **line)
    panel.axvline(1.0, color="0.8", lw=1, zorder=0)
    panel.set(
        xscale="log",
        yscale="log",
        ylim=(_ERRORS[0] / 1.3, _ERRORS[1] * 1.3),
        title=f"{rows[0]['head']}  (n={rows[0]['n']})",
        xlabel="time over torch's",
        ylabel="relative error",
    )
    panel.grid(alpha=0.25)


def point(row: dict) -> tuple[float, float]:
    """Time and error, the error clipped to the range of a panel."""
    return row["time over torch"], min(max(row["error"], _ERRORS[0]), _ERRORS[1])


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that none beats in both, by increasing time."""
    best: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((time, error))
    return best


FIGURES = {
    "growth": draw_growth,
    "map": draw_map,
    "sketch-error": draw_sketch_error,
    "attack": draw_attack,
    "decisions": draw_decisions,
    "threshold": draw_threshold,
    "peers": draw_peers,
    "softmax-vs-linear": draw_two_classes,
    "single-location": draw_single_location,
    "recall": draw_recall,
    "linear-heads": draw_heads,
}


def main(argv=None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    record = _read(Path(arguments[0]))
    if record["study"] not in FIGURES:
        print(
            f"{arguments[0]}: study {record['study']!r} has no picture, only "
            f"{list(FIGURES)} have",
            file=sys.stderr,
        )
        return 2
    FIGURES[record["study"]](record, arguments[1])
    return 0


def _read(path: Path) -> dict:
    """A result, or the rows of the heads that an unfinished run has done."""
    if path.suffix != ".jsonl":
        return json.loads(path.read_text())
    # of a head that was measured again, the last
    heads = {tuple(x["key"]): x["trial"] for x in part_lines(path)}
    rows = [row for trial in heads.values() for row in trial]
    return {"study": path.name.partition(".")[0], "threads": 1, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
