"""The record of benchmarks.speed.autoep as Markdown: what it comes to, then every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.families import FAMILIES
from benchmarks.harness.tables import table
from scmoe_ds.analysis.markdown import code, escape
from scmoe_ds.planner.rounds import Spread

_TITLES = {"train": "training step", "forward": "forward"}
_SHORT = {
    "+ chunks = as_is": "as_is",
    "scmoe Pos-1": "scmoe",
    "scmoe Pos-1, late join": "late join",
    "as_is, no communication": "limit of as_is",
    "AutoEP again (A/A)": "A/A",
}
_NOTE = (
    "Speed-up over AutoEP: median (10th–90th percentile) of the ratios within rounds; all rows in every round, in "
    "rotating order, on the same weights and with the same all-to-all. Limit: the speed-up of the same code with "
    "communication switched off. Exposed: what a row takes beyond that. Hidden: the part that it is spared of what the "
    "same row with blocking exchanges exposes. Waits: how long the slower rank stands still for exchanges, the other "
    "rank's delay included; not waited: the same for them. What is exposed and not waited for are transfers on the "
    "rank's only core. Processor: all threads of the busier rank, gloo's too, in a step. Peak: the most that one step "
    "allocates beyond weights, gradients included. The dense gradients' all-reduce is left out."
)
_HEADER = (
    "row",
    "ms",
    "speed-up",
    "limit",
    "exposed ms",
    "hidden",
    "waits ms",
    "not waited",
    "processor ms",
    "peak MB",
    "schedule",
)


def page(record: dict[str, Any]) -> str:
    """All cells that are in the record."""
    cells = sorted(record["cells"], key=_place)
    lines = ["# AutoEP on two nodes: all rows", "", code("python -m benchmarks.speed.autoep"), "", *_measured_on(cells)]
    even = [cell for cell in cells if cell["settings"]["skew"] == 1]
    for mode, title in _TITLES.items():
        lines += [f"## Speed-up, {title}", "", *_summary(even, mode), ""]
    skewed = [cell for cell in cells if cell["settings"]["skew"] > 1]
    if skewed:
        lines += ["## Skewed routers, training step", "", *_skews(cells, skewed), ""]
    for cell in cells:
        lines += [cell_text(cell), ""]
    return "\n".join(lines)


def adapted_page(record: dict[str, Any]) -> str:
    """Converted models and their teacher under AutoEP."""
    cells = sorted(record["cells"], key=_place)
    lines = ["# Converted models on two nodes: a training step against the teacher's under AutoEP", ""]
    lines += [*sorted({code(cell["command"]) for cell in cells}), "", *_measured_on(cells)]
    lines += ["The teacher is the row AutoEP. The top-k of the other rows is the teacher's, where none is named.", ""]
    for cell in cells:
        lines += [cell_text(cell), ""]
    return "\n".join(lines)


def _measured_on(cells: Sequence[dict[str, Any]]) -> list[str]:
    hardware = {", ".join(escape(f"{key} {value}") for key, value in cell["environment"].items()) for cell in cells}
    return [*sorted(hardware), "Two network namespaces, one pinned rank each.", "", _NOTE, ""]


def _place(cell: dict[str, Any]) -> tuple[int, float, float]:
    settings = cell["settings"]
    return list(FAMILIES).index(settings["family"]), -settings["share"], settings["skew"]


def _name(cell: dict[str, Any]) -> str:
    return f"{FAMILIES[cell['settings']['family']].name}, {100 * cell['settings']['share']:.0f} %"


def _summary(cells: Sequence[dict[str, Any]], mode: str) -> list[str]:
    lines = []
    for cell in cells:
        rows = {row["row"]: row for row in cell["modes"].get(mode, [])}
        if rows:
            peaks = [rows[name]["peak_mb"] for name in ("+ chunks = as_is", "AutoEP") if name in rows]
            memory = f"{peaks[0] / peaks[1]:.2f}" if len(peaks) == 2 else ""
            lines.append([_name(cell), *(_speedup(rows, name) for name in _SHORT), memory])
    return table(["family, all-to-all", *_SHORT.values(), "peak memory, as_is / AutoEP"], lines)


def _skews(cells: Sequence[dict[str, Any]], skewed: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for cell in cells:
        if all(cell["settings"][key] == skewed[0]["settings"][key] for key in ("family", "share")):
            loads, rows = cell["loads"], {row["row"]: row for row in cell["modes"]["train"]}
            busiest = [f"{loads[f'busiest_{one}_over_mean']:.2f}" for one in ("expert", "rank")]
            times = [f"{rows[name]['median_ms']:.0f}" for name in ("AutoEP", "+ chunks = as_is")]
            lines.append([*busiest, *times, *(_speedup(rows, name) for name in _SHORT)])
    header = ["busiest expert / mean", "busiest rank / mean", "AutoEP ms", "as_is ms", *_SHORT.values()]
    return [f"{_name(skewed[0])} without skew, at the rate found there.", "", *table(header, lines)]


def _speedup(rows: dict[str, Any], name: str) -> str:
    return str(Spread(**rows[name]["speedup"])) if name in rows else ""


def cell_text(cell: dict[str, Any]) -> str:
    """One family at one share of the all-to-all."""
    settings, link, loads = cell["settings"], cell["link"], cell["loads"]
    family = FAMILIES[settings["family"]]
    cut, blocks = family.cut(settings["share"]), settings.get("blocks") or family.blocks
    title = f"{family.name}, all-to-all {100 * settings['share']:.0f} % of AutoEP's layers, skew {settings['skew']:g}"
    measured = ""
    if "share" in link:
        times = f"{link['all_to_all_ms']:.0f} of {link['layer_ms']:.0f} ms"
        measured = f", all-to-all {times} ({100 * link['share']:.0f} %)"
    lines = [
        f"## {title}",
        "",
        f"Widths / {cut.width}, {cut.tokens} tokens per rank, {blocks} blocks; {link['rate_mbit']:.0f} Mbit/s"
        f"{measured}; busiest expert {loads['busiest_expert_over_mean']:.2f} × the mean, busiest rank "
        f"{loads['busiest_rank_over_mean']:.2f} ×; {settings['rounds']} rounds. as_is differs from AutoEP's output by "
        f"{max(cell['differences'].values(), default=0.0):.0e} of its largest value.",
    ]
    for mode, rows in cell["modes"].items():
        lines += ["", f"### {_TITLES[mode]}", "", *_rows(rows)]
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        limit = row.get("limit_speedup")
        lines.append(
            [
                row["row"],
                f"{row['median_ms']:.0f}",
                str(Spread(**row["speedup"])),
                f"{limit['median']:.2f}" if limit else "",
                f"{row['exposed_ms']['median']:.0f}" if limit else "",
                f"{100 * row['hidden_share']:.0f} %" if "hidden_share" in row else "",
                f"{row['waited_ms']:.0f}" if row.get("waited_ms") is not None else "",
                f"{100 * row['not_waited_share']:.0f} %" if "not_waited_share" in row else "",
                f"{row['processor_ms']:.0f}",
                f"{row['peak_mb']:.0f}",
                row["schedule"],
            ]
        )
    return table(_HEADER, lines)
