"""Draws the figures of records again, each beside its record.

python -m benchmarks.redraw benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cost import scaling
from benchmarks.predict import paper_page
from benchmarks.quality import adapt_figure, sparse_table, stress_table
from benchmarks.quality import table as quality_table
from benchmarks.serving import drop_page
from benchmarks.serving import figures as serving
from benchmarks.speed import bars, timeline
from scmoe_ds.analysis import figures as analysis
from scmoe_ds.figure_style import save

_OF_A_KIND = {"similarity": analysis.similarity, "gating": analysis.gating, "gradients": analysis.gradients}
_OF_A_TABLE = {"main": bars.stacked, "slots": bars.slots, "crossing": bars.crossing}
_OF_A_BENCHMARK = {
    "benchmarks.quality": quality_table.figure,
    "benchmarks.quality.adapt": adapt_figure.figure,
    "benchmarks.quality.sparse": sparse_table.figure,
    "benchmarks.stress": stress_table.figure,
    "benchmarks.predict.paper": paper_page.figure,
    "benchmarks.serving.drop": drop_page.figure,
}


def drawing(record: Any) -> Callable[[Any], Figure] | None:
    """The function that draws a record; None for a record without a figure, and for a timeline, which has several."""
    if not isinstance(record, dict):
        return None
    for key, functions in (("kind", _OF_A_KIND), ("table", _OF_A_TABLE), ("benchmark", _OF_A_BENCHMARK)):
        if record.get(key) in functions:
            return functions[record[key]]
    if "phases" in record:
        return serving.speedups
    if "tier" in record:
        return serving.latencies
    return scaling.figure if "ep" in record else None


def redraw(path: Path, directory: Path | None = None) -> list[Path]:
    """Draws a record; returns what it wrote, into the directory of the record or another one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    out = (directory or path.parent) / path.name
    if isinstance(record, dict) and "spans" in record:
        return timeline.draw(record, out.with_suffix(""))
    draw = drawing(record)
    if draw is None:
        return []
    save(draw(record), out.with_suffix(".png"))
    return [out.with_suffix(".png")]


def main(argv: Sequence[str]) -> None:
    for name in argv:
        print(f"{name}: {', '.join(map(str, redraw(Path(name)))) or 'has no figure'}")


if __name__ == "__main__":
    main(sys.argv[1:])
