"""Figures of block records: what a step consists of (as the paper's figure 8), every slot, and where chunks pay."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.parts import EXPOSED, KINDS

OTHER = "other"
_TITLES = {"forward": "forward pass", "train": "training step"}
# Okabe and Ito's colours, which colour-blind people can tell apart as well; as in the timeline of a step.
_COLOURS = {
    "attention": "#0072B2",
    "MLP": "#56B4E9",
    "shared expert": "#009E73",
    "gate, encode, decode, merge": "#F0E442",
    "experts": "#D55E00",
    EXPOSED: "#CC79A7",
    OTHER: "#BBBBBB",
}
_CAPTION = (
    "Measured in {steps} steps of each schedule, mean of both ranks; other: what is left of the median step of the "
    "rounds.\nExposed communication: the computation stood still for it. In DeepSpeed's layers, which block, it is "
    "their all-to-alls, and gate, encode, decode, merge\nis what experts, shared expert and all-to-alls leave of the "
    "layer."
)


def heights(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each part of a row's bar, from the bottom; what no part covers is "other"."""
    parts = {kind: max(0.0, row["parts_ms"][kind]) for kind in KINDS}
    return parts | {OTHER: max(0.0, row["median_ms"] - sum(parts.values()))}


def stacked(record: dict[str, Any], steps: int = 3) -> Figure:
    """Stacked bars, a panel for each mode.

    Args:
        record: of the main table.
        steps: how many steps the parts were taken from.
    """
    modes = record["modes"]
    figure = Figure(figsize=(12, 4.6 * len(modes) + 2), layout="constrained")
    for axes, (mode, found) in zip(figure.subplots(len(modes), squeeze=False)[:, 0], modes.items(), strict=True):
        _draw_bars(axes, found["rows"])
        axes.set(ylabel="ms", title=_TITLES[mode])
        axes.set_xlim(-0.6, len(found["rows"]) - 0.4)
    axes.legend(ncols=4, loc="upper right", fontsize=8)
    figure.supxlabel(_CAPTION.format(steps=steps), fontsize=8, x=0.01, ha="left")
    return figure


def _draw_bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    stacks = [heights(row) for row in rows]
    bottoms = [0.0] * len(rows)
    for kind, colour in _COLOURS.items():
        values = [stack[kind] for stack in stacks]
        axes.bar(places, values, 0.75, bottom=bottoms, label=kind, color=colour, edgecolor="white", linewidth=0.4)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    for place, row, top in zip(places, rows, bottoms, strict=True):
        axes.annotate(f"{row['speedup']['median']:.2f} ×", (place, top), ha="center", va="bottom", fontsize=7)
    axes.set_ylim(0, 1.25 * max(bottoms))
    axes.set_xticks(list(places), [row["variant"] for row in rows], rotation=35, ha="right", fontsize=7)


def crossing(record: dict[str, Any]) -> Figure:
    """Time over that of a single chunk against communication over window, a panel for each mode and position."""
    figure, panels = _panels(record)
    for axes, rows in panels:
        for name in dict.fromkeys(row["variant"] for row in rows):
            points = sorted(
                (row for row in rows if row["variant"] == name), key=lambda row: row["communication_over_window"]
            )
            ratios = [row["communication_over_window"] for row in points]
            _with_errors(axes, ratios, [row["over_unchunked"] for row in points], name.split(", ")[1])
        axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
        axes.set(xlabel="communication / window (calibrated)", ylabel="time / time of one chunk (measured)")
        axes.legend(fontsize=8)
    return figure


def slots(record: dict[str, Any]) -> Figure:
    """Speed-up against the expert slot in one chunk, and that of the planner's choice, for each mode and position."""
    figure, panels = _panels(record)
    for axes, rows in panels:
        fixed = {row["variant"].split()[-1]: row["speedup"] for row in rows}
        auto = fixed.pop("auto", None)
        _with_errors(axes, [int(slot) for slot in fixed], list(fixed.values()), "one chunk")
        if auto is not None:
            axes.axhline(auto["median"], color="#D55E00", label="auto")
            axes.axhspan(auto["p10"], auto["p90"], color="#D55E00", alpha=0.15)
        axes.set(
            xlabel="slot of the experts", ylabel="speed-up over the baseline", xticks=[int(slot) for slot in fixed]
        )
        axes.legend(fontsize=8)
    return figure


def _panels(record: dict[str, Any]) -> tuple[Figure, list[tuple[Axes, list[dict[str, Any]]]]]:
    """A panel with its rows for each mode and position."""
    groups = {
        (mode, position): [row for row in found["rows"] if row["position"] == position]
        for mode, found in record["modes"].items()
        for position in dict.fromkeys(row["position"] for row in found["rows"] if row["position"])
    }
    figure = Figure(figsize=(4.2 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (mode, position) in zip(panels, groups, strict=True):
        axes.set_title(f"Pos-{position[-1]}, {_TITLES[mode]}")
    return figure, list(zip(panels, groups.values(), strict=True))


def _with_errors(axes: Axes, x: list[float], spreads: list[dict[str, float]], label: str) -> None:
    medians = [spread["median"] for spread in spreads]
    errors = [
        [spread["median"] - spread["p10"] for spread in spreads],
        [spread["p90"] - spread["median"] for spread in spreads],
    ]
    axes.errorbar(x, medians, errors, marker="o", capsize=3, label=label)
