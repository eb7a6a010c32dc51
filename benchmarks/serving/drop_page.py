"""The record of benchmarks.serving.drop as tables and as a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import tables
from scmoe_ds.figure_style import BLUE, GREEN, GREY, INK, PINK, VERMILLION, WIDTH, styled
from scmoe_ds.planner.rounds import Spread

NONE, AGAIN = "all rows", "all rows again (A/A)"
ONE, TWO = "1T-Drop", "2T-Drop"
LOAD_AWARE = ", load-aware"
KNOWN = f"{ONE}{LOAD_AWARE}, decided beforehand"
HALF, PAPER = f"{TWO}, half the spread", f"{TWO}, spread 0.01"
DRAWN = (ONE, TWO, HALF, PAPER, ONE + LOAD_AWARE, TWO + LOAD_AWARE)
_COLOURS = dict(zip(DRAWN, (BLUE, GREEN, GREY, INK, VERMILLION, PINK), strict=True))


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
        "ratios within rounds, of the slower rank. Layer: the step without attentions, MLP and shared expert. "
        f"Thresholds are of the pair's own tokens; all-to-all: {settings['method']}.",
        "",
        "Dropped: share of the routed experts' computation on both ranks, half of it for a halved choice. Skipped, "
        "halved: share of the choices. Limits: what the layer would gain if it were nothing but the busier rank's "
        "computation, or nothing but the rows that go the busier way. A halved choice is still sent; with two choices "
        "a token goes to a rank as one row, which goes only where no choice of it is left there.",
        "",
    ]
    lines += ["## Medians of the layer's speed-up", "", *_medians(record["layers"]), ""]
    for layer, skews in record["layers"].items():
        for skew, found in skews.items():
            lines += [f"## {layer}, {_title(skew)}, rate {settings['rate']:g}", ""]
            lines += [*_table(found), "", _best(settings["rate"], found["rank_load_over_mean"]), ""]
    if "curve" in record:
        found = record["curve"]
        title = _title(f"expert {found['skew']:g}")
        lines += [f"## {found['layer']}, {title}, several rates", "", *_table(found), ""]
    return "\n".join(lines)


def _medians(layers: dict[str, Any]) -> list[str]:
    cells = []
    for layer, gates in layers.items():
        for gate, found in gates.items():
            medians = {row["row"]: f"{row['layer_speedup']['median']:.2f}" for row in found["rows"]}
            ranks = " and ".join(f"{load:.2f}" for load in found["rank_load_over_mean"])
            cells.append([layer, _title(gate), ranks, *(medians.get(name, "–") for name in DRAWN)])
    return tables.table(["layer", "the gate", "ranks over the mean", *DRAWN], cells)


def _title(gate: str) -> str:
    kind, _, skew = gate.partition(" ")
    busiest = {"expert": "busiest expert", "rank": "busier rank"}
    return f"{busiest[kind]} {skew} × the mean" if skew else "even loads, nearly"


def _best(rate: float, load_P: list[float]) -> str:
    """What load-aware thresholds can gain."""
    busiest, ranks = max(load_P), len(load_P)
    best = busiest / max(busiest - ranks * rate, 1 - rate)
    return (
        f"Were the {rate:.0%} left out on the busier rank alone, as far as it stays the busier one, the limit by "
        f"computation would be {best:.2f}."
    )


def _table(found: dict[str, Any]) -> list[str]:
    loads = " and ".join(f"{load:.2f}" for load in found["rank_load_over_mean"])
    cells = []
    for row in found["rows"]:
        shares = row["shares"] or {"dropped": 0.0, "skipped": 0.0, "halved": 0.0}
        cells.append(
            [
                row["row"],
                *(f"{shares[key]:.1%}" for key in ("dropped", "skipped", "halved")),
                *(f"{row['limit'][key]:.2f}" for key in ("computation", "bytes")),
                *(
                    text
                    for part in ("layer", "step")
                    for text in (f"{row[f'{part}_ms']:.1f}", str(Spread(**row[f"{part}_speedup"])))
                ),
            ]
        )
    return [
        f"Busiest expert {found['busiest_expert_over_mean']:.2f} × the mean, ranks {loads} ×; spread of 2T-Drop ± "
        f"{found['spread']:g} unless the row says otherwise.",
        "",
        *tables.table(
            [
                "row",
                "dropped",
                "skipped",
                "halved",
                "limit by computation",
                "by bytes",
                "layer ms",
                "speed-up",
                "step ms",
                "speed-up",
            ],
            cells,
        ),
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
        panel.set_xlabel("busiest load / mean")
    panels[0].set_ylabel("speed-up of the MoE layer")
    handles, labels = panels[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))  # each once
    upper.legend(named.values(), named, loc="outside lower center", ncols=3)
    if lower is not None:
        _curve(lower.subplots(), record["curve"])
    sheet.suptitle(
        f"{record['settings']['rate']:.0%} of the experts' computation left out; all-to-all "
        f"{record['settings']['share']:.0%} of a top-2 layer"
    )
    return sheet


def _bars(panel: Axes, gates: dict[str, Any]) -> None:
    """Those of a gate beside each other, as many as were measured with it."""
    width = 0.9 / len(DRAWN)
    lines = {"capsize": 2, "ecolor": INK, "elinewidth": 1}
    for place, found in enumerate(gates.values()):
        spreads = {row["row"]: Spread(**row["layer_speedup"]) for row in found["rows"] if row["row"] in _COLOURS}
        for number, (name, spread) in enumerate(spreads.items()):
            error = [[spread.median - spread.p10], [spread.p90 - spread.median]]
            x = place + (number - (len(spreads) - 1) / 2) * width
            panel.bar(x, spread.median, width, yerr=error, color=_COLOURS[name], label=name, error_kw=lines)
    panel.axhline(1.0, color=INK, linewidth=0.8, marker="", linestyle="-")
    panel.set_xticks(range(len(gates)), [name.replace(" ", "\n") for name in gates])


def _curve(panel: Axes, found: dict[str, Any]) -> None:
    whole = next(row["layer_ms"] for row in found["rows"] if row["row"] == NONE)
    for kind in DRAWN:
        rows = [row for row in found["rows"] if row["row"].rpartition(", ")[0] == kind and row["shares"]]
        if not rows:
            continue
        shares = [0.0, *(row["shares"]["dropped"] for row in rows)]
        panel.plot(shares, [1.0, *(row["layer_ms"] / whole for row in rows)], color=_COLOURS[kind], label=kind)
    panel.plot([0, 0.6], [1, 0.4], color=INK, linewidth=0.8, marker="", linestyle=":", label="1 - dropped")
    panel.set_title(f"{found['layer']}, busiest expert {found['busiest_expert_over_mean']:.1f} × the mean")
    panel.set_xlabel("share of the experts' computation left out")
    panel.set_ylabel("time of the MoE layer / that of all rows")
    panel.legend()
