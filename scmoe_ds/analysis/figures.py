"""Figures of the records: heat maps of similarity, curves of gating, curves and dots of gradients."""

from __future__ import annotations

import itertools
import math
import textwrap
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from scmoe_ds.figure_style import GREY, INK, LINES, MARKERS, WIDTH, plain_log_axis, short_names, styled

_MAX_TICKS = 60
"""More names cannot be read beside a heat map."""
_MAX_VALUES = 9
"""A longer row of values cannot be read in the cells of a heat map."""
_LINE = 0.17  # inches of height of a line of small text


@styled
def similarity(record: dict[str, Any]) -> Figure:
    """Two heat maps, cosine similarity (paper figure 10) and L2 distance, with the verdict below."""
    names, matrices = record["names"], [record["cosine"], record["l2"]]
    folded = (textwrap.wrap(line, 150, subsequent_indent="    ")[:6] for line in record["verdict"]["text"])
    lines = list(itertools.chain(*folded))
    beside = len(names) <= _MAX_VALUES
    height, below = (5.9 if beside else 16.0), 0.2 + _LINE * len(lines)
    layout = ConstrainedLayoutEngine(rect=(0, below / (height + below), 1, height / (height + below)))
    figure = Figure(figsize=(WIDTH, height + below), layout=layout)
    panels = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
    _heat_map(panels[0], matrices[0], names, "cosine similarity", {"vmin": min(0.0, _least(record)), "vmax": 1})
    _heat_map(panels[1], matrices[1], names, "L2 distance", {"vmin": 0})
    if beside:
        panels[1].set_yticklabels([])  # as on the left
    figure.suptitle(f"{_name(record['model'])}: representations on {record['tokens']:,} tokens")
    figure.text(0.01, below / (height + below), "\n".join(lines), va="top", fontsize=8.5, in_layout=False)
    return figure


def _name(model: str) -> str:
    return short_names([model])[model]


def _least(record: dict[str, Any]) -> float:
    return min(value for row in record["cosine"] for value in row if value is not None)


def _heat_map(axes: Axes, matrix: list[list[float | None]], names: list[str], title: str, limits: Any) -> None:
    values = [[math.nan if value is None else value for value in row] for row in matrix]
    image = axes.imshow(values, aspect="auto", **limits)
    axes.set_title(title)
    axes.spines[:].set_visible(False)
    places = range(0, len(names), -(-len(names) // _MAX_TICKS))
    shown = [names[place] for place in places]
    size = 9 if len(names) <= 25 else 7
    axes.set_xticks(list(places), shown, rotation=90, fontsize=size)
    axes.set_yticks(list(places), shown, fontsize=size)
    if len(names) > _MAX_VALUES:
        axes.figure.colorbar(image, ax=axes, shrink=0.8)
        return
    middle = sum(image.get_clim()) / 2
    for (row, line), column in itertools.product(enumerate(values), range(len(names))):
        if not math.isnan(line[column]):
            colour = INK if line[column] > middle else "white"
            axes.text(column, row, f"{line[column]:.2f}", ha="center", va="center", fontsize=7.5, color=colour)


_GATING_PANELS = {
    "same expert for both representations, share of tokens": ("same_expert_share",),
    "L2 distance of the two representations": ("l2",),
    "cosine similarity of the two representations": ("cosine",),
    "mean gate score": ("preceding_score", "current_score"),
    "load: busiest expert over mean": ("load_max_over_mean",),
    "share of choices dropped in training": ("drop_rate",),
}
_STYLES: tuple[Literal["-", "--"], ...] = ("-", "--")


@styled
def gating(record: dict[str, Any]) -> Figure:
    """Six panels like paper figure 9: over layers for one checkpoint; over iterations, a line a layer, for several."""
    checkpoints = record["checkpoints"]
    figure = Figure(figsize=(WIDTH, 9))
    for axes, (title, names) in zip(figure.subplots(3, 2).flat, _GATING_PANELS.items(), strict=True):
        for name, style in zip(names, _STYLES, strict=False):
            _draw_gating(axes, checkpoints, name, style)
        axes.set_title(title)
        axes.grid(True)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.04 * high) if name == "cosine" else -0.04 * high, high)  # zero is seen whole
    handles = [*_layer_handles(checkpoints), *_style_handles()]
    figure.legend(handles=handles, loc="outside lower center", ncols=7)
    named = checkpoints[0]["model"] if len(checkpoints) == 1 else record["model"]
    figure.suptitle(f"{_name(named)}: gates of {checkpoints[0]['architecture']}, {checkpoints[0]['tokens']:,} tokens")
    return figure


def _layer_handles(checkpoints: list[dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    if len(checkpoints) == 1:
        return []
    layers = checkpoints[0]["layers"]
    if len(layers) > _MAX_NAMED_LAYERS:
        colour_map, last = _layer_colours(len(layers)), len(layers) - 1
        return [Line2D([], [], color=colour_map[n], label=f"block {layers[n]['block']}") for n in (0, last // 2, last)]
    colours = _layer_colours(len(layers))
    return [
        Line2D([], [], color=c, marker="o", label=f"block {of['block']}") for c, of in zip(colours, layers, strict=True)
    ]


def _style_handles() -> list[Any]:
    from matplotlib.lines import Line2D

    words = ("preceding layer (gate score)", "current layer (gate score)")
    return [Line2D([], [], color=GREY, linestyle=style, label=word) for style, word in zip(_STYLES, words, strict=True)]


_MAX_NAMED_LAYERS = len(LINES)


def _layer_colours(layers: int) -> list[Any]:
    """A colour for each layer; of many layers a scale from dark to light, whose order says which is which."""
    if layers <= _MAX_NAMED_LAYERS:
        return list(LINES[:layers])
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.85 * place / (layers - 1)) for place in range(layers)]


def _draw_gating(axes: Axes, checkpoints: list[dict[str, Any]], name: str, style: str) -> None:
    if len(checkpoints) == 1:
        layers = checkpoints[0]["layers"]
        blocks = [layer["block"] for layer in layers]
        axes.plot(blocks, [layer[name] for layer in layers], style, marker="o", color=LINES[0])
        axes.set(xlabel="block", xticks=blocks if len(blocks) <= _MAX_TICKS // 4 else blocks[:: len(blocks) // 12 + 1])
        return
    iterations = [checkpoint["iteration"] for checkpoint in checkpoints]
    for place, colour in enumerate(_layer_colours(len(checkpoints[0]["layers"]))):
        values = [checkpoint["layers"][place][name] for checkpoint in checkpoints]
        axes.plot(iterations, values, style, marker="o", markersize=4, color=colour)
    axes.set(xlabel="iteration")


_GRADIENT_PANELS = (("norm", "gradient norm"), ("snr", "signal-to-noise ratio"))


@styled
def gradients(record: dict[str, Any]) -> Figure:
    """Gradient norm and signal-to-noise ratio on logarithmic axes, the latter with that of pure noise.

    Several checkpoints of a run give curves over iterations, a column for each run. Otherwise each checkpoint gives a
    dot per branch.
    """
    checkpoints = record["checkpoints"]
    labels = list(dict.fromkeys(checkpoint["label"] for checkpoint in checkpoints))
    over_time = len(labels) < len(checkpoints) and all(each["iteration"] is not None for each in checkpoints)
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint["branches"]))
    return (_gradient_curves if over_time else _gradient_dots)(checkpoints, names, short_names(labels))


def _gradient_curves(checkpoints: list[dict[str, Any]], names: list[str], labels: dict[str, str]) -> Figure:
    columns = min(len(labels), 4)
    bands = -(-len(labels) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 5.2 * bands))
    panels = figure.subplots(2 * bands, columns, squeeze=False, sharex=True)
    for axes in panels.flat:
        axes.set_axis_off()
    for place, (label, shown) in enumerate(labels.items()):
        band, column = divmod(place, columns)
        run = [checkpoint for checkpoint in checkpoints if checkpoint["label"] == label]
        iterations = [checkpoint["iteration"] for checkpoint in run]
        for row, (key, title) in enumerate(_GRADIENT_PANELS):
            axes = panels[2 * band + row][column]
            axes.set_axis_on()
            axes.sharey(panels[row][0]) if axes is not panels[row][0] else None
            for name in names:
                axes.plot(iterations, [_value(checkpoint, name, key) for checkpoint in run], label=name)
            axes.set(ylabel=title if column == 0 else "", xlabel="iteration" if row else "")
            axes.tick_params(which="both", labelleft=column == 0, labelbottom=row == 1)
            plain_log_axis(axes, "y")
        axes.axhline(run[0]["noise_floor"], color=INK, linestyle=":", marker="", label="noise alone")
        panels[2 * band][column].set_title(_folded(shown, 104 // columns), fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _folded(label: str, width: int) -> str:
    """A checkpoint's name above its architecture."""
    return "\n".join(itertools.chain(*(textwrap.wrap(line, width) for line in label.replace(" (", "\n(").split("\n"))))


def _gradient_dots(checkpoints: list[dict[str, Any]], names: list[str], labels: dict[str, str]) -> Figure:
    """Dots, since a bar would need a zero, which a logarithmic axis does not have."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.45 * len(names) + 0.22 * len(labels)))
    panels = figure.subplots(1, 2, sharey=True)
    step = min(0.7 / len(checkpoints), 0.15)
    for axes, (key, title) in zip(panels, _GRADIENT_PANELS, strict=True):
        for number, checkpoint in enumerate(checkpoints):
            shift = (number - (len(checkpoints) - 1) / 2) * step
            values = [_value(checkpoint, name, key) for name in names]
            label, marker = labels[checkpoint["label"]], MARKERS[number // len(LINES) % len(MARKERS)]
            places = [place + shift for place in range(len(names))]
            axes.plot(values, places, linestyle="", marker=marker, color=LINES[number % len(LINES)], label=label)
        axes.set(title=title)
        plain_log_axis(axes, "x")
    floor = checkpoints[0]["noise_floor"]
    axes.axvline(floor, color=INK, linestyle=":", marker="", label=f"noise alone: {floor:.3g}")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
    return figure


def _value(checkpoint: dict[str, Any], branch: str, key: str) -> float:
    """NaN, which is not drawn, for a branch without a gradient."""
    return checkpoint["branches"].get(branch, {}).get(key) or math.nan


@styled
def adaptation(record: dict[str, Any]) -> Figure:
    """Loss against time saved, for sets of converted layers: the cheapest layers of each way, and the Pareto front."""
    is_timed = any("saved_ms" in layer for way in record["ways"] for layer in way["layers"])
    figure = Figure(figsize=(WIDTH, 4.8))
    axes, source = figure.subplots(), record["loss"]
    for number, way in enumerate(record["ways"]):
        by_layer = {each["layer"]: each for each in way["layers"]}
        places, losses = [0.0], [0.0]
        for layer in way["order"]:
            places.append(places[-1] + (by_layer[layer].get("saved_ms", 0.0) if is_timed else 1.0))
            losses.append(losses[-1] + 100 * by_layer[layer]["increase"] / source)
        name, colour = way["text"], LINES[number % len(LINES)]
        axes.plot(places, losses, color=colour, marker=MARKERS[number % len(MARKERS)], label=f"{name}, summed")
        of_all = 100 * (way["all"]["loss"] / source - 1)
        axes.plot([places[-1]], [of_all], linestyle="", marker="*", markersize=11, color=colour)
    key = "saved_ms" if is_timed else "converted"
    front = [(each[key], 100 * (each["loss"] / source - 1)) for each in record["front"]]
    axes.plot(
        *zip(*front, strict=True), color=GREY, linestyle="", marker="o", markersize=11, fillstyle="none", label="front"
    )
    axes.plot([], [], color=INK, linestyle="", marker="*", markersize=11, label="all layers, measured")
    if (choice := record["choice"]) is not None:
        place = choice["saved_ms"] if is_timed else len(choice["layers"])
        increase = 100 * (choice["loss"] / source - 1)
        axes.plot([place], [increase], color=INK, linestyle="", marker="X", markersize=10, label="chosen, measured")
    axes.set(
        xlabel="saved per micro-batch by the simulation, ms" if is_timed else "converted MoE layers",
        ylabel="loss increase before training, %",
    )
    axes.set_title(f"{_name(record['model'])}: what converting its MoE layers costs")
    axes.legend()
    return figure
