"""The record of benchmarks.speed.autoep as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.families import FAMILIES
from benchmarks.harness.tables import table
from scmoe_ds.analysis.markdown import code, escape
from scmoe_ds.planner.rounds import Spread

_TITLES = {"train": "training step", "forward": "forward"}


def page(record: dict[str, Any]) -> str:
    """All cells that are in the record."""
    cells = record["cells"]
    hardware = {", ".join(escape(f"{key} {value}") for key, value in cell["environment"].items()) for cell in cells}
    lines = ["# AutoEP on two nodes", "", code("python -m benchmarks.speed.autoep --output benchmarks/results"), ""]
    lines += [*sorted(hardware), ""]
    for cell in sorted(cells, key=_place):
        lines += [cell_text(cell), ""]
    return "\n".join(lines)


def _place(cell: dict[str, Any]) -> tuple[int, float, float]:
    settings = cell["settings"]
    return list(FAMILIES).index(settings["family"]), -settings["share"], settings["skew"]


def cell_text(cell: dict[str, Any]) -> str:
    """One family at one share of the all-to-all."""
    settings, link, loads = cell["settings"], cell["link"], cell["loads"]
    family = FAMILIES[settings["family"]]
    cut = family.cut(settings["share"])
    title = f"{family.name}, all-to-all {100 * settings['share']:.0f} % of AutoEP's layers, skew {settings['skew']:g}"
    measured = ""
    if "share" in link:
        times = f"{link['all_to_all_ms']:.0f} of {link['layer_ms']:.0f} ms"
        measured = f", all-to-all {times} ({100 * link['share']:.0f} %)"
    lines = [
        f"## {title}",
        "",
        f"Widths / {cut.width}, {cut.tokens} tokens per rank, {family.blocks} blocks; {link['rate_mbit']:.0f} Mbit/s"
        f"{measured}; busiest expert {loads['busiest_expert_over_mean']:.2f} × the mean, busiest rank "
        f"{loads['busiest_rank_over_mean']:.2f} ×; {settings['rounds']} rounds.",
    ]
    for mode, rows in cell["modes"].items():
        lines += ["", f"### {_TITLES[mode]}", "", *_rows(rows)]
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    header = ["row", "ms", "speed-up", "limit", "exposed ms", "hidden", "processor ms", "peak MB", "schedule"]
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
                f"{row['processor_ms']:.0f}",
                f"{row['peak_mb']:.0f}",
                row["schedule"],
            ]
        )
    return table(header, lines)
