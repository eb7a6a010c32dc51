"""Records as Markdown. Measured and predicted numbers have columns of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import scmoe_ds.analysis.markdown
from scmoe_ds.analysis.markdown import code, escape
from scmoe_ds.planner.rounds import Spread

Row = dict[str, Any]
_TITLES = {"forward": "forward", "train": "training"}
_NOTES = {
    "main": "speed-up over the first row: median (10th–90th percentile) of the ratios within rounds. Same dispatch and "
    "all-to-all primitive for all rows; “stock” rows have DeepSpeed's padded buffers. Top-3 has four experts. "
    "The dense gradients' all-reduce is left out.",
    "ablation": "speed-up over the first row: median (10th–90th percentile) of the ratios within rounds.",
    "slots": "speed-up over the first row: median (10th–90th percentile) of the ratios within rounds. One chunk; auto "
    "may also choose several.",
    "crossing": "columns but the last two: measured times, and time over that of the same position in one chunk, "
    "median (10th–90th percentile) of the ratios within rounds. Above 1 the chunks lose.",
}


def markdown(record: dict[str, Any], shape: str) -> str:
    """A record of benchmarks.speed.block.

    Args:
        record: of one table, both modes.
        shape: what was measured, in words.
    """
    name, modes = record["table"], record["modes"]
    loads = {f"{modes[mode]['load_max_over_mean']:.2f}" for mode in modes}
    lines = [
        f"# {shape}: {name} table, {record['settings']['dispatch']} dispatch",
        "",
        *head(record),
        f"{record['settings']['rounds']} interleaved rounds; {_NOTES[name]} Busiest expert: {' and '.join(loads)} × "
        "the mean.",
        "",
    ]
    if name == "crossing":
        for mode in modes:
            lines += [f"## {_TITLES[mode]}", "", *_crossing(modes[mode]["rows"])]
        return "\n".join(lines) + "\n"
    lines += _speedups(modes)
    for mode in modes:
        lines += ["", f"## Predicted and measured, and the limit: {_TITLES[mode]}", "", *_limits(modes[mode]["rows"])]
    for mode, found in modes.items():
        for best in found.get("auto_over_best", []):
            lines.append(
                f"\n{_TITLES[mode]}, {best['position']}: auto takes {Spread(**best['auto_over_best'])} × the "
                f"time of the best slot of all ({best['best']})."
            )
    return "\n".join(lines) + "\n"


def head(record: dict[str, Any]) -> list[str]:
    """Command, hardware, versions and link."""
    links = "; ".join(
        f"{_TITLES[mode]} {link['rate_mbit']:.0f} Mbit/s, all-to-all {link['all_to_all_ms']:.0f} of "
        f"{link['layer_ms']:.0f} ms of the baseline's MoE layer ({100 * link['share']:.0f} %)"
        for mode, link in record.get("links", {}).items()
    )
    hardware = ", ".join(escape(f"{key} {value}") for key, value in record["environment"].items())
    linked = f", linked at: {links}" if links else ""
    nodes = {2: "Two"}.get(count := record.get("settings", {}).get("nodes", 2), str(count))
    return [code(record["command"]), "", f"{hardware}. {nodes} network namespaces, one pinned rank each{linked}."]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; all but the first column are aligned to the right."""
    return scmoe_ds.analysis.markdown.table(header, rows, "---:")


def _speedups(modes: dict[str, Any]) -> list[str]:
    cells: dict[str, list[str]] = {}
    for found in modes.values():
        for row in found["rows"]:
            cells.setdefault(row["variant"], [row["variant"]])
            cells[row["variant"]] += [f"{row['median_ms']:.0f}", str(Spread(**row["speedup"]))]
    return table(["variant", *(part for mode in modes for part in (f"{_TITLES[mode]} ms", "speed-up"))], cells.values())


_PLANNED = ["variant", "schedule", "predicted ms", "predicted / measured"]
_LIMITED = [
    "communication ms",
    "exposed ms",
    "processor ms of transfers",
    "hidden",
    "not waited for (forward / backward)",
    "time / time without communication",
]


def _limits(rows: Sequence[Row]) -> list[str]:
    limited = any("exposed_ms" in row for row in rows)
    lines = []
    for row in rows:
        if "predicted_ms" not in row:
            continue
        cells = [row["variant"], row["schedule"], f"{row['predicted_ms']:.0f}", f"{row['predicted_over_measured']:.2f}"]
        if "exposed_ms" in row:
            waits = row.get("hidden_by_waits", {})
            cells += [
                f"{row['communication_ms']:.0f}",
                f"{row['exposed_ms']['median']:.1f}",
                f"{row['transfers_processor_ms']:.1f}" if "transfers_processor_ms" in row else "",
                f"{100 * row['hidden_share']:.0f} %",
                " / ".join(f"{100 * share:.0f} %" for share in waits.values()),
                str(Spread(**row["over_no_communication"])),
            ]
        elif limited:
            cells += [""] * len(_LIMITED)
        lines.append(cells)
    predicted = "Predicted: simulated by the planner from calibrated times, with the operators before the shortcut."
    if not limited:
        return [predicted, "", *table(_PLANNED, lines)]
    return [
        f"{predicted} Communication: dispatch and combine with nothing beside them, as calibrated. Exposed: time "
        "beyond the same step without communication; hidden: the share of the communication that is not exposed. "
        "Processor: what the transfers take of the rank's only core, which no schedule can hide. Not "
        "waited for: by the recorder, in each pass; leaves out what transfers cost the computation beside them.",
        "",
        *table([*_PLANNED, *_LIMITED], lines),
    ]


def _crossing(rows: Sequence[Row]) -> list[str]:
    groups: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        name = row["variant"].split(", ")[1]
        groups.setdefault((row["position"], row["rate_mbit"]), {})[name] = row
    lines = []
    for (position, rate), group in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        one, auto = group["unchunked"], group["auto"]
        ratios = [str(Spread(**group[name]["over_unchunked"])) for name in ("2 chunks", "4 chunks", "auto")]
        predicted = [f"{group[name]['predicted_ms'] / one['predicted_ms']:.3f}" for name in ("2 chunks", "4 chunks")]
        lines.append(
            [
                position,
                f"{rate:.0f}",
                f"{one['communication_over_window']:.2f}",
                f"{one['median_ms']:.0f}",
                *ratios,
                auto["schedule"],
                " / ".join(predicted),
            ]
        )
    return table(
        [
            "position",
            "Mbit/s",
            "communication / window",
            "one chunk ms",
            "2 chunks",
            "4 chunks",
            "auto",
            "auto's choice",
            "predicted: 2 / 4 chunks",
        ],
        lines,
    )
