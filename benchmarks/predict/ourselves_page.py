"""Our own rows, measured and simulated, side by side: errors, and the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.measure import environment_text
from benchmarks.predict.own_machines import PaceOver
from benchmarks.predict.own_rows import Record, Row
from scmoe_ds.analysis.markdown import code

_NOTES = (
    "Measured: the median of all rounds. Simulated: `scmoe plan`'s own chain, from the profile of two such nodes at "
    "another moment. Nothing is fitted to the rows.",
    "This machine's speed changes within minutes. In every round six kernels of the probe run: three products, and "
    "three that memory bounds. Their time over that in the profile is the pace, a median of each three. Simulated "
    "computation is multiplied by it, transfers are not. A link of another rate than the probed one reaches the same "
    "shares of it.",
    "A row “again (A/A)” is the first row a second time: what is smaller than their difference is noise. DGMoE is no "
    "method of `scmoe plan`, and is left out.",
)


@dataclass(frozen=True)
class Predicted:
    """A row and what was simulated of it.

    Attributes:
        ms: simulated.
        speedup: of the simulated base over this.
        pace: that `ms` is simulated with.
    """

    row: Row
    ms: float
    speedup: float
    pace: PaceOver

    @property
    def error(self) -> float:
        """Of the time, relative to what was measured."""
        return self.ms / self.row.ms.median - 1

    @property
    def speedup_error(self) -> float:
        return self.speedup / self.row.speedup.median - 1


def summary(found: Sequence[Predicted]) -> dict[str, float]:
    """Median and worst errors, and what the measurement's own spread is."""
    judged = [each for each in found if each.row.name != each.row.base]
    times, speedups = [abs(each.error) for each in found], [abs(each.speedup_error) for each in judged]
    widths = [(each.row.ms.p90 - each.row.ms.p10) / 2 / each.row.ms.median for each in found]
    return {
        "rows": len(found),
        "median_error": statistics.median(times),
        "worst_error": max(times),
        "median_speedup_error": statistics.median(speedups),
        "worst_speedup_error": max(speedups),
        "median_half_width": statistics.median(widths),
    }


def facts(found: Predicted) -> dict[str, Any]:
    """A row for the record."""
    row = found.row
    return {
        "record": row.record,
        "variant": row.name,
        "mode": row.mode,
        "unit": row.unit,
        "measured_ms": row.ms.median,
        "simulated_ms": found.ms,
        "error": found.error,
        "measured_speedup": row.speedup.median,
        "simulated_speedup": found.speedup,
        "speedup_error": found.speedup_error,
    }


_FAR = 0.15


def _notes_of(found: Sequence[Predicted]) -> Iterator[str]:
    """What only these rows need."""
    if any(each.row.layout.world > 2 for each in found):
        yield (
            "Four nodes share two cores here, two on each. The profile is of two nodes that share one core: "
            "each has half a core in both. The link is slow and the shape small, so that transfers count."
        )
    far = [
        f"{each.row.name} ({each.row.model.name.split(',')[0]}, {each.row.mode}, {each.row.rate_mbit:.0f} Mbit/s): "
        f"{100 * each.error:+.0f} %"
        for each in found
        if abs(each.error) > _FAR
    ]
    if far:
        yield f"Times that are off by more than {100 * _FAR:.0f} %: {'; '.join(far)}."


def markdown(record: dict[str, Any], found: Sequence[Predicted]) -> str:
    """The page."""
    total = summary(found)

    def percent(key: str) -> str:
        return f"{100 * total[key]:.1f} %"

    lines = [
        "# Our own measurements, predicted from a probe of the same nodes",
        "",
        code(record["command"]),
        "",
        f"{environment_text(record['environment'])}.",
        "",
        f"{total['rows']} rows. Simulated against measured: time, median error {percent('median_error')}, worst "
        f"{percent('worst_error')}; speed-up over the record's first row, median {percent('median_speedup_error')}, "
        f"worst {percent('worst_speedup_error')}. Half the distance between the 10th and the 90th percentile of a "
        f"measured row is {percent('median_half_width')} of its median (median of all rows).",
        "",
        *(f"- {note}" for note in (*_NOTES, *_notes_of(found))),
        "",
    ]
    for name, measured in record["measured"].items():
        lines += [*_section(measured, [each for each in found if each.row.record == name]), ""]
    return "\n".join(lines)


def _section(measured: Record, rows: Sequence[Predicted]) -> list[str]:
    links = "; ".join(
        f"{mode if mode == 'forward' else 'training'} {link['rate_mbit']:.0f} Mbit/s"
        for mode, link in measured["links"].items()
    )
    paces = " and ".join(str(pace) for pace in dict.fromkeys(each.pace for each in rows))
    title = f"{rows[0].row.model.name}, {100 * measured['settings']['share']:.0f} % communication"
    facts = f"{measured['environment']['date']}, {links}; {measured['settings']['rounds']} rounds; pace {paces}."
    return [f"## {title}", "", code(measured["command"]), "", facts, "", *_table(rows)]


def _table(rows: Sequence[Predicted]) -> list[str]:
    header = [
        "variant",
        "timed",
        "measured ms (10th–90th percentile)",
        "simulated ms",
        "error",
        "measured speed-up",
        "simulated speed-up",
        "error",
    ]
    cells = [
        [
            each.row.name,
            f"{each.row.unit}, {'forward' if each.row.mode == 'forward' else 'training'}",
            f"{each.row.ms.median:.0f} ({each.row.ms.p10:.0f}–{each.row.ms.p90:.0f})",
            f"{each.ms:.0f}",
            f"{100 * each.error:+.0f} %",
            str(each.row.speedup),
            f"{each.speedup:.3f}",
            f"{100 * each.speedup_error:+.0f} %",
        ]
        for each in rows
    ]
    return tables.table(header, cells)
