"""From times to the rows of a record. Nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.planned import Calibrated
from benchmarks.harness.variants import Table, limit_of
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.rounds import Spread
from scmoe_ds.planner.schedule_text import schedule_text
from scmoe_ds.planner.simulation import Mode

Times = Mapping[str, Sequence[float]]
Row = dict[str, Any]


def speedup_rows(table: Table, times: Times, baseline: str) -> dict[str, Row]:
    """Median milliseconds of every row, and its speed-up over the baseline within rounds.

    Args:
        times: seconds in every round.
    """
    return {
        name: {
            "variant": name,
            "position": variant.position,
            "median_ms": 1e3 * statistics.median(times[name]),
            "p10_ms": 1e3 * Spread.of(times[name]).p10,
            "p90_ms": 1e3 * Spread.of(times[name]).p90,
            "speedup": vars(Spread.of_ratios(times[baseline], times[name])),
        }
        for name, variant in table.items()
    }


def limits(name: str, table: Table, times: Times, calibrated: Calibrated, mode: Mode) -> Row:
    """How close a row is to the same step without communication; empty if the table has no such row."""
    limit = limit_of(name, table)
    if limit is None:
        return {}
    exposed = Spread.of([1e3 * (full - bare) for full, bare in zip(times[name], times[limit], strict=True)])
    communication_ms = calibrated.communication_ms(mode)
    return {
        "communication_ms": communication_ms,
        "exposed_ms": vars(exposed),
        "hidden_share": 1 - exposed.median / communication_ms,
        "over_no_communication": vars(Spread.of_ratios(times[name], times[limit])),
    }


def processor(name: str, table: Table, processor_ms: Mapping[str, float]) -> Row:
    """A row's processor time; and what its transfers take of it, if the table has the same without communication.

    On a rank with one core, that part of a transfer runs instead of the computation, not beside it.
    """
    row: Row = {"processor_ms": processor_ms[name]}
    limit = limit_of(name, table)
    return row if limit is None else row | {"transfers_processor_ms": processor_ms[name] - processor_ms[limit]}


def prediction(calibrated: Calibrated, schedule: Schedule, mode: Mode, median_ms: float) -> Row:
    """A row's schedule and what the plan said that it would take; predicted times are simulated."""
    predicted_ms = calibrated.predicted_ms(schedule, mode)
    text = schedule_text(schedule) + ("" if schedule.overlap else ", blocking")
    return {"schedule": text, "predicted_ms": predicted_ms, "predicted_over_measured": predicted_ms / median_ms}


def auto_over_best(table: Table, times: Times) -> list[Row]:
    """For each position, the planner's choice against the best of all slots that were tried, within rounds.

    The best slot is the one with the smallest median, found from the same times: its median errs to the fast side.
    """
    found = []
    for position in dict.fromkeys(variant.position for variant in table.values() if variant.position):
        names = [name for name, variant in table.items() if variant.position == position]
        auto = next(name for name in names if table[name].slots == "auto")
        # Against the first slot, so that all are compared within rounds.
        medians = {name: Spread.of_ratios(times[name], times[names[0]]).median for name in names if name != auto}
        best = min(medians, key=lambda name: medians[name])
        over = Spread.of_ratios(times[auto], times[best])
        found.append({"position": position, "best": best, "auto_over_best": vars(over)})
    return found


def crossing_rows(table: Table, times: Times) -> dict[str, Row]:
    """Median milliseconds, and the time over that of the same position's single chunk within rounds."""
    rows = {}
    for name, variant in table.items():
        single = next(other for other in table if table[other].kind == variant.kind and table[other].chunks == 1)
        rows[name] = {
            "variant": name,
            "position": variant.position,
            "median_ms": 1e3 * statistics.median(times[name]),
            "over_unchunked": vars(Spread.of_ratios(times[name], times[single])),
        }
    return rows
