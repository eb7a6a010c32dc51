"""Figures of the serving benchmarks, in the manner of the paper's tables 1 and 2 and figure 13, from their records.

python -m benchmarks.serving.figures benchmarks/results/inference_60.json benchmarks/results/offload_medium.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

WIDTH = 9.0
ROW = 0.32


def speedups(record: dict[str, Any]) -> Figure:
    """Bars of each row's speed-up over DeepSpeed's top-2, with the 10th to 90th percentile; a panel for each phase."""
    phases = record["phases"]
    rows = max(len(found["rows"]) for found in phases.values())
    figure = Figure((WIDTH, 1.2 + ROW * rows), layout="constrained")
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for panel, (phase, found) in zip(panels, phases.items(), strict=True):
        names = [row["row"] for row in found["rows"]]
        spreads = [row["speedup"] for row in found["rows"]]
        medians = [spread["median"] for spread in spreads]
        errors = [
            [spread["median"] - spread["p10"] for spread in spreads],
            [spread["p90"] - spread["median"] for spread in spreads],
        ]
        colors = ["tab:orange" if name.startswith("ScMoE") else "tab:gray" for name in names]
        panel.barh(names, medians, xerr=errors, color=colors, ecolor="black", capsize=2)
        panel.axvline(1.0, color="black", linewidth=0.8)
        share = 100 * found["link"]["share"]
        panel.set_title(f"{phase}, all-to-all {share:.0f} % of the baseline's layer", fontsize=10)
        panel.set_xlabel("speed-up over DeepSpeed top-2")
    panels[0].invert_yaxis()  # of all panels: they share it
    return figure


def latencies(record: dict[str, Any]) -> Figure:
    """Bars of the time per pair of blocks and of the peak memory, for each mode."""
    rows = record["rows"]
    figure = Figure((WIDTH, 1.2 + ROW * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["row"] for row in rows]
    spreads = [row["pair_ms"] for row in rows]
    errors = [
        [spread["median"] - spread["p10"] for spread in spreads],
        [spread["p90"] - spread["median"] for spread in spreads],
    ]
    left.barh(names, [spread["median"] for spread in spreads], xerr=errors, color="tab:blue", capsize=2)
    left.invert_yaxis()
    left.set_xlabel("ms per pair of blocks, one token")
    right.barh(names, [row["peak_bytes"] / 1e9 for row in rows], color="tab:green")
    right.set_xlabel("peak memory, GB")
    figure.suptitle(f"{record['model']}: experts from {record['tier']}", fontsize=10)
    return figure


def draw(path: Path) -> Path:
    """The figure of a record, beside it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    figure = speedups(record) if "phases" in record else latencies(record)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=120)
    return out


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
