"""Our own measured rows, predicted from what `scmoe probe` measured on the same nodes.

    python -m benchmarks.predict.ourselves --profiles benchmarks/results/nodes_profile.json RECORD …

Every row of the records becomes a model, a method and a layout, and is predicted as `scmoe plan` predicts: work, times,
step. Nothing is fitted to the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.on_nodes import write
from benchmarks.harness.pace import Pace
from benchmarks.predict.own_rows import Row, measured_in, rows_of
from scmoe_ds.analysis.markdown import code
from scmoe_ds.planner.plan import Schedule, plan
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.simulate.cluster import Between, Cluster, read_cluster
from scmoe_ds.simulate.machine import Machine, machine_of
from scmoe_ds.simulate.price import price
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.step import run_step
from scmoe_ds.simulate.step_work import step_work
from scmoe_ds.simulate.times import StepTimes
from scmoe_ds.simulate.work import Parameters, StepWork, Work


@dataclass(frozen=True)
class Predicted:
    """A row and what was simulated of it.

    Attributes:
        ms: simulated.
        speedup: of the simulated base over this.
    """

    row: Row
    ms: float
    speedup: float

    @property
    def error(self) -> float:
        """Of the time, relative to what was measured."""
        return self.ms / self.row.ms.median - 1

    @property
    def speedup_error(self) -> float:
        return self.speedup / self.row.speedup.median - 1


def alone(work: StepWork) -> StepWork:
    """Pairs of blocks with nothing around them, whose gradients nobody averages: what the block benchmark runs."""
    pairs = tuple(replace(pair, parameters=Parameters()) for pair in work.pairs)
    return replace(work, pairs=pairs, first=Work("first"), last=Work("last"), outside=Parameters())


def times_of(row: Row, machine: Machine) -> StepTimes:
    """All times of the row's step."""
    work = step_work(row.model, row.method, row.layout)
    if row.unit == "pair":
        work = alone(work)
    if not row.communicates:
        work = replace(work, pairs=tuple(replace(pair, exchange=None) for pair in work.pairs))
    return price(work, row.layout, machine, Routing(counts=row.expert_counts))


def schedule_of(row: Row, times: OperatorTimes) -> Schedule:
    """The planner's choice within what the row leaves to it."""
    if not row.method.overlap:
        return Schedule(1, overlap=False)
    if row.counts is None:
        return plan(times, row.mode).schedule
    plans = [plan(times, row.mode, "auto", count) for count in row.counts]
    return min(plans, key=lambda each: each.predicted.total_ms).schedule


def simulated_ms(row: Row, machine: Machine) -> float:
    """What the row timed, simulated."""
    times = times_of(row, machine)
    schedules = [schedule_of(row, max(pair.by_class, key=_experts_ms)) for pair in times.pairs]
    step = run_step(times, row.layout, row.mode, schedules=schedules)
    return step.total_ms if row.unit in ("pair", "iteration") else step.micro_batch_ms


def _experts_ms(times: OperatorTimes) -> float:
    experts = times.chunks[1].experts
    return experts.forward_ms + experts.backward_ms


@dataclass(frozen=True)
class Machines:
    """The nodes of a record: described, and as they were probed.

    Attributes:
        profiles: by the link's rate in Mbit/s.
    """

    cluster: Cluster
    profiles: Mapping[float, Profile]

    def of(self, row: Row) -> Machine:
        """With the row's link, and as fast as it was when the row was measured."""
        probed = min(self.profiles, key=lambda mbit: abs(math.log(mbit / row.rate_mbit)))
        profile, between = self.profiles[probed].with_method(row.primitive), self.cluster.between
        assert between is not None
        link = between.model_copy(update={"nic_rate": probed * 1e6 / 8})
        machine = machine_of(self.cluster.model_copy(update={"between": link, "nodes": row.layout.world}), profile)
        return at_pace(at_rate(machine, row.rate_mbit / probed), pace_over(profile, row.pace))


def at_rate(machine: Machine, factor: float) -> Machine:
    """Nodes with a link of `factor` times the rate: messages reach the shares of it that the probe has measured."""

    def other(between: Between | None) -> Between | None:
        return between and between.model_copy(update={"nic_rate": between.nic_rate * factor})

    measured = {name: (inside, other(between)) for name, (inside, between) in machine.measured.items()}
    cluster = machine.cluster.model_copy(update={"between": other(machine.cluster.between)})
    return replace(machine, cluster=cluster, measured=measured)


def at_pace(machine: Machine, factor: float) -> Machine:
    """The same with computation that takes `factor` times as long; links and what they take are as they were."""
    gpu = machine.cluster.gpu
    slower = gpu.model_copy(
        update={
            "peak": {precision: peak / factor for precision, peak in gpu.peak.items()},
            "bandwidth": gpu.bandwidth / factor,
            "launch": gpu.launch * factor,
        }
    )
    return replace(machine, cluster=machine.cluster.model_copy(update={"gpu": slower}))


def pace_over(profile: Profile, pace: Pace) -> float:
    """Time of the reference kernels while a record was measured, over that in the profile; the median of all."""
    known = {(each.kind, each.phase, each.shape): each.ms for each in profile.table}
    pairs = [(each["ms"], known.get((each["kind"], each["phase"], tuple(each["shape"])))) for each in pace]
    ratios = [now / then for now, then in pairs if then]
    return statistics.median(ratios) if ratios else 1.0


def predict(rows: Sequence[Row], machines: Machines) -> list[Predicted]:
    """All rows of one record."""
    ms = {row.key: simulated_ms(row, machines.of(row)) for row in rows}
    return [Predicted(row, ms[row.key], ms[replace(row, name=row.base).key] / ms[row.key]) for row in rows]


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


def predicted_in(record: dict[str, Any]) -> list[Predicted]:
    """All rows of a record of this program, predicted again from its profiles."""
    cluster = Cluster.model_validate(record["cluster"])
    profiles = {float(rate): Profile.model_validate(profile) for rate, profile in record["profiles"].items()}
    found = []
    for name, measured in record["measured"].items():
        found += predict(rows_of(name, measured), Machines(cluster, profiles))
    return found


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
    ]
    for name in record["measured"]:
        rows = [each for each in found if each.row.record == name]
        settings, links = record["measured"][name]["settings"], record["measured"][name]["links"]
        rates = ", ".join(f"{mode} {link['rate_mbit']:.0f} Mbit/s" for mode, link in links.items())
        lines += [
            f"## {rows[0].row.model.name}",
            "",
            f"`{record['measured'][name]['command']}`",
            "",
            f"{rates}; {settings['rounds']} rounds.",
            "",
        ]
        lines += [*_table(rows), ""]
    return "\n".join(lines)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "records", nargs="+", type=Path, help="of benchmarks.speed.block and benchmarks.speed.end_to_end"
    )
    parser.add_argument("--cluster", type=Path, default=Path("clusters/lab_2xcpu_500mbit.json"))
    parser.add_argument("--profiles", type=Path, required=True, help="a record of benchmarks.predict.nodes_profile")
    parser.add_argument("--name", default="plan_ourselves")
    parser.add_argument("--output", type=Path, help="directory for JSON and Markdown table")
    args = parser.parse_args()
    record = {
        "command": "python -m benchmarks.predict.ourselves " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "cluster": read_cluster(args.cluster).model_dump(mode="json"),
        "profiles": json.loads(args.profiles.read_text())["profiles"],
        "measured": {path.stem: measured_in(path) for path in args.records},
    }
    found = predicted_in(record)
    text = markdown(record, found)
    print(text)
    if args.output:
        write(args.output, args.name, record | {"summary": summary(found), "rows": list(map(facts, found))}, text)


if __name__ == "__main__":
    main()
