"""The record of benchmarks.serving.drop as tables and as a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import tables
from scmoe_ds.figure_style import BLUE, GREEN, INK, PINK, VERMILLION, WIDTH, styled
from scmoe_ds.planner.rounds import Spread

NONE, AGAIN = "all rows", "all rows again (A/A)"
ONE, TWO = "1T-Drop", "2T-Drop"
LOAD_AWARE = ", load-aware"
KNOWN = f"{ONE}{LOAD_AWARE}, decided beforehand"
_COLOURS = {ONE: BLUE, ONE + LOAD_AWARE: VERMILLION, TWO: GREEN, TWO + LOAD_AWARE: PINK}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    settings, link = record["settings"], record["link"]
    lines = [
        f"# Dropped rows on two nodes, all-to-all {100 * settings['share']:.0f} % of a top-2 layer",
        "",
        *tables.head(record),
        f"{record['shape']}. Link {link['rate_mbit']:.0f} Mbit/s, where the all-to-all takes {100 * link['share']:.0f} "
        f"% of a top-2 MoE layer with an even gate ({link['all_to_all_ms']:.0f} of {link['layer_ms']:.0f} ms). "
        f"{settings['rounds']} interleaved rounds; speed-up over the first row: median (10th–90th percentile) of the "
        "ratios within rounds, of the slower rank. Layer: the step without attentions, MLP and shared expert. Dropped: "
        "share of the routed experts' computation on both ranks; skipped: rows that are not sent. Thresholds are of "
        "the pair's own tokens; all-to-all: "
        f"{settings['method']}.",
        "",
    ]
    for layer, skews in record["layers"].items():
        for skew, found in skews.items():
            lines += [f"## {layer}, skew {skew}, rate {settings['rate']:g}", "", *_table(found), ""]
    if "curve" in record:
        found = record["curve"]
        lines += [f"## {found['layer']}, skew {found['skew']:g}, several rates", "", *_table(found), ""]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    loads = " and ".join(f"{load:.2f}" for load in found["rank_load_over_mean"])
    cells = []
    for row in found["rows"]:
        shares = row["shares"] or {"dropped": 0.0, "skipped": 0.0}
        cells.append(
            [
                row["row"],
                *(f"{shares[key]:.1%}" for key in ("dropped", "skipped")),
                *(
                    text
                    for part in ("layer", "step")
                    for text in (f"{row[f'{part}_ms']:.1f}", str(Spread(**row[f"{part}_speedup"])))
                ),
            ]
        )
    return [
        f"Busiest expert {found['busiest_expert_over_mean']:.2f} × the mean, ranks {loads} ×.",
        "",
        *tables.table(["row", "dropped", "skipped", "layer ms", "speed-up", "step ms", "speed-up"], cells),
    ]


@styled
def figure(record: dict[str, Any]) -> Figure:
    """Bars of the layer's speed-up at each skew, a panel for each layer; below, time against rate."""
    layers = record["layers"]
    sheet = Figure((WIDTH, 6.4 if "curve" in record else 3.4))
    upper, lower = sheet.subfigures(2, 1) if "curve" in record else (sheet, None)
    panels = upper.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for panel, (layer, skews) in zip(panels, layers.items(), strict=True):
        _bars(panel, skews)
        panel.set_title(layer)
        panel.set_xlabel("load of the busiest expert / mean")
    panels[0].set_ylabel("speed-up of the MoE layer")
    upper.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS))
    if lower is not None:
        _curve(lower.subplots(), record["curve"])
    sheet.suptitle(
        f"{record['settings']['rate']:.0%} of the experts' computation left out; all-to-all "
        f"{record['settings']['share']:.0%} of a top-2 layer"
    )
    return sheet


def _bars(panel: Axes, skews: dict[str, Any]) -> None:
    width = 0.8 / len(_COLOURS)
    for number, (name, colour) in enumerate(_COLOURS.items()):
        spreads = [
            next(row["layer_speedup"] for row in found["rows"] if row["row"] == name) for found in skews.values()
        ]
        medians = [each["median"] for each in spreads]
        errors = [
            [each["median"] - each["p10"] for each in spreads],
            [each["p90"] - each["median"] for each in spreads],
        ]
        places = [place + (number - 1.5) * width for place in range(len(skews))]
        lines = {"capsize": 2, "ecolor": INK, "elinewidth": 1}
        panel.bar(places, medians, width, yerr=errors, color=colour, label=name, error_kw=lines)
    panel.axhline(1.0, color=INK, linewidth=0.8, marker="", linestyle="-")
    panel.set_xticks(range(len(skews)), [f"{found['busiest_expert_over_mean']:.1f}" for found in skews.values()])


def _curve(panel: Axes, found: dict[str, Any]) -> None:
    whole = next(row["layer_ms"] for row in found["rows"] if row["row"] == NONE)
    for kind in (ONE, ONE + LOAD_AWARE):
        rows = [row for row in found["rows"] if row["row"].startswith(f"{kind}, ") and row["shares"]]
        rows = [row for row in rows if row["row"].removeprefix(f"{kind}, ").replace(".", "").isdigit()]
        shares = [0.0, *(row["shares"]["dropped"] for row in rows)]
        panel.plot(shares, [1.0, *(row["layer_ms"] / whole for row in rows)], color=_COLOURS[kind], label=kind)
    panel.plot([0, 0.6], [1, 0.4], color=INK, linewidth=0.8, marker="", linestyle=":", label="1 - dropped")
    panel.set_title(f"{found['layer']}, busiest expert {found['busiest_expert_over_mean']:.1f} × the mean")
    panel.set_xlabel("share of the experts' computation left out")
    panel.set_ylabel("time of the MoE layer / that of all rows")
    panel.legend()
