"""Our own measured rows, predicted from what `scmoe probe` measured on the same nodes.

    python -m benchmarks.predict.ourselves --profiles benchmarks/results/nodes_profile.json RECORD …

Every row of the records becomes a model, a method and a layout, and is predicted as `scmoe plan` predicts: work, times,
step. Nothing is fitted to the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import environment
from benchmarks.harness.on_nodes import write
from benchmarks.predict.ourselves_page import Predicted, facts, markdown, summary
from benchmarks.predict.own_machines import Machines
from benchmarks.predict.own_rows import Row, measured_in, rows_of
from scmoe_ds.planner.plan import Schedule, plan
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.price import price
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.step import run_step
from scmoe_ds.simulate.step_work import step_work
from scmoe_ds.simulate.times import StepTimes
from scmoe_ds.simulate.work import Parameters, StepWork, Work


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


def predict(rows: Sequence[Row], machines: Machines) -> list[Predicted]:
    """All rows of one record."""
    ms = {row.key: simulated_ms(row, machines.of(row)) for row in rows}
    return [
        Predicted(row, ms[row.key], ms[replace(row, name=row.base).key] / ms[row.key], machines.pace(row))
        for row in rows
    ]


def predicted_in(record: dict[str, Any]) -> list[Predicted]:
    """All rows of a record of this program, predicted again from its profiles."""
    cluster = Cluster.model_validate(record["cluster"])
    profiles = {float(rate): Profile.model_validate(profile) for rate, profile in record["profiles"].items()}
    found = []
    for name, measured in record["measured"].items():
        found += predict(rows_of(name, measured), Machines(cluster, profiles))
    return found


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
