"""Figures of block records: what a step consists of (as the paper's figure 8), every slot, and where chunks pay."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.harness.parts import EXPOSED, KINDS
from scmoe_ds.figure_style import OPERATORS, VERMILLION, WIDTH, styled

OTHER = "other"
_TITLES = {"forward": "forward pass", "train": "training step"}
_COLOURS = {
    "attention": OPERATORS["attention"],
    "MLP": OPERATORS["mlp"],
    "shared expert": OPERATORS["shared"],
    "gate, encode, decode, merge": OPERATORS["gate"],
    "experts": OPERATORS["experts"],
    EXPOSED: OPERATORS["combine"],
    OTHER: OPERATORS["other"],
}
_CAPTION = """\
Measured in {steps} steps of each schedule, mean of both ranks; other: what is left of the median step of the rounds.
Exposed communication: the computation stood still for it. In DeepSpeed's layers, which block, it is their all-to-alls;
gate, encode, decode, merge is what experts, shared expert and all-to-alls leave of the layer. 1.00 ×: the first row."""


def heights(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each part of a row's bar, from the bottom; what no part covers is "other"."""
    parts = {kind: max(0.0, row["parts_ms"][kind]) for kind in KINDS}
    return parts | {OTHER: max(0.0, row["median_ms"] - sum(parts.values()))}


@styled
def stacked(record: dict[str, Any], steps: int = 3) -> Figure:
    """Stacked bars, a panel for each mode.

    Args:
        record: of the main table.
        steps: how many steps the parts were taken from.
    """
    modes = record["modes"]
    rows = max(len(found["rows"]) for found in modes.values())
    height, below = 1.5 + 0.27 * rows, 0.6
    layout = ConstrainedLayoutEngine(rect=(0, below / (height + below), 1, height / (height + below)))
    figure = Figure(figsize=(WIDTH, height + below), layout=layout)
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    for axes, (mode, found) in zip(panels, modes.items(), strict=True):
        _draw_bars(axes, found["rows"])
        axes.set(xlabel="ms", title=_TITLES[mode])
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")
    caption = _CAPTION.format(steps=steps)
    figure.text(0.01, below / (height + below), caption, fontsize=8.5, va="top", in_layout=False)
    return figure


def _draw_bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    stacks = [heights(row) for row in rows]
    ends = [0.0] * len(rows)
    for kind, colour in _COLOURS.items():
        values = [stack[kind] for stack in stacks]
        axes.barh(places, values, 0.78, left=ends, label=kind, color=colour)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for place, row, end in zip(places, rows, ends, strict=True):
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{row['speedup']['median']:.2f} ×", (end, place), (4, 0), **style)
    axes.set_xlim(0, 1.16 * max(ends))
    axes.set_yticks(list(places), [row["variant"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


@styled
def crossing(record: dict[str, Any]) -> Figure:
    """Time over that of a single chunk against communication over window, a panel for each mode and position."""
    figure, panels = _panels(record, 4.6)
    for axes, rows in panels:
        names = list(dict.fromkeys(row["variant"] for row in rows))
        widest = max(row["communication_over_window"] for row in rows)
        for number, name in enumerate(names):
            points = sorted(
                (row for row in rows if row["variant"] == name), key=lambda row: row["communication_over_window"]
            )
            shift = 0.012 * widest * (number - (len(names) - 1) / 2)  # so that the spreads stand side by side
            ratios = [row["communication_over_window"] + shift for row in points]
            _with_errors(axes, ratios, [row["over_unchunked"] for row in points], name.split(", ")[1])
        axes.axvline(1, color="#999999", linewidth=1, linestyle="--", marker="")
        axes.set(xlabel="communication / window (calibrated)")
    panels[0][0].set_ylabel("time / time of one chunk (measured)")
    figure.legend(*axes.get_legend_handles_labels(), ncols=len(names), loc="outside upper center")
    return figure


@styled
def slots(record: dict[str, Any]) -> Figure:
    """Speed-up against the expert slot in one chunk, and that of the planner's choice, for each mode and position."""
    figure, panels = _panels(record, 3.1)
    for axes, rows in panels:
        fixed = {row["variant"].split()[-1]: row["speedup"] for row in rows}
        auto = fixed.pop("auto", None)
        _with_errors(axes, [int(slot) for slot in fixed], list(fixed.values()), "one chunk")
        if auto is not None:
            axes.axhline(auto["median"], color=VERMILLION, label="auto", marker="")
            axes.axhspan(auto["p10"], auto["p90"], color=VERMILLION, alpha=0.15, linewidth=0)
        axes.set(xlabel="slot of the experts", xticks=[int(slot) for slot in fixed])
        axes.grid(True)
    for axes in {each.get_subplotspec().rowspan.start: each for each, _ in reversed(panels)}.values():
        axes.set_ylabel("speed-up over the baseline")
    figure.legend(*axes.get_legend_handles_labels(), ncols=2, loc="outside upper center")
    return figure


def _panels(record: dict[str, Any], height: float) -> tuple[Figure, list[tuple[Axes, list[dict[str, Any]]]]]:
    """A panel with its rows for each mode and position; a row of panels, of one scale, for each mode."""
    groups = {
        mode: {
            position: [row for row in found["rows"] if row["position"] == position]
            for position in dict.fromkeys(row["position"] for row in found["rows"] if row["position"])
        }
        for mode, found in record["modes"].items()
    }
    columns = max(map(len, groups.values()))
    figure = Figure(figsize=(WIDTH, 0.5 + height * len(groups)))
    grid = figure.subplots(len(groups), columns, squeeze=False, sharey="row")
    panels = []
    for axes_of_mode, (mode, positions) in zip(grid, groups.items(), strict=True):
        for axes, (position, rows) in zip(axes_of_mode, positions.items(), strict=False):
            axes.set_title(f"Pos-{position[-1]}, {_TITLES[mode]}")
            panels.append((axes, rows))
        for axes in axes_of_mode[len(positions) :]:
            axes.set_axis_off()
    return figure, panels


def _with_errors(axes: Axes, x: list[float], spreads: list[dict[str, float]], label: str) -> None:
    """Medians with the 10th to 90th percentile."""
    medians = [spread["median"] for spread in spreads]
    errors = [
        [spread["median"] - spread["p10"] for spread in spreads],
        [spread["p90"] - spread["median"] for spread in spreads],
    ]
    axes.errorbar(x, medians, errors, capsize=3, elinewidth=1.2, label=label)
    axes.grid(True)
