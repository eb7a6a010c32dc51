"""The figure of benchmarks.quality.adapt: held-out loss over the tokens of the students, a panel for each teacher."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.adapt_plan import TRAINED_ON, teacher_name
from benchmarks.quality.adapt_table import CLAIMED, DISTILLED, FINE_TUNED
from benchmarks.quality.table import finished
from scmoe_ds.figure_style import GREY, WIDTH, styled


@styled
def figure(record: Mapping[str, Any]) -> Figure:
    """Means over the seeds, minus the teacher's loss before; the value right after surgery is in the table."""
    teachers = list(record["identity"]["teachers"])
    whole = Figure(figsize=(WIDTH, 3.6))
    panels = whole.subplots(1, len(teachers), squeeze=False)[0]
    for axes, teacher in zip(panels, teachers, strict=True):
        _draw(axes, record, teacher)
        axes.set(title=teacher, xlabel="tokens, % of the teacher's")
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--", marker="")
        if axes.lines[1:]:
            axes.legend(fontsize=7.5)
    panels[0].set_ylabel("loss − the teacher's before, nats per token")
    return whole


def _draw(axes: Axes, record: Mapping[str, Any], teacher: str) -> None:
    names = [TRAINED_ON, *(f"{each}, {how}" for each in CLAIMED for how in (DISTILLED, FINE_TUNED))]
    of_teacher = finished(dict(record), teacher_name(teacher))
    steps = record["identity"]["teachers"][teacher]["steps"]
    for name in names:
        points: dict[int, list[float]] = {}
        for seed, run in finished(dict(record), f"{teacher}: {name}").items():
            last = record["variants"][f"{teacher}: {name}"]["section"]["steps"]
            for step, losses in {**run.get("on_the_way", {}), str(last): run["sequence_losses"]}.items():
                before = of_teacher[seed]["sequence_losses"][: len(losses)]
                points.setdefault(int(step), []).append(statistics.fmean(losses) - statistics.fmean(before))
        if points:
            places = sorted(points)
            axes.plot(
                [100 * each / steps for each in places], [statistics.fmean(points[each]) for each in places], label=name
            )
