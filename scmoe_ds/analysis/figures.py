"""Figures of the records: heat maps of similarity, curves of gating, bars of gradients."""

from __future__ import annotations

import itertools
import math
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can distinguish; as in the other figures.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
_MAX_TICKS = 60
"""More names cannot be read beside a heat map."""


def similarity(record: dict[str, Any]) -> Figure:
    """Two heat maps, cosine similarity (paper figure 10) and L2 distance, with the verdict below."""
    names = record["names"]
    side = min(3.5 + 0.22 * len(names), 14)
    figure = Figure(figsize=(2 * side + 2, side + 1), layout="constrained")
    panels = figure.subplots(1, 2)
    _heat_map(panels[0], record["cosine"], names, "cosine similarity", {"vmin": min(0.0, _least(record)), "vmax": 1})
    _heat_map(panels[1], record["l2"], names, "L2 distance", {"vmin": 0})
    figure.suptitle(f"{record['model']}, {record['tokens']} tokens", fontsize=11)
    folded = (textwrap.wrap(line, 150, subsequent_indent="    ")[:6] for line in record["verdict"]["text"])
    figure.supxlabel("\n".join(itertools.chain(*folded)), fontsize=8, x=0.01, ha="left")
    return figure


def _least(record: dict[str, Any]) -> float:
    return min(value for row in record["cosine"] for value in row if value is not None)


def _heat_map(axes: Axes, matrix: list[list[float | None]], names: list[str], title: str, limits: Any) -> None:
    values = [[math.nan if value is None else value for value in row] for row in matrix]
    image = axes.imshow(values, cmap="viridis", **limits)
    axes.set_title(title)
    places = range(0, len(names), -(-len(names) // _MAX_TICKS))
    shown = [names[place] for place in places]
    axes.set_xticks(list(places), shown, rotation=90, fontsize=7)
    axes.set_yticks(list(places), shown, fontsize=7)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


_GATING_PANELS = {
    "share of tokens with the same expert for both representations": ("same_expert_share",),
    "L2 distance of the two representations": ("l2",),
    "cosine similarity of the two representations": ("cosine",),
    "mean gate score (solid: preceding, dashed: current)": ("preceding_score", "current_score"),
    "load: busiest expert over mean": ("load_max_over_mean",),
    "share of choices dropped in training": ("drop_rate",),
}
_STYLES = ("-", "--")


def gating(record: dict[str, Any]) -> Figure:
    """Six panels like paper figure 9: over layers for one checkpoint; over iterations, a line a layer, for several."""
    checkpoints = record["checkpoints"]
    figure = Figure(figsize=(15, 8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, _GATING_PANELS.items(), strict=True):
        for name, style in zip(names, _STYLES, strict=False):
            _draw_gating(axes, checkpoints, name, style)
        axes.set_title(title, fontsize=9)
        if name != "cosine":
            axes.set_ylim(bottom=0)
    blocks = [layer["block"] for layer in checkpoints[0]["layers"]]
    if len(checkpoints) > 1:
        figure.axes[0].legend([f"block {block}" for block in blocks], fontsize=7)
    named = checkpoints[0]["model"] if len(checkpoints) == 1 else record["model"]
    figure.suptitle(f"{named}: {checkpoints[0]['architecture']}, {checkpoints[0]['tokens']} tokens", fontsize=11)
    return figure


def _draw_gating(axes: Axes, checkpoints: list[dict[str, Any]], name: str, style: str) -> None:
    if len(checkpoints) == 1:
        layers = checkpoints[0]["layers"]
        blocks = [layer["block"] for layer in layers]
        axes.plot(blocks, [layer[name] for layer in layers], style, marker="o", color="C0")
        axes.set(xlabel="block", xticks=blocks)
        return
    iterations = [checkpoint["iteration"] for checkpoint in checkpoints]
    for place in range(len(checkpoints[0]["layers"])):
        values = [checkpoint["layers"][place][name] for checkpoint in checkpoints]
        axes.plot(iterations, values, style, marker="o", markersize=3, color=f"C{place}")
    axes.set(xlabel="iteration")


_GRADIENT_PANELS = (("norm", "gradient norm"), ("snr", "signal-to-noise ratio"))


def gradients(record: dict[str, Any]) -> Figure:
    """Gradient norm and signal-to-noise ratio, the latter with that of pure noise.

    Several checkpoints of a run give curves over iterations, a column for each run. Otherwise each checkpoint gives a
    bar per branch.
    """
    checkpoints = record["checkpoints"]
    labels = list(dict.fromkeys(checkpoint["label"] for checkpoint in checkpoints))
    over_time = len(labels) < len(checkpoints) and all(each["iteration"] is not None for each in checkpoints)
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint["branches"]))
    return _gradient_curves(checkpoints, names, labels) if over_time else _gradient_bars(checkpoints, names)


def _gradient_curves(checkpoints: list[dict[str, Any]], names: list[str], labels: list[str]) -> Figure:
    figure = Figure(figsize=(5 * len(labels) + 2, 8), layout="constrained")
    panels = figure.subplots(2, len(labels), squeeze=False, sharex=True, sharey="row")
    for column, label in enumerate(labels):
        run = [checkpoint for checkpoint in checkpoints if checkpoint["label"] == label]
        iterations = [checkpoint["iteration"] for checkpoint in run]
        for row, (key, title) in enumerate(_GRADIENT_PANELS):
            axes = panels[row][column]
            for number, name in enumerate(names):
                values = [_value(checkpoint, name, key) for checkpoint in run]
                axes.plot(iterations, values, marker="o", markersize=3, label=name, color=f"C{number}")
            axes.set(yscale="log", ylabel=title if column == 0 else "", xlabel="iteration" if row else "")
        panels[1][column].axhline(run[0]["noise_floor"], color="#333333", linestyle=":", label="noise alone")
        panels[0][column].set_title(label, fontsize=9)
    panels[1][-1].legend(fontsize=7)
    return figure


def _gradient_bars(checkpoints: list[dict[str, Any]], names: list[str]) -> Figure:
    figure = Figure(figsize=(13, 5), layout="constrained")
    width = 0.8 / len(checkpoints)
    for axes, (key, title) in zip(figure.subplots(1, 2), _GRADIENT_PANELS, strict=True):
        for number, checkpoint in enumerate(checkpoints):
            places = [place + (number + 0.5) * width - 0.4 for place in range(len(names))]
            values = [_value(checkpoint, name, key) for name in names]
            axes.bar(places, values, width, label=checkpoint["label"], color=f"C{number}")
        axes.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
        axes.set(title=title, yscale="log" if key == "norm" else "linear")
    floor = checkpoints[0]["noise_floor"]
    axes.axhline(floor, color="#333333", linestyle=":", label=f"noise alone: {floor:.3g}")
    axes.legend(fontsize=7)
    return figure


def _value(checkpoint: dict[str, Any], branch: str, key: str) -> float:
    """NaN, which is not drawn, for a branch without a gradient."""
    return checkpoint["branches"].get(branch, {}).get(key) or math.nan
