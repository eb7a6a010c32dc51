"""Figures of the serving benchmarks, in the manner of the paper's tables 1 and 2 and figure 13, from their records."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scmoe_ds.figure_style import BLUE, GREEN, GREY, INK, VERMILLION, WIDTH, styled

ROW = 0.3
_SPREAD = "bars: median, lines: 10th to 90th percentile"


@styled
def speedups(record: dict[str, Any]) -> Figure:
    """Bars of each row's speed-up over DeepSpeed's top-2, with the 10th to 90th percentile; a panel for each phase."""
    phases = record["phases"]
    rows = max(len(found["rows"]) for found in phases.values())
    figure = Figure((WIDTH, 1.5 + ROW * rows))
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for panel, (phase, found) in zip(panels, phases.items(), strict=True):
        names = [row["row"] for row in found["rows"]]
        colours = [VERMILLION if name.startswith("ScMoE") else GREY for name in names]
        _bars(panel, names, [row["speedup"] for row in found["rows"]], colours, "{:.2f} ×")
        panel.axvline(1.0, color=INK, linewidth=0.8, marker="", linestyle="-")
        panel.set_title(f"{phase}\nall-to-all: {found['link']['share']:.0%} of the baseline's layer")
        panel.set_xlabel("speed-up over DeepSpeed top-2")
    figure.supxlabel(f"{_SPREAD}; orange: ScMoE", fontsize=9)
    return figure


@styled
def latencies(record: dict[str, Any]) -> Figure:
    """Bars of the time per pair of blocks and of the peak memory, for each mode."""
    rows = record["rows"]
    figure = Figure((WIDTH, 1.5 + ROW * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["row"] for row in rows]
    _bars(left, names, [row["pair_ms"] for row in rows], BLUE, "{:.3g} ms")
    left.set_xlabel("ms per pair of blocks, one token")
    memory = [row["peak_bytes"] / 1e9 for row in rows]
    _bars(right, names, [{"median": each, "p10": each, "p90": each} for each in memory], GREEN, "{:.3g} GB")
    right.set_xlabel("peak memory, GB")
    figure.supxlabel(_SPREAD, fontsize=9)
    figure.suptitle(textwrap.fill(f"{record['model']}: experts from {record['tier']}", 90))
    return figure


def _bars(axes: Axes, names: list[str], spreads: list[dict[str, float]], colours: str | list[str], words: str) -> None:
    """Horizontal bars of medians with their spread and value, from the top."""
    medians, tops = ([spread[key] for spread in spreads] for key in ("median", "p90"))
    errors = [
        [spread["median"] - spread["p10"] for spread in spreads],
        [spread["p90"] - spread["median"] for spread in spreads],
    ]
    lines = None if medians == tops else errors
    axes.barh(
        range(len(names)),
        medians,
        0.7,
        xerr=lines,
        color=colours,
        error_kw={"capsize": 2, "ecolor": INK, "elinewidth": 1},
    )
    for place, (value, top) in enumerate(zip(medians, tops, strict=True)):
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(words.format(value), (top, place), (5, 0), **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.22 * max(tops))
